"""What a ResNet-50, a ViT-B/16 and a Swin-T do in PyTorch, for services/activation/tests/full_size.rs: `python tests/parity/targets.py FOLDER`.

The networks have seeded random weights, at full size, and are exported with models/recipes/export_target. Hooks on their modules give what the service is
held against: g of all units of several layers on 16 pictures, and some units' maps. The pictures have the networks' size, so that nothing is resized.

`python tests/parity/targets.py --small FOLDER` makes the small networks of services/activation/tests/networks/exported, of more kinds, and what they do.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))
from recipes import How, preprocessing, write_target  # noqa: E402
from recipes.export_target import IMAGENET_MEAN, IMAGENET_STD, Output  # noqa: E402

SIDE, PICTURES, MAPS = 224, 16, 4


def pictures(folder: Path, count: int, sides: tuple[int, int]) -> torch.Tensor:
    """Coloured noise of several scales, each picture with its own: PNGs, and what a network is given of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(7)
    tensors = []
    for i in range(count):
        coarse = draw.integers(0, 256, (2 + i, 2 + (5 * i) % 9, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(sides[::-1], Image.Resampling.BICUBIC), dtype=np.int16)
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
    return Output(ViTForImageClassification(ViTConfig(num_labels=1000, attn_implementation="eager")))


def swin() -> torch.nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)


# Each layer with what its value is: channels first or last, tokens, or units.
NETWORKS = {
    "resnet50": (resnet, "torchvision", {"layer1.0.bn2": "first", "layer2": "first", "layer4.2": "first", "fc": "units"}),
    "vit_b_16": (vit, "transformers", {"network.vit.layers.0.mlp.fc1": "tokens", "network.vit.layers.5": "tokens", "network.vit.layers.11": "tokens"}),
    "swin_t": (swin, "timm", {"patch_embed": "last", "layers.1": "last", "layers.3.blocks.1": "last", "head": "units"}),
}


def hooked(network: torch.nn.Module, layers: list[str], inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What those modules give, before a module after them works in place."""
    seen: dict[str, torch.Tensor] = {}
    keep = lambda layer: lambda _, __, value: seen.update({layer: (value[0] if isinstance(value, tuple) else value).clone()})  # noqa: E731
    hooks = [network.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    network(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def readings(kind: str, value: torch.Tensor, prefix: int = 1, aspect: float = 1.0) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """g by each way to read a layer, (pictures, units); and the maps, (pictures, units, rows, columns)."""
    if kind == "units":
        return {"mean": (value, None)}
    if kind == "tokens":
        rows = round(((value.shape[1] - prefix) * aspect) ** 0.5)
        maps = value[:, prefix:].permute(0, 2, 1).reshape(len(value), value.shape[2], rows, -1)
        found = {"class mean": (value[:, 0], None)} if prefix else {}
        before = "patch_mean "
    else:
        maps = value if kind == "first" else value.permute(0, 3, 1, 2)
        found, before = {}, ""
    return found | {f"{before}mean": (maps.double().mean((2, 3)).float(), maps), f"{before}max": (maps.amax((2, 3)), maps)}


@torch.no_grad()
def full_size(folder: Path) -> None:
    inputs = pictures(folder / "pictures", PICTURES, (SIDE, SIDE))
    expected = []
    for number, (name, (make, library, layers)) in enumerate(NETWORKS.items()):
        network = lively(make(), number, inputs)
        how = How(exporter="torchscript") if name == "swin_t" else How()
        write_target(network, folder / name, (SIDE, SIDE), preprocessing((SIDE, SIDE), None, IMAGENET_MEAN, IMAGENET_STD, "bilinear"), None, how)
        seen = hooked(network, list(layers), inputs)
        # How far PyTorch's own 32-bit floats are from 64-bit ones: random weights amplify what is rounded.
        exact = hooked(network.double(), list(layers), inputs.double())
        for layer, kind in layers.items():
            exact_readings = readings(kind, exact[layer])
            for reading, (g, maps) in readings(kind, seen[layer]).items():
                other = exact_readings[reading][0].double()
                own = float(((g - other).abs() / other.abs().clamp_min(other.square().mean().sqrt())).max())
                file = f"{name}.{layer}.{reading.replace(' ', '_')}"
                g.contiguous().numpy().astype("<f4").tofile(folder / f"{file}.g.f32")
                if maps is not None:
                    maps[:, :MAPS].contiguous().numpy().astype("<f4").tofile(folder / f"{file}.maps.f32")
                spread = float((g.std(0) / g.abs().mean(0).clamp_min(1e-6)).median())
                print(f"{name} {layer} {reading}: {tuple(g.shape)}, of {float(g.abs().mean()):.3g}, over pictures by {spread:.0%} of that; {own:.1e} from 64-bit floats")
                expected.append({
                    "network": name, "library": f"{library} {metadata.version(library)}", "layer": layer, "kind": kind, "reading": reading, "file": file,
                    "units": g.shape[1], "own": own, "map": list(maps.shape[2:]) if maps is not None else [],
                })
    (folder / "expected.json").write_text(json.dumps({"pictures": PICTURES, "maps": MAPS, "readings": expected}, indent=1) + "\n")


# Small networks: how each is made, height and width of its input, how it is exported, and its layers: what is asked for, the module, and what its value is.
SMALL = {
    "timm_vit_registers": (
        lambda: timm.models.VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, reg_tokens=4),
        How(), {"blocks.1": ("blocks.1", 5), "0.mlp.fc1": ("blocks.0.mlp.fc1", 5), "norm": ("norm", 5), "head": ("head", "units")},
    ),
    "timm_deit_distilled_torchscript": (
        lambda: timm.models.deit.VisionTransformerDistilled(img_size=(32, 48), patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5),
        How(exporter="torchscript"), {"blocks.0": ("blocks.0", 2), "attn.proj": ("blocks.0.attn.proj", 2)},
    ),
    "timm_vit_half": (
        lambda: timm.models.VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5, class_token=False, global_pool="avg"),
        How(half=True), {"blocks.0": ("blocks.0", 0), "patch_embed.proj": ("patch_embed.proj", "first")},
    ),
    "timm_swin": (
        lambda: timm.models.SwinTransformer(img_size=(32, 48), patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=5),
        How(batch=1), {"layers.0": ("layers.0", "last"), "layers.1.blocks.1": ("layers.1.blocks.1", "last"), "head": ("head", "units")},
    ),
    "transformers_swin_torchscript": (
        lambda: Output(SwinForImageClassification(SwinConfig(
            image_size=(32, 48), patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=5, attn_implementation="eager",
        ))),
        How(exporter="torchscript"), {"swin.embeddings": ("network.swin.embeddings", 0), "swin.layernorm": ("network.swin.layernorm", 0)},
    ),
    "timm_convnext": (
        lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=5),
        How(), {"stages.1": ("stages.1", "first"), "stages.1.blocks.0.mlp.fc1": ("stages.1.blocks.0.mlp.fc1", "last")},
    ),
}


@torch.no_grad()
def small(folder: Path) -> None:
    sides, count, units = (32, 48), 3, 6
    inputs = pictures(folder / "pictures", count, sides)
    expected = []
    for number, (name, (make, how, layers)) in enumerate(SMALL.items()):
        network = lively(make(), number, inputs)
        seen = hooked(network, [module for module, _ in layers.values()], inputs)
        write_target(network, folder / name, sides, preprocessing(sides, None, IMAGENET_MEAN, IMAGENET_STD, "bilinear"), None, how)
        for asked, (module, kind) in layers.items():
            prefix = kind if isinstance(kind, int) else 0
            ways = readings("tokens" if isinstance(kind, int) else kind, seen[module], prefix, sides[0] / sides[1])
            g = {way: [[float(f"{v:.6g}") for v in row] for row in values[:, :units].tolist()] for way, (values, _) in ways.items()}
            maps = next((list(maps.shape[2:]) for _, maps in ways.values() if maps is not None), [])
            expected.append({"network": name, "asked": asked, "map": maps, "half": how.half, "g": g})
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    torch.set_num_threads(2)
    if sys.argv[1] == "--small":
        small(Path(sys.argv[2]))
    else:
        full_size(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
