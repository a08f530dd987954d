"""BLIP-2 with an OPT decoder: `python -m recipes.blip2 OUT --name Salesforce/blip2-opt-2.7b --float16`.

The layout is the one in which transformers.js has models that put a picture before their text: onnx/vision_encoder.onnx (the vision model, the Q-Former and the
projection into the language model), onnx/embed_tokens.onnx, and onnx/decoder_model_merged.onnx, which takes embeddings and has one branch for an empty and a full
cache. Weights of more than 2 GB go to a file beside the graph, such as onnx/decoder_model_merged_fp16.onnx_data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedConfig

from train import export

from .causal_lm import compare, in_turn, write_decoder
from .layout import write_manifest


class Vision(nn.Module):
    """Pictures, batch x 3 x side x side, to what they are before a text: batch x queries x the language model's width."""

    def __init__(self, model: Blip2ForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


def supported(config: PreTrainedConfig) -> None:
    """Stops at what can't be exported, before its weights are fetched."""
    if config.model_type != "blip-2":
        raise SystemExit(f"model_type is {config.model_type!r}: this exports \"blip-2\" (InstructBLIP's Q-Former, too, reads the text, and is not exported)")
    if config.text_config.model_type != "opt":
        raise SystemExit(
            f"its language model is of type {config.text_config.model_type!r}: BLIP-2 is exported with OPT (blip2-opt-2.7b, blip2-opt-6.7b and what was tuned from "
            "them); with T5 (blip2-flan-t5-*) or another language model it is not"
        )
    if config.image_token_index is None:
        raise SystemExit("config.json has no image_token_index, without which transformers generates no captions either: take a later revision of the model")


@torch.no_grad()
def _check(model: Blip2ForConditionalGeneration, folder: Path, kind: str) -> None:
    """From pictures to logits: the text at once, and token by token after the picture, against the library's pass over both."""
    config, side = model.config, model.config.vision_config.image_size
    vision, embed, decoder = (export.session(folder / f"onnx/{name}{kind}.onnx") for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"))
    pixels = torch.randn(3, 3, side, side, dtype=model.language_model.dtype)
    # Any token but the picture's, whatever its place in the vocabulary.
    ids = (config.image_token_index + 1 + torch.randint(config.text_config.vocab_size - 1, (3, 6))) % config.text_config.vocab_size
    pictures = torch.full((3, config.num_query_tokens), config.image_token_index)
    wanted = model(pixel_values=pixels, input_ids=torch.cat([pictures, ids], 1)).logits
    seen, = vision.run(None, {"pixel_values": pixels.numpy()})
    said, = embed.run(None, {"input_ids": ids.numpy()})
    at_once = in_turn(decoder, model.language_model, [seen, said])
    by_token = in_turn(decoder, model.language_model, [seen, *(said[:, at : at + 1] for at in range(ids.shape[1]))])
    compare(folder, [at_once, by_token], wanted)


@torch.no_grad()
def write(model: Blip2ForConditionalGeneration, folder: Path, source: str) -> None:
    """The graphs, configurations and manifest; the tokenizer and the picture processor are the caller's to save before. Float16 stands in the names of its files."""
    supported(model.config)
    see, embed, side = Vision(model.eval()), model.get_input_embeddings(), model.config.vision_config.image_size
    # The Q-Former's floats are others: the model as a whole has no type.
    dtype = model.language_model.dtype
    kind, tolerance = ("", 1e-4) if dtype == torch.float32 else ("_fp16", 2e-2)
    pixels, ids = torch.randn(3, 3, side, side, dtype=dtype), torch.randint(model.config.text_config.vocab_size, (3, 4))
    file = folder / f"onnx/vision_encoder{kind}.onnx"
    export.export(see, file, {"pixel_values": pixels[:2]}, ["image_features"], {"pixel_values": {0: "batch"}, "image_features": {0: "batch"}})
    largest = float(see(pixels).abs().max())
    for count in (1, 3):
        export.check(see, file, {"pixel_values": pixels[:count]}, tolerance * largest)
    file = folder / f"onnx/embed_tokens{kind}.onnx"
    axes = {0: "batch", 1: "tokens"}
    export.export(embed, file, {"input_ids": ids}, ["inputs_embeds"], {"input_ids": axes, "inputs_embeds": axes})
    export.check(embed, file, {"input_ids": ids[:1, :2]}, tolerance=0.0)
    write_decoder(model.language_model, folder / f"onnx/decoder_model_merged{kind}.onnx", embedded=True)
    _check(model, folder, kind)
    model.config.save_pretrained(folder)
    # What `generate` asks for when a text ends: the language model's own.
    model.language_model.generation_config.save_pretrained(folder)
    write_manifest(folder, source)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m recipes.blip2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path, help="where the model goes")
    arguments.add_argument("--name", default="Salesforce/blip2-opt-2.7b", help="a model's name, or its folder")
    arguments.add_argument("--float16", action="store_true", help="weights, embeddings and cache in float16; the Q-Former stays in float32, as in transformers")
    args = arguments.parse_args()
    supported(AutoConfig.from_pretrained(args.name))
    AutoTokenizer.from_pretrained(args.name).save_pretrained(args.out)
    AutoImageProcessor.from_pretrained(args.name, backend="pil").save_pretrained(args.out)
    dtype = torch.float16 if args.float16 else torch.float32
    model = Blip2ForConditionalGeneration.from_pretrained(args.name, dtype=dtype, attn_implementation="eager")
    write(model, args.out, Path(args.name).name if Path(args.name).exists() else args.name)


if __name__ == "__main__":
    main()
