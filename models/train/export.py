"""PyTorch to ONNX, the same for all models: one file, a free batch size, no local paths, checked against PyTorch."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

SCOPES = "pkg.torch.onnx.name_scopes"


def strip(model: onnx.ModelProto, keep_scopes: bool) -> None:
    """Takes out what an export says of the machine that it was made on; keeps module names where asked."""
    def clean(entries) -> None:
        kept = [e for e in entries if keep_scopes and e.key == SCOPES]
        kept = [(e.key, e.value) for e in kept]
        del entries[:]
        for key, value in kept:
            entries.add(key=key, value=value)

    def graph(g) -> None:
        clean(g.metadata_props)
        for node in g.node:
            clean(node.metadata_props)
            node.doc_string = ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graph(attribute.g)
        for info in [*g.input, *g.output, *g.value_info]:
            clean(info.metadata_props)
        for tensor in g.initializer:
            clean(tensor.metadata_props)
    graph(model.graph)
    clean(model.metadata_props)
    model.doc_string = ""
    for function in model.functions:
        clean(function.metadata_props)


def export(module: torch.nn.Module, path: Path, inputs: dict[str, torch.Tensor], outputs: list[str], dynamic: dict[str, dict[int, str]], keep_scopes: bool = False, external_data: str | None = None) -> None:
    """Exports `module(*inputs)` to `path`, replacing it at once; the weights to the file `external_data` beside it, where it is given."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.onnx")
    dims: dict[str, torch.export.Dim] = {}
    shapes = tuple({axis: dims.setdefault(name, torch.export.Dim.DYNAMIC) for axis, name in dynamic.get(key, {}).items()} for key in inputs)
    named = [p for p in inspect.signature(module.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(named) < len(inputs):  # the rest are `*past`
        shapes = (*shapes[: len(named)], shapes[len(named):])
    program = torch.onnx.export(
        module.eval(), tuple(inputs.values()), dynamo=True, dynamic_shapes=shapes, input_names=list(inputs), output_names=outputs, external_data=False, verbose=False,
    )
    program.save(str(part), external_data=external_data is not None)
    model = onnx.load(str(part))
    strip(model, keep_scopes)
    for value in [*model.graph.input, *model.graph.output]:
        names = dynamic.get(value.name, {})
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis in names:
                dim.dim_param = names[axis]
    if external_data:
        part.with_name(f"{part.name}.data").unlink(missing_ok=True)
        (path.parent / external_data).unlink(missing_ok=True)
        onnx.save(model, str(part), save_as_external_data=True, location=external_data)
    else:
        onnx.save(model, str(part))
    onnx.checker.check_model(str(part))
    part.rename(path)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def check(module: torch.nn.Module, path: Path, inputs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Runs the file and the module on the same inputs; stops if they differ."""
    want = module.eval()(*inputs.values())
    want = want if isinstance(want, (tuple, list)) else [want]
    got = session(path).run(None, {k: v.numpy() for k, v in inputs.items()})
    worst = max(float(np.abs(g - w.numpy()).max()) if g.size else 0.0 for g, w in zip(got, want, strict=True))
    shapes = {k: tuple(v.shape) for k, v in inputs.items()}
    if not worst <= tolerance:
        raise SystemExit(f"{path}: differs from PyTorch by {worst} at {shapes}")
    print(f"{path.parent.name}/{path.name}: {path.stat().st_size / 1e6:.2f} MB, within {worst:.1e} of PyTorch at {shapes}")
