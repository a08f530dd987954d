"""A vision network of torchvision, timm or transformers, or one's own, as a target: `python -m recipes.export_target FOLDER --library torchvision --name resnet50`.

Writes network.onnx (any batch size, unless --batch; layers carry the names of their modules), preprocessor_config.json, and classes.json where the library knows
the classes; checks the file against PyTorch on several batch sizes. Nothing of the machine that it is made on is in it. Without --weights the library fetches its own trained weights; --weights FILE takes a state dict, or with `--library torch` a
whole module that was pickled, which --trust-pickle must allow: unpickling runs code that the file holds. For transformers --name is a model's name or a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import How, preprocessing, write_target

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.export_target", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the target goes")
    parser.add_argument("--library", required=True, choices=["torchvision", "timm", "transformers", "torch"])
    parser.add_argument("--name", help="the network's name in the library")
    parser.add_argument("--weights", type=Path, help="a state dict (.pt, .pth, .safetensors), or a pickled module")
    parser.add_argument("--classes", type=int, help="number of classes, where the weights have another than the library's network")
    parser.add_argument("--untrained", action="store_true", help="leave the weights as they are initialised")
    parser.add_argument("--trust-pickle", action="store_true", help="unpickle --weights, which may run any code")
    parser.add_argument("--side", type=int, nargs="+", help="side of the input in pixels, or its height and width; the library's or 224 by default")
    parser.add_argument("--resized", type=int, help="the shorter side before the middle is cut out; the library's by default, else the whole picture is squashed")
    parser.add_argument("--mean", type=float, nargs=3, help="of the channels, of pixels in 0..1; the library's or ImageNet's by default")
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--resample", choices=["nearest", "bilinear", "bicubic", "lanczos"])
    parser.add_argument("--exporter", choices=["dynamo", "torchscript"], default="dynamo", help="torchscript for networks that dynamo can't trace")
    parser.add_argument("--fp16", action="store_true", help="half floats: a file of half the size, activations to three digits")
    parser.add_argument("--batch", type=int, help="the only batch size, for networks that can't be traced with any")
    given = parser.parse_args()
    if given.side is not None and len(given.side) > 2:
        parser.error("--side takes a side, or a height and a width")
    if given.library != "torch" and not given.name:
        parser.error(f"--library {given.library} needs --name")
    if given.library == "torch" and not given.weights:
        parser.error("--library torch needs --weights, a pickled module")
    return given


def sides(given: argparse.Namespace, default: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of the input."""
    said = given.side or ([default] if isinstance(default, int) else default)
    return said[0], said[-1]


def state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The weights in a file, whatever training script wrapped them."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    found = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    return {k.removeprefix("module."): v for k, v in found.items()}


class Output(torch.nn.Module):
    """A transformers network that gives a tensor: its logits, or its last hidden state."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found = self.network(pixel_values=pixel_values)
        return found.logits if "logits" in found else found.last_hidden_state


def from_torchvision(given: argparse.Namespace) -> tuple[torch.nn.Module, tuple[int, int], dict, list[str] | None]:
    from torchvision import models

    trained = models.get_model_weights(given.name).DEFAULT
    own = given.weights or given.untrained
    network = models.get_model(given.name, weights=None if own else trained, **({"num_classes": given.classes} if given.classes else {}))
    how = trained.transforms()
    side, resized = sides(given, how.crop_size[0]), given.resized or how.resize_size[0]
    config = preprocessing(side, resized, given.mean or how.mean, given.std or how.std, given.resample or how.interpolation.value)
    return network, side, config, None if given.classes else trained.meta.get("categories")


def from_timm(given: argparse.Namespace) -> tuple[torch.nn.Module, tuple[int, int], dict, list[str] | None]:
    import timm

    own = {"num_classes": given.classes, "img_size": tuple(given.side) if given.side and len(given.side) > 1 else None}
    network = timm.create_model(given.name, pretrained=not (given.weights or given.untrained), **{k: v for k, v in own.items() if v})
    how = timm.data.resolve_data_config({}, model=network)
    side = sides(given, how["input_size"][1:])
    # Timm's "squash" takes no crop but with a crop_pct below 1; its "center" cuts out the middle of a picture whose shorter side is side / crop_pct.
    if not given.resized and (how["crop_mode"] == "border" or (how["crop_mode"] == "squash" and how["crop_pct"] != 1)):
        raise SystemExit(f"{given.name} is prepared for with crop_mode {how['crop_mode']} and crop_pct {how['crop_pct']}, which can't be written down: say --resized")
    resized = given.resized or (None if how["crop_mode"] == "squash" or side[0] != side[1] else int(side[0] / how["crop_pct"]))
    config = preprocessing(side, resized, given.mean or how["mean"], given.std or how["std"], given.resample or how["interpolation"])
    names = timm.data.ImageNetInfo() if network.num_classes == 1000 else None
    return network, side, config, [names.index_to_description(i) for i in range(1000)] if names else None


def from_transformers(given: argparse.Namespace) -> tuple[torch.nn.Module, tuple[int, int], dict, list[str] | None]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

    about = AutoConfig.from_pretrained(given.name, **({"num_labels": given.classes} if given.classes else {}))
    classifies = any("ForImageClassification" in a for a in about.architectures or [])
    kind = AutoModelForImageClassification if classifies else AutoModel
    # Attention as single operations, so that each is a layer that can be looked into.
    if given.weights or given.untrained:
        network = kind.from_config(about, attn_implementation="eager")
    else:
        network = kind.from_pretrained(given.name, config=about, attn_implementation="eager")
    how = AutoImageProcessor.from_pretrained(given.name).to_dict()
    size, crop = how.get("size") or {}, how.get("crop_size") if how.get("do_center_crop") else None
    said = crop or size
    declared = (said["height"], said["width"]) if "height" in said else size.get("shortest_edge") or about.image_size
    side = sides(given, declared if isinstance(declared, int) else tuple(declared))
    resized = given.resized or (size.get("shortest_edge") or size.get("height") if crop else None)
    numbers = {v: k for k, v in {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}.items()}
    mean, std = (how.get(k) if how.get("do_normalize", True) else v for k, v in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3)))
    config = preprocessing(side, resized, given.mean or mean, given.std or std, given.resample or numbers[int(how.get("resample", 3))])
    labels = about.id2label if classifies else None
    return Output(network), side, config, [labels[i] for i in range(len(labels))] if labels else None


def from_pickle(given: argparse.Namespace) -> tuple[torch.nn.Module, tuple[int, int], dict, None]:
    if not given.trust_pickle:
        raise SystemExit(f"{given.weights} holds a whole module, and unpickling it may run any code: say --trust-pickle if you trust it")
    network = torch.load(given.weights, map_location="cpu", weights_only=False)
    if not isinstance(network, torch.nn.Module):
        raise SystemExit(f"{given.weights} holds a {type(network).__name__}, not a module: name the network with --library and --name")
    side = sides(given, 224)
    config = preprocessing(side, given.resized, given.mean or IMAGENET_MEAN, given.std or IMAGENET_STD, given.resample or "bilinear")
    return network, side, config, None


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    makers = {"torchvision": from_torchvision, "timm": from_timm, "transformers": from_transformers, "torch": from_pickle}
    network, side, config, classes = makers[given.library](given)
    if given.weights and given.library != "torch":
        inner = network.network if isinstance(network, Output) else network
        inner.load_state_dict(state_dict(given.weights))
    write_target(network.float(), given.folder, side, config, classes, How(given.exporter, given.fp16, given.batch))


if __name__ == "__main__":
    main()
