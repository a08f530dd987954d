"""What a ResNet-50, a ViT-B/16 and a Swin-T do in PyTorch, for services/activation/tests/full_size.rs: `python tests/parity/targets.py FOLDER`.

The networks have seeded random weights, at full size, and are exported with models/recipes/export_target. Hooks on their modules give what the service is
held against: g of all units of several layers on 16 pictures, and some units' maps. The pictures have the networks' size, so that nothing is resized.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))
from recipes import How, preprocessing, write_target  # noqa: E402
from recipes.export_target import IMAGENET_MEAN, IMAGENET_STD, Output  # noqa: E402

SIDE, PICTURES, MAPS = 224, 16, 4


def pictures(folder: Path) -> torch.Tensor:
    """Coloured noise of several scales, each picture with its own: PNGs, and what a network is given of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(7)
    tensors = []
    for i in range(PICTURES):
        coarse = draw.integers(0, 256, (2 + i, 2 + (5 * i) % 9, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        picture = Image.fromarray(np.clip(smooth + draw.integers(-30, 31, smooth.shape), 0, 255).astype(np.uint8))
        picture.save(folder / f"{i:02}.png")
        values = np.asarray(picture, dtype=np.float32) / np.float32(255)
        tensors.append((values - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD))
    return torch.from_numpy(np.stack(tensors)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def lively(network: torch.nn.Module, seed: int, inputs: torch.Tensor) -> torch.nn.Module:
    """Weights drawn so that activations neither fade nor all look alike."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda like, scale: torch.randn(like.shape, generator=generator) * scale  # noqa: E731
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel() if parameter.dim() in (2, 4) else parameter.shape[-1]
            parameter.copy_(normal(parameter, (1.5 / fan_in) ** 0.5 if parameter.dim() in (2, 4) else 0.5))
        else:
            parameter.copy_((1.0 if name.endswith("weight") else 0.0) + normal(parameter, 0.2))
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        network.train()
        network(inputs[:8])
    return network.eval()


def resnet() -> torch.nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None)


def vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Output(ViTForImageClassification(ViTConfig(num_labels=1000, attn_implementation="eager")))


def swin() -> torch.nn.Module:
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)


# Each layer with what its value is: channels first or last, tokens, or units.
NETWORKS = {
    "resnet50": (resnet, "torchvision", {"layer1.0.conv2": "first", "layer2": "first", "layer4.2": "first", "fc": "units"}),
    "vit_b_16": (vit, "transformers", {"network.vit.layers.0.mlp.fc1": "tokens", "network.vit.layers.5": "tokens", "network.vit.layers.11": "tokens"}),
    "swin_t": (swin, "timm", {"patch_embed": "last", "layers.1": "last", "layers.3.blocks.1": "last", "head": "units"}),
}


def readings(kind: str, value: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """g by each way to read a layer, (pictures, units); and the maps, (pictures, units, rows, columns)."""
    if kind == "units":
        return {"mean": (value, None)}
    if kind == "tokens":
        side = int((value.shape[1] - 1) ** 0.5)
        maps = value[:, 1:].permute(0, 2, 1).reshape(len(value), -1, side, side)
        found = {"class mean": (value[:, 0], None)}
        prefix = "patch_mean "
    else:
        maps = value if kind == "first" else value.permute(0, 3, 1, 2)
        found, prefix = {}, ""
    return found | {f"{prefix}mean": (maps.double().mean((2, 3)).float(), maps), f"{prefix}max": (maps.amax((2, 3)), maps)}


@torch.no_grad()
def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(2)
    inputs = pictures(folder / "pictures")
    expected = []
    for number, (name, (make, library, layers)) in enumerate(NETWORKS.items()):
        network = lively(make(), number, inputs)
        how = How(exporter="torchscript") if name == "swin_t" else How()
        write_target(network, folder / name, (SIDE, SIDE), preprocessing((SIDE, SIDE), None, IMAGENET_MEAN, IMAGENET_STD, "bilinear"), None, how)
        seen: dict[str, torch.Tensor] = {}
        for layer in layers:
            network.get_submodule(layer).register_forward_hook(lambda _, __, value, layer=layer: seen.update({layer: value[0] if isinstance(value, tuple) else value}))
        network(inputs)
        for layer, kind in layers.items():
            for reading, (g, maps) in readings(kind, seen[layer]).items():
                file = f"{name}.{layer}.{reading.replace(' ', '_')}"
                g.contiguous().numpy().astype("<f4").tofile(folder / f"{file}.g.f32")
                if maps is not None:
                    maps[:, :MAPS].contiguous().numpy().astype("<f4").tofile(folder / f"{file}.maps.f32")
                spread = float((g.std(0) / g.abs().mean(0).clamp_min(1e-6)).median())
                print(f"{name} {layer} {reading}: {tuple(g.shape)}, of {float(g.abs().mean()):.3g}, over pictures by {spread:.0%} of that")
                expected.append({
                    "network": name, "library": f"{library} {metadata.version(library)}", "layer": layer, "kind": kind, "reading": reading, "file": file,
                    "units": g.shape[1], "map": list(maps.shape[2:]) if maps is not None else [],
                })
    (folder / "expected.json").write_text(json.dumps({"pictures": PICTURES, "maps": MAPS, "readings": expected}, indent=1) + "\n")


if __name__ == "__main__":
    main()
