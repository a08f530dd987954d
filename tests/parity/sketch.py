"""The sketch suite's models as the libraries' own PyTorch modules, their weights read from the committed ONNX files.

An exporter renames and transposes some weights. Which initialiser is which weight is found out by exporting the same architecture once more with
marked weights: the exporter makes the same graph, so that an initialiser's name tells the weight. What is rebuilt is then run beside the file.
The modules are kept in a cache folder, as this takes some minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers import UNet2DConditionModel
from onnx import numpy_helper
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models"))

from train import captioner as blip, clip, diffusion, export, planted, resnet, summarizer  # noqa: E402

SUITE = ROOT / "models" / "sketch"
CACHE = ROOT / "target" / "parity" / "sketch"

Inputs = dict[str, torch.Tensor]


def _initialisers(file: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(file)).graph.initializer}


@torch.no_grad()
def _restore(module: nn.Module, file: Path, export_to: Callable[[Path], None]) -> None:
    """Gives `module` the weights of `file`; `export_to` makes such a file of the module."""
    parameters = dict(module.named_parameters())
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    marks: dict[bytes, tuple[str, bool]] = {}
    for name, parameter in parameters.items():
        value = parameter.copy_(torch.rand_like(parameter) + 0.5).numpy()
        marks[value.tobytes()] = name, False
        if value.ndim == 2:
            marks[np.ascontiguousarray(value.T).tobytes()] = name, True
    with tempfile.TemporaryDirectory() as folder:
        export_to(Path(folder) / "model.onnx")
        marked = _initialisers(Path(folder) / "model.onnx")
    real = _initialisers(file)
    if {k: v.shape for k, v in marked.items()} != {k: v.shape for k, v in real.items()}:
        raise SystemExit(f"{file}: not the graph that the exporter makes now; use the pinned versions of models/requirements.txt")
    for parameter, value in zip(parameters.values(), before.values()):
        parameter.copy_(value)  # what the file does not hold stays as it was
    for name, mark in marked.items():
        if found := marks.get(mark.tobytes()):
            key, turned = found
            value = torch.tensor(real[name])
            parameters[key].copy_((value.T if turned else value).reshape(parameters[key].shape))
        elif mark.dtype == np.float32 and not np.array_equal(mark, real[name]):
            raise SystemExit(f"{file}: {name} is none of the weights")


def _kept(name: str, make: Callable[[], nn.Module], restore: Callable[[nn.Module], None]) -> nn.Module:
    """The module, from the cache where it is there."""
    file = CACHE / f"{name}.pt"
    module = make()
    if file.exists():
        module.load_state_dict(torch.load(file))
    else:
        restore(module)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), file)
    return module.eval()


def _batched(*names: str) -> dict[str, dict[int, str]]:
    return {name: {0: "batch"} for name in names}


def _config(path: str) -> dict:
    return json.loads((SUITE / path / "config.json").read_text())


def captioner() -> BlipForConditionalGeneration:
    folder = SUITE / "captioner/onnx"
    config = BlipConfig.from_pretrained(SUITE / "captioner")
    text, vision = config.text_config, config.vision_config
    names = [f"{i}.{kind}" for i in range(text.num_hidden_layers) for kind in ("key", "value")]
    pixels = {"pixel_values": torch.randn(2, 3, vision.image_size, vision.image_size)}

    def past(tokens: int, length: int) -> Inputs:
        seen = (vision.image_size // vision.patch_size) ** 2 + 1
        values = {"input_ids": torch.randint(6, text.vocab_size, (2, tokens)), "encoder_hidden_states": torch.randn(2, seen, text.encoder_hidden_size)}
        size = text.num_attention_heads, length, text.hidden_size // text.num_attention_heads
        return values | {f"past_key_values.{name}": torch.randn(2, *size) for name in names}

    dynamic = {"input_ids": {0: "batch", 1: "tokens"}, "encoder_hidden_states": {0: "batch"}, "logits": {0: "batch", 1: "tokens"}}
    dynamic |= {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names} | {f"present.{name}": {0: "batch", 2: "total"} for name in names}
    outputs = ["logits", *(f"present.{name}" for name in names)]

    def restore(model: nn.Module) -> None:
        vision_file, text_file = folder / "vision_model.onnx", folder / "text_decoder_model.onnx"
        see, say = blip.Vision(model), blip.TextDecoder(model)
        _restore(see, vision_file, lambda file: export.export(see, file, pixels, ["last_hidden_state"], _batched("pixel_values", "last_hidden_state")))
        _restore(say, text_file, lambda file: export.export(say, file, past(3, 5), outputs, dynamic))
        export.check(see, vision_file, pixels)
        export.check(say, text_file, past(1, 4))

    return _kept("captioner", lambda: BlipForConditionalGeneration(config), restore)


def clip_model() -> CLIPModel:
    folder, config = SUITE / "clip/onnx", CLIPConfig.from_pretrained(SUITE / "clip")
    side, words = config.vision_config.image_size, config.text_config
    pixels = {"pixel_values": torch.randn(2, 3, side, side)}
    ids = {"input_ids": torch.randint(words.vocab_size - 2, (2, words.max_position_embeddings))}
    ids["input_ids"][:, -1] = words.eos_token_id

    def restore(model: nn.Module) -> None:
        for part, file, inputs, output in (
            (clip.Vision(model), folder / "vision_model.onnx", pixels, "image_embeds"), (clip.Text(model), folder / "text_model.onnx", ids, "text_embeds"),
        ):
            (key,) = inputs
            _restore(part, file, lambda made: export.export(part, made, inputs, [output], _batched(key, output)))
        export.check(clip.Vision(model), folder / "vision_model.onnx", pixels)
        export.check(clip.Text(model), folder / "text_model.onnx", ids)

    return _kept("clip", lambda: CLIPModel._from_config(config, attn_implementation="eager"), restore)


def text_encoder() -> CLIPTextModel:
    file, config = SUITE / "diffusion/text_encoder/model.onnx", CLIPTextConfig.from_pretrained(SUITE / "diffusion/text_encoder")
    ids = {"input_ids": torch.randint(config.vocab_size, (2, config.max_position_embeddings))}

    def restore(model: nn.Module) -> None:
        part = diffusion.TextEncoder(model)
        _restore(part, file, lambda made: export.export(part, made, ids, ["last_hidden_state"], _batched("input_ids", "last_hidden_state")))
        export.check(part, file, ids)

    return _kept("text_encoder", lambda: CLIPTextModel._from_config(config, attn_implementation="eager"), restore)


def unet() -> UNet2DConditionModel:
    file, config = SUITE / "diffusion/unet/model.onnx", _config("diffusion/unet")
    length = _config("diffusion/text_encoder")["max_position_embeddings"]
    inputs = {
        "sample": torch.randn(2, config["in_channels"], config["sample_size"], config["sample_size"]), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(2, length, config["cross_attention_dim"]),
    }

    def make() -> nn.Module:
        model = UNet2DConditionModel.from_config(config)
        model.set_attn_processor(diffusion.AttnProcessor())
        return model

    def restore(model: nn.Module) -> None:
        part = diffusion.UNet(model)
        _restore(part, file, lambda made: export.export(part, made, inputs, ["out_sample"], _batched("sample", "encoder_hidden_states", "out_sample")))
        export.check(part, file, inputs)

    return _kept("unet", make, restore)


def vae_decoder() -> nn.Module:
    """Latents, divided by the scaling factor, to pictures of -1 to 1."""
    file, scaling = SUITE / "diffusion/vae_decoder/model.onnx", _config("diffusion/vae_decoder")["scaling_factor"]
    weights = _initialisers(file)
    matrix = torch.tensor(next(w for w in weights.values() if w.ndim == 4))[:, :, 0, 0]
    decoder = diffusion.Decoder(diffusion.Autoencoder(scaling * matrix.T, torch.tensor(weights["autoencoder.mean"]), torch.full(matrix.shape[1:], scaling)))
    export.check(decoder, file, {"latent_sample": torch.randn(3, matrix.shape[1], 16, 16)})
    return decoder.eval()


def language_model() -> LlamaForCausalLM:
    def restore(model: nn.Module) -> None:
        ours = summarizer.Llama()
        _restore(ours, SUITE / "summarizer/onnx/model.onnx", lambda file: summarizer.to_onnx(ours, file))
        missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
        if unexpected or missing not in ([], ["lm_head.weight"]):
            raise SystemExit(f"not a LlamaForCausalLM: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        summarizer.against_transformers(ours, SUITE / "summarizer/onnx/model.onnx")

    return _kept("summarizer", lambda: LlamaForCausalLM(LlamaConfig.from_pretrained(SUITE / "summarizer")), restore)


def planted_target() -> nn.Module:
    network = planted.Planted().eval()
    export.check(network, SUITE / "targets/planted/planted.onnx", {"pixel_values": torch.rand(3, 3, 64, 64)})
    return network


def resnet_target() -> nn.Module:
    """The classifier with each BatchNorm folded into the convolution before it, as its file has it."""
    file, network = SUITE / "targets/resnet/resnet.onnx", resnet.ResNet()
    weights = _initialisers(file)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.tensor(weights[f"{name}.weight_bias"]))
        elif isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, nn.Identity())
    network.load_state_dict({k: torch.tensor(weights.get(k, weights.get(k.replace(".bias", ".weight_bias")))) for k in network.state_dict()})
    export.check(network.eval(), file, {"pixel_values": torch.randn(3, 3, 64, 64)})
    return network


if __name__ == "__main__":
    for make in (planted_target, resnet_target, vae_decoder, text_encoder, clip_model, captioner, language_model, unet):
        make()
