"""A causal language model of transformers as a summariser: `python -m recipes.causal_lm FOLDER --name HuggingFaceTB/SmolLM2-360M-Instruct`.

Writes onnx/model.onnx with its cache, its weights in onnx/model.onnx_data where they are too big for one file, the configuration, the tokenizer with its chat
template, and manifest.json; runs the file beside the library's model. --name is a model's name or a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from onnxruntime import InferenceSession
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from train import export

from .layout import write_manifest


class CausalLm(torch.nn.Module):
    """Tokens and the cache so far, batch x heads x past x width of each layer's keys and values, to logits and the cache after them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.decode({"input_ids": input_ids}, input_ids.shape[1], attention_mask, position_ids, past)

    def decode(self, given: dict[str, torch.Tensor], count: int, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: tuple[torch.Tensor, ...]):
        total = attention_mask.shape[1]
        seen = torch.arange(total)[None, :] <= torch.arange(total - count, total)[:, None]
        seen = seen[None, None] & (attention_mask > 0)[:, None, None, :]
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        mask = torch.where(seen, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        out = self.model(**given, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return (out.logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values)))


class EmbeddedCausalLm(CausalLm):
    """The same, of embeddings in place of tokens."""

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.decode({"inputs_embeds": inputs_embeds}, inputs_embeds.shape[1], attention_mask, position_ids, past)


def _inputs(model: PreTrainedModel, batch: int, past: int, count: int) -> dict[str, torch.Tensor]:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    inputs = {
        "input_ids": torch.randint(config.vocab_size, (batch, count)), "attention_mask": torch.ones(batch, past + count, dtype=torch.long),
        "position_ids": torch.arange(past, past + count).repeat(batch, 1),
    }
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    return inputs | {f"past_key_values.{name}": torch.randn(batch, heads, past, width, dtype=model.dtype) for name in names}


@torch.no_grad()
def write_decoder(model: PreTrainedModel, file: Path, embedded: bool = False) -> None:
    """Exports a decoder with its cache; `embedded`: its input is `inputs_embeds`, batch x tokens x width, in place of `input_ids`."""
    if getattr(model.config, "sliding_window", None) and "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        raise SystemExit("layers that look at a window of the text only are not exported right: take optimum's or onnxruntime-genai's export")
    inputs = _inputs(model, 2, 3, 5)
    if embedded:
        inputs = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids"))} | inputs
    names = [name.split(".", 1)[1] for name in inputs if name.startswith("past")]
    dynamic = {next(iter(inputs)): {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "total"}, "position_ids": {0: "batch", 1: "tokens"}}
    dynamic |= {"logits": {0: "batch", 1: "tokens"}}
    for name in names:
        dynamic |= {f"past_key_values.{name}": {0: "batch", 2: "past"}, f"present.{name}": {0: "batch", 2: "total"}}
    module = EmbeddedCausalLm(model) if embedded else CausalLm(model)
    export.export(module, file, inputs, ["logits", *(f"present.{name}" for name in names)], dynamic)


def in_turn(session: InferenceSession, model: PreTrainedModel, pieces: list[np.ndarray]) -> np.ndarray:
    """The exported decoder's logits of all that it is fed, piece by piece, its cache going round. Pieces are batch x tokens, or embeddings of them."""
    name, batch, past = session.get_inputs()[0].name, len(pieces[0]), 0
    cache = {name: value.numpy() for name, value in _inputs(model, batch, 0, 1).items() if name.startswith("past")}
    logits = []
    for piece in pieces:
        total = past + piece.shape[1]
        step = {name: piece, "attention_mask": np.ones((batch, total), np.int64), "position_ids": np.arange(past, total)[None].repeat(batch, 0)}
        said, *present = session.run(None, step | cache)
        cache, past = dict(zip(cache, present)), total
        logits.append(said)
    return np.concatenate(logits, 1)


def compare(file: Path, got: list[np.ndarray], wanted: torch.Tensor) -> None:
    """Stops unless all of these logits are the library's, to its floats' rounding."""
    off, largest = max(float(np.abs(logits - wanted.float().numpy()).max()) for logits in got), float(wanted.abs().max())
    print(f"{file}: logits within {off:.1e} of transformers', of {largest:.1f}")
    if not off <= (1e-4 if wanted.dtype == torch.float32 else 2e-2) * largest:
        raise SystemExit(f"{file} does not answer as the library does")


@torch.no_grad()
def _check(model: PreTrainedModel, file: Path) -> None:
    """Whole prompts, and one token at a time, against the library's own cache and mask."""
    session, ids = export.session(file), _inputs(model, 2, 0, 12)["input_ids"]
    pieces = [ids[:, at : at + 1].numpy() for at in range(ids.shape[1])]
    compare(file, [in_turn(session, model, [ids.numpy()]), in_turn(session, model, pieces)], model(ids).logits)


def write_causal_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: str) -> None:
    """Writes the folder of a summariser; `model` is in float32 or float16."""
    file = folder / "onnx" / "model.onnx"
    write_decoder(model.eval(), file)
    _check(model, file)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder, source)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.causal_lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--name", required=True, help="the model's name, or its folder")
    parser.add_argument("--float16", action="store_true", help="weights and cache in float16")
    given = parser.parse_args()
    dtype = torch.float16 if given.float16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(given.name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{given.name} has no chat template: it is not made for conversations")
    model = AutoModelForCausalLM.from_pretrained(given.name, dtype=dtype, attn_implementation="eager")
    source = model.config._name_or_path if not Path(given.name).exists() else "a folder"
    write_causal_lm(model, tokenizer, given.folder, source)


if __name__ == "__main__":
    main()
