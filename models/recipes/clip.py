"""CLIP, both encoders with their projections: `python -m recipes.clip FOLDER MODEL`, MODEL a transformers folder or a model's name.

Writes onnx/vision_model.onnx and onnx/text_model.onnx, config.json, preprocessor_config.json, the tokenizer and manifest.json, and checks the encoders
against PyTorch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from train import export
from train.clip import Text, Vision
from train.common import write_json

from .layout import write_manifest


def write(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: CLIPImageProcessor, folder: Path, source: str) -> None:
    side, words = model.config.vision_config.image_size, model.config.text_config
    ids = torch.randint(words.vocab_size - 2, (2, words.max_position_embeddings))
    ids[:, -1] = tokenizer.eos_token_id
    for module, name, inputs, output in (
        (Vision(model), "vision_model", {"pixel_values": torch.randn(2, 3, side, side)}, "image_embeds"),
        (Text(model), "text_model", {"input_ids": ids}, "text_embeds"),
    ):
        (key,) = inputs
        file = folder / f"onnx/{name}.onnx"
        export.export(module, file, inputs, [output], {key: {0: "batch"}, output: {0: "batch"}})
        export.check(module, file, {key: inputs[key][:1]}, 1e-3)
    write_json(folder / "config.json", {k: v for k, v in model.config.to_diff_dict().items() if not k.startswith("_")} | {"architectures": ["CLIPModel"]})
    pictures.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder, source)


def main(folder: Path, model: str) -> None:
    loaded = CLIPModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    write(loaded, CLIPTokenizer.from_pretrained(model), CLIPImageProcessor.from_pretrained(model), folder, Path(model).name if Path(model).exists() else model)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    torch.set_num_threads(2)
    with torch.no_grad():
        main(Path(sys.argv[1]), sys.argv[2])
