"""The sketch suite's CLIP in PyTorch: `python clip_small.py` makes what services/clip/tests/parity.rs expects."""

from __future__ import annotations

import io
import json
import tarfile

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizer

import sketch

COUNT, EVERY = 24, 50
"""Pictures of the probing set, in the archive's order."""
TEXTS = [
    "", "a red circle", "red circles", "A RED CIRCLE", "polka dots", "green horizontal stripes", "blue and white checks", "a small pink ring", "gray",
    "a large blue star on a yellow background", "One realistic image of purple squares", "a photograph", "water, trees & snow!", "caf\u00e9 \u661f",
    "a large blue star and a small pink ring on a background of gray checks " * 3 + "with a red circle",
    "a large blue star and a small pink ring on a background of gray checks " * 3 + "with a green square",
]


@torch.no_grad()
def main() -> None:
    model, folder = sketch.clip_model(), sketch.SUITE / "clip"
    # The file says of no centre crop; the library's class would make one of 224 px.
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder, do_center_crop=False)
    with tarfile.open(sketch.SUITE / "probing.tar") as archive:
        members = archive.getmembers()[::EVERY][:COUNT]
        pictures = [Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB") for member in members]
    images = model.get_image_features(**processor(pictures, return_tensors="pt")).pooler_output
    texts = model.get_text_features(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")).pooler_output
    expected = {"every": EVERY, "texts": TEXTS}
    goldens = sketch.ROOT / "services/clip/tests/goldens"
    goldens.mkdir(exist_ok=True)
    for name, embeddings in (("images", images), ("texts", texts)):
        embeddings.numpy().astype("<f4").tofile(goldens / f"{name}.f32")
        expected["width"] = embeddings.shape[1]
    (goldens / "parity.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
