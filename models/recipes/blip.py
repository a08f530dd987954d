"""A BLIP captioner, base or large: `python -m recipes.blip OUT --name Salesforce/blip-image-captioning-base`. The layout is that of `sketch/captioner`, with the decoder's halves merged."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

from train import export
from train.captioner import Vision
from train.common import write_json

from .encoder_decoder import Sizes, write_decoder
from .layout import write_manifest


@torch.no_grad()
def write(model: BlipForConditionalGeneration, folder: Path, source: str) -> None:
    """The graphs, configurations and manifest; the tokenizer and the picture processor are the caller's to save before."""
    see, text = Vision(model.eval()), model.config.text_config
    pixels = torch.randn(3, 3, *[model.config.vision_config.image_size] * 2)
    file = folder / "onnx/vision_model.onnx"
    export.export(see, file, {"pixel_values": pixels[:2]}, ["last_hidden_state"], {"pixel_values": {0: "batch"}, "last_hidden_state": {0: "batch"}})
    for count in (1, 3):
        export.check(see, file, {"pixel_values": pixels[:count]}, tolerance=1e-3)
    sizes = Sizes(text.num_hidden_layers, text.num_attention_heads, text.hidden_size // text.num_attention_heads, text.vocab_size)
    write_decoder(model.text_decoder, sizes, see(pixels), folder / "onnx/text_decoder_model.onnx")
    write_json(folder / "config.json", model.config.to_dict() | {"architectures": ["BlipForConditionalGeneration"]})
    write_json(folder / "generation_config.json", {k: getattr(text, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    write_manifest(folder, source)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--name", default="Salesforce/blip-image-captioning-base", help="a model's name, or its folder")
    args = arguments.parse_args()
    AutoTokenizer.from_pretrained(args.name).save_pretrained(args.out)
    AutoImageProcessor.from_pretrained(args.name, backend="pil").save_pretrained(args.out)
    source = Path(args.name).name if Path(args.name).exists() else args.name
    write(BlipForConditionalGeneration.from_pretrained(args.name, dtype=torch.float32), args.out, source)


if __name__ == "__main__":
    main()
