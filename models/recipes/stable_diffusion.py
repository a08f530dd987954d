"""Stable Diffusion 1.x, 2.x, turbo, latent consistency models: `python -m recipes.stable_diffusion FOLDER MODEL`, MODEL a diffusers folder or a model's name.

Writes text_encoder/, unet/ and vae_decoder/, each model.onnx and config.json, scheduler/, tokenizer/, model_index.json and manifest.json, and checks each
part against PyTorch. A UNet of more than 2 GB keeps its weights beside it, in unet/model.onnx_data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from train import export
from train.common import write_json
from train.diffusion import TextEncoder, UNet

from .layout import write_manifest

TOLERANCE = 1e-3


class GuidedUNet(UNet):
    """A latent consistency model's, which is told the guidance scale instead of being run twice."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep_cond: torch.Tensor) -> torch.Tensor:
        return self.model(sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False)[0]


class Decoder(nn.Module):
    """Latents, divided by the scaling factor, to pictures of -1 to 1."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def _written(module: nn.Module, file: Path, inputs: dict[str, torch.Tensor], output: str) -> None:
    batched = {name: {0: "batch"} for name in [*inputs, output] if name != "timestep"}
    export.export(module, file, inputs, [output], batched)
    export.check(module, file, {k: v if k == "timestep" else v[:1] for k, v in inputs.items()}, TOLERANCE)


def _said(config: dict) -> dict:
    """A configuration without what a library notes of its own, the path that it was read from among it."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def write_text_encoder(pipeline: DiffusionPipeline, folder: Path) -> None:
    config = pipeline.text_encoder.config
    ids = torch.randint(config.vocab_size - 2, (2, config.max_position_embeddings))
    _written(TextEncoder(pipeline.text_encoder), folder / "text_encoder/model.onnx", {"input_ids": ids}, "last_hidden_state")
    write_json(folder / "text_encoder/config.json", _said(config.to_diff_dict()))


def write_unet(pipeline: DiffusionPipeline, folder: Path) -> None:
    unet: UNet2DConditionModel = pipeline.unet
    side, length = unet.config.sample_size, pipeline.text_encoder.config.max_position_embeddings
    # The time step as a float: some schedules visit steps between two whole ones.
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, side, side), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(2, length, unet.config.cross_attention_dim),
    }
    module = UNet(unet)
    if width := unet.config.time_cond_proj_dim:
        module, inputs = GuidedUNet(unet), inputs | {"timestep_cond": torch.randn(2, width)}
    _written(module, folder / "unet/model.onnx", inputs, "out_sample")
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", **_said(unet.config)})


def write_decoder(pipeline: DiffusionPipeline, folder: Path) -> None:
    vae, side = pipeline.vae, pipeline.unet.config.sample_size
    latents = torch.randn(2, vae.config.latent_channels, side, side)
    _written(Decoder(vae), folder / "vae_decoder/model.onnx", {"latent_sample": latents}, "sample")
    write_json(folder / "vae_decoder/config.json", {"_class_name": "AutoencoderKL", **_said(vae.config)})


def write_rest(pipeline: DiffusionPipeline, folder: Path) -> None:
    scheduler = pipeline.scheduler
    # What the original left to its class stays so: another class, made of the same file, has defaults of its own.
    said = {k: v for k, v in _said(scheduler.config).items() if k not in scheduler.config.get("_use_default_values", [])}
    write_json(folder / "scheduler/scheduler_config.json", {"_class_name": type(scheduler).__name__, **said})
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    kinds = {name: type(getattr(pipeline, name)) for name in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")}
    parts = {name: [kind.__module__.split(".")[0], kind.__name__] for name, kind in kinds.items()}
    write_json(folder / "model_index.json", {"_class_name": type(pipeline).__name__, **parts})


def write(pipeline: DiffusionPipeline, folder: Path, source: str) -> None:
    """Writes a StableDiffusionPipeline or a LatentConsistencyModelPipeline, in float32."""
    for part in (write_text_encoder, write_decoder, write_unet, write_rest):
        part(pipeline, folder)
    write_manifest(folder, source)


def main(folder: Path, model: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    write(pipeline, folder, Path(model).name if Path(model).exists() else model)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    torch.set_num_threads(2)
    with torch.no_grad():
        main(Path(sys.argv[1]), sys.argv[2])
