"""Recipes that make targets out of networks that others trained. Run each module from the folder `models`: `python -m recipes.export_target`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from train import export
from train.common import write_json

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which preprocessor_config.json uses."""


def preprocessing(side: int, resized: int | None, mean: list[float], std: list[float], resample: str) -> dict:
    """preprocessor_config.json: the shorter side brought to `resized` and the middle cut out, or without it the whole picture squashed."""
    config: dict = {"do_resize": True, "size": {"height": side, "width": side}, "resample": RESAMPLING[resample], "do_center_crop": False}
    if resized is not None:
        config |= {"size": {"shortest_edge": resized}, "do_center_crop": True, "crop_size": {"height": side, "width": side}}
    return config | {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(mean), "image_std": list(std), "do_convert_rgb": True,
    }


def write_target(module: torch.nn.Module, folder: Path, side: int, config: dict, classes: list[str] | None) -> None:
    """Writes network.onnx, with the names of its modules and a free batch size, and what stands beside it; checks it against the module."""
    folder.mkdir(parents=True, exist_ok=True)
    file, module = folder / "network.onnx", module.eval()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn((3, 3, side, side), generator=generator)
    axes = {"pixel_values": {0: "batch"}, "output": {0: "batch"}}
    export.export(module, file, {"pixel_values": pictures}, ["output"], axes, keep_scopes=True)
    session = export.session(file)
    for count in (1, 3):
        with torch.no_grad():
            wanted = module(pictures[:count]).numpy()
        got, = session.run(None, {"pixel_values": pictures[:count].numpy()})
        off, size = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
        print(f"batch of {count}: output {got.shape}, at most {off:.1e} from PyTorch's, of {size:.3g}")
        if not off <= 1e-3 * max(size, 1e-3):
            raise SystemExit(f"{file} does not compute what the module does")
    write_json(folder / "preprocessor_config.json", config)
    if classes:
        write_json(folder / "classes.json", classes)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
