"""Small captioners beside transformers' `generate`: makes services/captioner/tests/fixtures and services/captioner/tests/goldens anew.

One is the sketch suite's BLIP; the others have seeded random weights: a tiny vision encoder-decoder (ViT and GPT-2) in the merged layout, in float32 and float16,
and two tiny BLIP-2s of different sizes, one in float32 and one in float16.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import (
    Blip2Config, Blip2ForConditionalGeneration, BlipForConditionalGeneration, GPT2Config, PreTrainedTokenizerFast, VisionEncoderDecoderConfig, VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import sketch
from recipes import blip2, vit_gpt2
from world import words
from train.common import drawn

TESTS = sketch.ROOT / "services/captioner/tests"
COUNT, STEP = 32, 7
"""Every STEP-th picture of the sketch suite's probing set."""
NEAR = 1e-4
"""Two scores that are nearer than this are a tie: what is best of them is not compared."""

HALF = [{"max_new_tokens": 10}, {"max_new_tokens": 8, "min_length": 8}]
"""What float16 is asked: no beams, over whose steps its rounding adds up."""
ENDING = 3.0
"""How much louder the end token is than others."""

USUAL = {"max_new_tokens": 32, "min_length": 5, "num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
CASES = [
    {},
    {"repetition_penalty": 1.5, "min_length": 14},
    {"max_new_tokens": 6},
    {"num_beams": 5},
    {"num_beams": 5, "min_length": 14, "max_new_tokens": 16},
    {"num_beams": 5, "repetition_penalty": 1.4},
    {"num_beams": 4, "length_penalty": -1.0, "min_length": 0},
    {"num_beams": 4, "length_penalty": 2.0, "min_length": 0},
    {"num_beams": 3, "max_new_tokens": 3},
    {"num_beams": 16, "max_new_tokens": 10},
]


def pictures() -> list[Image.Image]:
    with tarfile.open(sketch.SUITE / "probing.tar") as archive:
        members = archive.getmembers()[::STEP][:COUNT]
        return [Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB") for member in members]


@torch.no_grad()
def captions(model, pixels: torch.Tensor, ends: set[int], case: dict, near: float = NEAR) -> tuple[list[list[int]], list[int]]:
    """The tokens of each picture's caption, without start and end, and how many of them are no matter of a tie."""
    beams = case["num_beams"]
    kept = min(beams, 2)
    # To transformers the picture that a BLIP-2's text begins with is part of its length.
    before = getattr(model.config, "num_query_tokens", 0)
    asked = case | {"min_length": case["min_length"] + before}
    out = model.generate(pixel_values=pixels, do_sample=False, early_stopping=False, num_return_sequences=kept, return_dict_in_generate=True, output_scores=True, **asked)
    tokens, sure = [], []
    for row, ids in enumerate(out.sequences[::kept, before + 1 :].tolist()):
        ended = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        tokens.append(ids[:ended])
        if beams == 1:
            best = [scores[row].topk(2).values for scores in out.scores[: ended + 1]]
            sure.append(next((at for at, two in enumerate(best) if two[0] - two[1] < near), ended + 1))
        else:
            # Sums of log-probabilities, as they were before the length penalty.
            best, second = out.sequences_scores[2 * row : 2 * row + 2] * (ended + 1) ** case["length_penalty"]
            sure.append(0 if best - second < near else ended + 1)
    return tokens, sure


def golden(model, pixels: torch.Tensor, ends: set[int], cases: list[dict], near: float = NEAR) -> list[dict]:
    made = []
    for case in cases:
        case = USUAL | case
        said, sure = captions(model, pixels, ends, case, near)
        ties = sum(s <= len(t) for s, t in zip(sure, said))
        print(case, "different:", len({tuple(t) for t in said}), "ended:", sum(len(t) < case["max_new_tokens"] for t in said), "near-ties:", ties)
        made.append(case | {"token_ids": said, "sure": sure})
    return made


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")).replace('{"max_new', '\n{"max_new') + "\n")


def blip() -> None:
    model: BlipForConditionalGeneration = sketch.captioner()
    pixels = BlipImageProcessorPil.from_pretrained(sketch.SUITE / "captioner")(pictures(), return_tensors="pt")["pixel_values"]
    write(TESTS / "goldens/blip.json", golden(model, pixels, {model.config.text_config.sep_token_id}, CASES))


def tokenizer(folder: Path, *added: str) -> PreTrainedTokenizerFast:
    data = drawn(7, 200)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([words.caption(data.view(i), form) for i in range(len(data)) for form in range(words.FORMS)], vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    fast.add_tokens([AddedToken(token, special=True) for token in added])
    fast.save_pretrained(folder)
    return fast


def make(vocabulary: int) -> VisionEncoderDecoderModel:
    torch.manual_seed(5)
    vision = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, initializer_range=0.3)
    text = GPT2Config(
        vocab_size=vocabulary, n_positions=40, n_embd=32, n_layer=2, n_head=2, n_inner=64, add_cross_attention=True, is_decoder=True, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0)
    model = VisionEncoderDecoderModel(config).eval()
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.generation_config, name, 0)
    with torch.no_grad():
        # Texts that heed the picture, and end now and then.
        for name, weight in model.decoder.named_parameters():
            if "crossattention.c_attn.weight" in name or "crossattention.q_attn.weight" in name or "crossattention.c_proj.weight" in name:
                weight.mul_(3)
        model.decoder.transformer.wte.weight[0].mul_(ENDING)
        # Exact in half precision: both files hold the same weights.
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    return model


def encoder_decoder() -> None:
    folder = TESTS / "fixtures/vit_gpt2"
    shutil.rmtree(folder, ignore_errors=True)
    vocabulary = len(tokenizer(folder))
    model = make(vocabulary)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder)
    pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
    write(TESTS / "goldens/vit_gpt2.json", golden(model, pixels, {0}, CASES))
    write(TESTS / "goldens/vit_gpt2_half.json", golden(model, pixels, {0}, HALF, near=0.01))
    # One more, without a cache of the encoder.
    vit_gpt2.write_graphs(model, folder / "seeing", cross=False)
    (folder / "seeing/onnx/decoder_model_merged.onnx").rename(folder / "decoder_model_merged_seeing.onnx")
    shutil.rmtree(folder / "seeing")
    vit_gpt2.write_graphs(make(vocabulary).half(), folder, "_fp16", tolerance=0.1)
    vit_gpt2.write(model, folder, "seeded random weights")


ENDS = 5
"""The token that ends a BLIP-2's texts: another than they begin with."""


def make_blip2(vocabulary: int, queries: int, vision: dict, qformer: dict, text: dict) -> Blip2ForConditionalGeneration:
    """The last token stands for the picture; texts begin with 0 and end with ENDS."""
    torch.manual_seed(15)
    config = Blip2Config(
        vision_config={"num_attention_heads": 2, **vision}, num_query_tokens=queries, image_token_index=vocabulary - 1,
        qformer_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **qformer},
        text_config={
            "model_type": "opt", "vocab_size": vocabulary, "max_position_embeddings": 48, "word_embed_proj_dim": text["hidden_size"], "dropout": 0.0,
            "bos_token_id": 0, "eos_token_id": ENDS, "pad_token_id": 1, **text,
        },
    )
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1 / weight.shape[-1] ** 0.5)
            # Texts that heed the picture, and end now and then.
            if "language_projection.weight" in name:
                weight.mul_(3)
        model.get_input_embeddings().weight[ENDS].mul_(ENDING)
        # The picture's token, which is penalised as one that was said, is likely enough for that to be seen.
        model.get_input_embeddings().weight[-1].mul_(2)
        # Exact in half precision.
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    return model


SMALLER = {
    "queries": 4,
    "vision": {"hidden_size": 20, "num_hidden_layers": 2, "intermediate_size": 48, "image_size": 28, "patch_size": 7},
    "qformer": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "cross_attention_frequency": 2},
    "text": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 64},
}
LARGER = {
    "queries": 7,
    "vision": {"hidden_size": 28, "num_hidden_layers": 3, "intermediate_size": 40, "image_size": 32, "patch_size": 8},
    "qformer": {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "cross_attention_frequency": 1},
    "text": {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "ffn_dim": 56},
}


def blip_2(name: str, sizes: dict, cases: list[dict], half: bool = False) -> None:
    folder = TESTS / "fixtures" / name
    shutil.rmtree(folder, ignore_errors=True)
    vocabulary, side = len(tokenizer(folder, "<image>")), sizes["vision"]["image_size"]
    processor = BlipImageProcessorPil(size={"height": side, "width": side})
    processor.save_pretrained(folder)
    pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
    model = make_blip2(vocabulary, **sizes)
    write(TESTS / f"goldens/{name}.json", golden(model, pixels, {ENDS}, cases, near=0.01 if half else NEAR))
    if half:
        # All but the Q-Former, as `from_pretrained` does.
        for part in (model.vision_model, model.language_projection, model.language_model):
            part.half()
    blip2.write(model, folder, "seeded random weights")


if __name__ == "__main__":
    torch.set_num_threads(1)
    blip_2("blip2", SMALLER, CASES)
    blip_2("blip2_half", LARGER, HALF, half=True)
    encoder_decoder()
    blip()
