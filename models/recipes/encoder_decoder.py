"""A text decoder that attends to an encoder, as one merged graph: what its first token needs and what all later ones need, and an input that says which.

The layout is optimum's and transformers.js's `decoder_model_merged.onnx`: `use_cache_branch` is false for the first tokens, which are worked out without a
cache, and true after. With `cross`, the keys and values that are about the encoder are in the cache, too: they come out of the first run, real, and are fed from then on.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from train import export


@dataclass
class Sizes:
    """What a decoder's cache measures, and its vocabulary."""

    layers: int
    heads: int
    width: int
    vocabulary: int


def decode(model: PreTrainedModel, layers: int, input_ids, seen, past, cross_past) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits, and the cache's keys and values layer by layer: the text's own, and those about the encoder. Pasts may be empty lists."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(layers):
        if past:
            cache.self_attention_cache.update(past[2 * layer], past[2 * layer + 1], layer)
        if cross_past:
            cache.cross_attention_cache.update(cross_past[2 * layer], cross_past[2 * layer + 1], layer)
            cache.is_updated[layer] = True
    length = past[0].shape[2] if past else 0
    mask = torch.ones(input_ids.shape[0], length + input_ids.shape[1], dtype=torch.int64)
    logits = model(input_ids=input_ids, attention_mask=mask, encoder_hidden_states=seen, cache=cache, use_cache=True).logits
    of = lambda cached: [t for layer in cached.layers for t in (layer.keys, layer.values)]  # noqa: E731
    return logits, of(cache.self_attention_cache), of(cache.cross_attention_cache)


class First(nn.Module):
    """The first tokens: there is no cache yet."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes, cross: bool):
        super().__init__()
        self.model, self.layers, self.cross = model, sizes.layers, cross

    def forward(self, input_ids, encoder_hidden_states):
        logits, present, cross = decode(self.model, self.layers, input_ids, encoder_hidden_states, [], [])
        return (logits, *present, *(cross if self.cross else []))


class Later(nn.Module):
    """All later tokens; what the encoder saw is in the cache."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes, seen_width: int):
        super().__init__()
        self.model, self.layers, self.seen_width = model, sizes.layers, seen_width

    def forward(self, input_ids, *past):
        # That there is an encoder must be told; it is not looked at.
        nothing = torch.zeros(input_ids.shape[0], 1, self.seen_width, dtype=past[0].dtype)
        logits, present, _ = decode(self.model, self.layers, input_ids, nothing, past[: 2 * self.layers], past[2 * self.layers :])
        return (logits, *present)


class LaterSeeing(nn.Module):
    """All later tokens; what the encoder saw is looked at anew."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes):
        super().__init__()
        self.model, self.layers = model, sizes.layers

    def forward(self, input_ids, encoder_hidden_states, *past):
        logits, present, _ = decode(self.model, self.layers, input_ids, encoder_hidden_states, past, [])
        return (logits, *present)


def _without_graph(model: onnx.ModelProto, prefix: str, weights: dict[str, TensorProto], names: dict[bytes, str]) -> onnx.GraphProto:
    """The graph as a branch: its inputs are the outer graph's, its own names get a prefix, its weights are put among `weights`, each once."""
    graph = model.graph
    new = {i.name: i.name for i in graph.input}
    for tensor in graph.initializer:
        content = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)} ".encode() + numpy_helper.to_array(tensor).tobytes()).digest()
        if content not in names:
            names[content] = tensor.name if tensor.name not in weights else prefix + tensor.name
            weights[names[content]] = TensorProto.FromString(tensor.SerializeToString())
            weights[names[content]].name = names[content]
        new[tensor.name] = names[content]
    new[""] = ""
    for node in graph.node:
        node.name = prefix + node.name
        for outputs in (node.input, node.output):
            outputs[:] = [new.setdefault(name, prefix + name) for name in outputs]
    outputs = [helper.make_tensor_value_info(new[o.name], o.type.tensor_type.elem_type, None) for o in graph.output]
    return helper.make_graph(list(graph.node), prefix.rstrip("."), [], outputs)


def merge(first: Path, later: Path, path: Path, presents: list[str], cross_presents: list[str]) -> None:
    """Puts two decoders into one. `presents` come out of both; of `cross_presents` the later one gives a stand-in without rows, as optimum's graphs do."""
    models = onnx.load(str(first)), onnx.load(str(later))
    weights: dict[str, TensorProto] = {}
    names: dict[bytes, str] = {}
    inputs = {i.name: i for model in models for i in model.graph.input}
    outputs = {o.name: o for model in reversed(models) for o in model.graph.output}
    branches = [_without_graph(model, prefix, weights, names) for model, prefix in zip(models, ("first.", "later."))]
    for name in cross_presents:
        kind, (heads, width) = outputs[name].type.tensor_type.elem_type, (outputs[name].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
        stand_in = numpy_helper.from_array(np.zeros((0, heads, 1, width), helper.tensor_dtype_to_np_dtype(kind)))
        branches[1].node.append(helper.make_node("Constant", [], [f"later.{name}"], value=stand_in))
        branches[1].output.append(helper.make_tensor_value_info(f"later.{name}", kind, None))
    given = ["logits", *presents, *cross_presents]
    choice = helper.make_node("If", ["use_cache_branch"], given, name="use_cache", then_branch=branches[1], else_branch=branches[0])
    branch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    graph = helper.make_graph([choice], "decoder_model_merged", [*inputs.values(), branch], [outputs[name] for name in given], list(weights.values()))
    merged = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    onnx.checker.check_model(merged)
    onnx.save(merged, str(path))


def _inputs(sizes: Sizes, seen: torch.Tensor, names: list[str], cross_names: list[str], past: int, seeing: bool) -> dict[str, torch.Tensor]:
    seen = seen[:2]
    values = {"input_ids": torch.randint(sizes.vocabulary, (2, 3))}
    if seeing:
        values["encoder_hidden_states"] = seen
    for keys, length in ((names, past), (cross_names, seen.shape[1])):
        values |= {f"past_key_values.{key}": torch.randn(2, sizes.heads, length, sizes.width, dtype=seen.dtype) for key in keys}
    return values


@torch.no_grad()
def write_decoder(model: PreTrainedModel, sizes: Sizes, seen: torch.Tensor, path: Path, cross: bool = True, tolerance: float = 1e-4) -> None:
    """Writes the merged decoder of `model`, and checks it word by word. `seen` is the encoder's output for three pictures. `cross`: the cache is of the encoder, too."""
    model = model.eval()
    own = ".decoder" if cross else ""
    names = [f"{layer}{own}.{kind}" for layer in range(sizes.layers) for kind in ("key", "value")]
    cross_names = [f"{layer}.encoder.{kind}" for layer in range(sizes.layers) for kind in ("key", "value")] if cross else []
    presents, cross_presents = [f"present.{n}" for n in names], [f"present.{n}" for n in cross_names]
    axes = {"input_ids": {0: "batch", 1: "tokens"}, "encoder_hidden_states": {0: "batch", 1: "seen"}, "logits": {0: "batch", 1: "tokens"}}
    axes |= {f"past_key_values.{n}": {0: "batch", 2: "past"} for n in names} | {f"past_key_values.{n}": {0: "batch", 2: "seen"} for n in cross_names}
    axes |= {n: {0: "batch", 2: "total"} for n in presents} | {n: {0: "batch", 2: "seen"} for n in cross_presents}
    with tempfile.TemporaryDirectory() as folder:
        first, later = Path(folder) / "first.onnx", Path(folder) / "later.onnx"
        export.export(First(model, sizes, cross), first, _inputs(sizes, seen, [], [], 0, True), ["logits", *presents, *cross_presents], axes)
        rest = Later(model, sizes, seen.shape[2]) if cross else LaterSeeing(model, sizes)
        export.export(rest, later, _inputs(sizes, seen, names, cross_names, 5, not cross), ["logits", *presents], axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        merge(first, later, path, presents, cross_presents)
    for batch in (1, 3):
        check(model, sizes, seen[:batch], path, tolerance)


@torch.no_grad()
def check(model: PreTrainedModel, sizes: Sizes, seen: torch.Tensor, path: Path, tolerance: float) -> None:
    """Decodes word by word with the exported decoder's cache; stops if the model's one pass over the whole text, in float64, says otherwise.

    How much a model magnifies the rounding of its floats differs from model to model: ten times what PyTorch's own are off is allowed.
    """
    session, batch = export.session(path), len(seen)
    ids = torch.randint(sizes.vocabulary, (batch, 6))
    say = lambda: model(input_ids=ids, encoder_hidden_states=seen.to(model.dtype), use_cache=False).logits.double().numpy()  # noqa: E731
    own = say()
    model.double()
    want = say()
    model.to(seen.dtype)
    allowed = max(tolerance * max(1.0, float(np.abs(want).max())), 10 * float(np.abs(own - want).max()))
    given = {o.name for o in session.get_outputs()}
    cache = {i.name: np.zeros((batch, sizes.heads, 0, sizes.width), seen.numpy().dtype) for i in session.get_inputs() if i.name.startswith("past")}
    worst = 0.0
    for at in range(ids.shape[1]):
        inputs = {"input_ids": ids[:, at : at + 1].numpy(), "encoder_hidden_states": seen.numpy(), "use_cache_branch": np.array([at > 0])}
        outputs = dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs | cache)))
        worst = max(worst, float(np.abs(outputs["logits"][:, 0] - want[:, at]).max()))
        for name in cache:
            present = name.replace("past_key_values", "present")
            if present not in given:
                raise SystemExit(f"{path}: no output {present}")
            if at == 0 or ".encoder." not in name:
                cache[name] = outputs[present]
    if not worst <= allowed:
        raise SystemExit(f"{path}: word by word it differs from PyTorch's pass over the whole text by {worst}, more than {allowed}")
    print(f"{path.parent.name}/{path.name}: {path.stat().st_size / 1e6:.2f} MB, word by word within {worst:.1e} of PyTorch, of {np.abs(want).max():.3g} ({allowed:.1e} allowed), batch of {batch}")
