"""Recipes that make targets out of networks that others trained. Run each module from the folder `models`: `python -m recipes.export_target`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from train import export
from train.common import write_json

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which preprocessor_config.json uses."""


def preprocessing(sides: tuple[int, int], resized: int | None, mean: list[float], std: list[float], resample: str) -> dict:
    """preprocessor_config.json: the shorter side brought to `resized` and the middle cut out, or without it the whole picture squashed."""
    height, width = sides
    config: dict = {"do_resize": True, "size": {"height": height, "width": width}, "resample": RESAMPLING[resample], "do_center_crop": False}
    if resized is not None:
        config |= {"size": {"shortest_edge": resized}, "do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return config | {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(mean), "image_std": list(std), "do_convert_rgb": True,
    }


@dataclass
class How:
    """How a target is exported."""

    exporter: str = "dynamo"
    """dynamo, or torchscript for what dynamo can't trace. Both keep the modules' names: in the nodes' metadata, or in the nodes' names."""
    half: bool = False
    """Half floats: weights, input, and activations."""
    batch: int | None = None
    """The only batch size; any by default."""


MOST_BYTES = 1_900_000_000
"""Of weights in the file itself, which can't be larger than 2 GiB."""


def write_target(module: torch.nn.Module, folder: Path, sides: tuple[int, int], config: dict, classes: list[str] | None, how: How = How()) -> None:
    """Writes network.onnx, with the names of its modules, and what stands beside it; checks it against the module, in 32-bit floats, on several batch sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    file, module = folder / "network.onnx", module.eval()
    pictures = torch.randn((how.batch or 5, 3, *sides), generator=torch.Generator().manual_seed(0))
    counts = [how.batch] if how.batch else [1, 2, 5]
    with torch.no_grad():
        wanted = {count: module(pictures[:count]).numpy() for count in counts}
    dtype, tolerance = (torch.float16, 2e-2) if how.half else (torch.float32, 1e-3)
    module = module.to(dtype)
    dynamic = {} if how.batch else {"pixel_values": {0: "batch"}, "output": {0: "batch"}}
    example = pictures[: how.batch or 2].to(dtype)
    if how.exporter == "torchscript":
        torchscript(module, file, example, dynamic)
    else:
        export.export(module, file, {"pixel_values": example}, ["output"], dynamic, keep_scopes=True)
    if sum(p.numel() * p.element_size() for p in module.parameters()) > MOST_BYTES:
        onnx.save(onnx.load(file), file, save_as_external_data=True, location=f"{file.name}.data")
    session = export.session(file)
    for count in counts:
        got, = session.run(None, {"pixel_values": pictures[:count].to(dtype).numpy()})
        off, size = float(np.abs(got - wanted[count]).max()), float(np.abs(wanted[count]).max())
        print(f"batch of {count}: output {got.shape}, at most {off:.1e} from PyTorch's, of {size:.3g}")
        if not off <= tolerance * max(size, 1e-3):
            raise SystemExit(f"{file} does not compute what the module does")
    write_json(folder / "preprocessor_config.json", config)
    if classes:
        write_json(folder / "classes.json", classes)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def torchscript(module: torch.nn.Module, file: Path, example: torch.Tensor, dynamic: dict[str, dict[int, str]]) -> None:
    """Exports by tracing, as PyTorch did before 2.9 if nothing else was asked for."""
    part = file.with_suffix(".part.onnx")
    torch.onnx.export(module, (example,), str(part), dynamo=False, opset_version=17, input_names=["pixel_values"], output_names=["output"], dynamic_axes=dynamic)
    model = onnx.load(part)
    export.strip(model, keep_scopes=False)
    onnx.checker.check_model(model)
    onnx.save(model, part)
    part.rename(file)
