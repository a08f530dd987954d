"""CLIP ViT-B/16 at full size with seeded random weights: `python clip.py FOLDER`.

Exports the model to FOLDER/model with the project's recipe, embeds 32 pictures and 32 texts with transformers, and writes what came of it: FOLDER/expected.json,
pictures/ as PNG, and beside them tensors as raw little-endian float32. Weights are scaled until embeddings, less their mean, are spread, which is printed.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "models"), str(Path(__file__).parent)]

from recipes import clip  # noqa: E402
from vocabulary import TOKENS, tokenizer  # noqa: E402

LONG = "a photograph of " + "a very old and very large red barn beside a river and " * 12
TEXTS = [
    "", "a", "A RED BARN", "a red barn", "red   circles", "dog", "dogs", "a photo of a dog.", "polka dots", "stripes", "spider webs", "One realistic image of spider webs",
    "it's a café in Zürich", "naïve façade", "日本語の文", "emoji 🙂🙂", "1920s' style", "C++ & Rust; 100%!", "<|endoftext|> inside", "one\ntwo\tthree", "ﬁ ligature", "İstanbul",
    "water", "snow on mountains", "the number 12345", "hello, world", "under_score", "don't you'll we've", "green grass", "a black and white photograph of a bridge", LONG + "a dog", LONG + "a cat",
]
assert len(TEXTS) == 32


def pictures() -> list[Image.Image]:
    """16 drawn scenes of the sketch suite, each whole and as a strip of another shape and size."""
    with tarfile.open(ROOT / "models/sketch/probing.tar") as archive:
        names = sorted(archive.getnames())[:: len(archive.getnames()) // 16][:16]
        scenes = [Image.open(archive.extractfile(name)).convert("RGB") for name in names]
    return scenes + [scene.crop((4 * (i % 3), 8, 64, 40 + i)).resize((333, 187 + 5 * i), Image.Resampling.NEAREST) for i, scene in enumerate(scenes)]


@torch.no_grad()
def model() -> CLIPModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": TOKENS - 2, "eos_token_id": TOKENS - 1, "pad_token_id": TOKENS - 1}
    text = {"vocab_size": TOKENS, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "projection_dim": 512, **ends}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "projection_dim": 512}
    # Larger than the library initialises: attention then picks out what it attends to.
    config = CLIPConfig(text_config=text | {"initializer_factor": 4.0}, vision_config=vision | {"initializer_factor": 4.0}, projection_dim=512, initializer_factor=4.0)
    return CLIPModel._from_config(config, attn_implementation="eager").eval()


def spread(embeddings: np.ndarray) -> str:
    """How far apart directions are: cosines between different ones, as they are and less the mean."""
    def cosines(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (x @ x.T)[~np.eye(len(x), dtype=bool)]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    less = cosines(unit - unit.mean(0))
    return f"cosine between two {cosines(unit).mean():.3f} on average; less the mean {less.mean():.3f}, at most {less.max():.3f}"


@torch.no_grad()
def main(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    network, words, processor, shown = model(), tokenizer(), CLIPImageProcessor(), pictures()
    for i, picture in enumerate(shown):
        picture.save(folder / f"pictures/{i:02}.png")
    pixels = processor(shown, return_tensors="pt").pixel_values
    images = torch.cat([network.get_image_features(pixel_values=p).pooler_output for p in pixels.split(4)]).numpy()
    ids = words(TEXTS, padding=True, truncation=True, return_tensors="pt")
    texts = network.get_text_features(**ids).pooler_output.numpy()
    images.astype("<f4").tofile(folder / "images.f32"), texts.astype("<f4").tofile(folder / "texts.f32")
    said = {"images": spread(images), "texts": spread(texts)}
    print(said, flush=True)
    (folder / "expected.json").write_text(json.dumps({"texts": TEXTS, "width": images.shape[1], "spread": said}, indent=1))
    clip.write(network, words, processor, folder / "model", "seeded random weights")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
