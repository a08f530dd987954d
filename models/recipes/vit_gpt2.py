"""A vision encoder with a GPT-2 decoder, as optimum and transformers.js lay it out: `python -m recipes.vit_gpt2 OUT --name nlpconnect/vit-gpt2-image-captioning`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

from train import export

from .encoder_decoder import Sizes, write_decoder
from .layout import write_manifest


class Encoder(nn.Module):
    """The encoder, with the projection that fits its output to the decoder where their sizes differ."""

    def __init__(self, model: VisionEncoderDecoderModel):
        super().__init__()
        self.model, self.project = model.encoder, getattr(model, "enc_to_dec_proj", nn.Identity())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.project(self.model(pixel_values=pixel_values).last_hidden_state)


@torch.no_grad()
def write_graphs(model: VisionEncoderDecoderModel, folder: Path, kind: str = "", cross: bool = True, tolerance: float = 1e-4) -> None:
    """Writes onnx/encoder_model.onnx and onnx/decoder_model_merged.onnx; `kind` goes before the dot, as in `_fp16`."""
    see, text = Encoder(model.eval()), model.decoder.config
    pixels = lambda count: {"pixel_values": torch.randn(count, 3, *[model.encoder.config.image_size] * 2, dtype=model.dtype)}  # noqa: E731
    file = folder / f"onnx/encoder_model{kind}.onnx"
    export.export(see, file, pixels(2), ["last_hidden_state"], {"pixel_values": {0: "batch"}, "last_hidden_state": {0: "batch"}})
    for count in (1, 3):
        export.check(see, file, pixels(count), tolerance)
    sizes = Sizes(text.num_hidden_layers, text.num_attention_heads, text.hidden_size // text.num_attention_heads, text.vocab_size)
    write_decoder(model.decoder, sizes, see(pixels(3)["pixel_values"]), folder / f"onnx/decoder_model_merged{kind}.onnx", cross, tolerance)


def write(model: VisionEncoderDecoderModel, folder: Path, source: str) -> None:
    """The graphs, configurations and manifest; the tokenizer and the picture processor are the caller's to save before."""
    write_graphs(model, folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_manifest(folder, source)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--name", default="nlpconnect/vit-gpt2-image-captioning", help="a model's name, or its folder")
    args = arguments.parse_args()
    AutoTokenizer.from_pretrained(args.name).save_pretrained(args.out)
    AutoImageProcessor.from_pretrained(args.name, backend="pil").save_pretrained(args.out)
    source = Path(args.name).name if Path(args.name).exists() else args.name
    write(VisionEncoderDecoderModel.from_pretrained(args.name, dtype=torch.float32), args.out, source)


if __name__ == "__main__":
    main()
