"""A causal language model of transformers as a summariser: `python -m recipes.causal_lm FOLDER --name HuggingFaceTB/SmolLM2-360M-Instruct`.

Writes onnx/model.onnx with its cache, its weights in onnx/model.onnx_data where they are too big for one file, the configuration, the tokenizer with its chat
template, and manifest.json; runs the file beside the library's model. --name is a model's name or a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from train import export

from .layout import write_manifest

ONE_FILE = 1_900_000_000
"""Bytes: protocol buffers, and with them ONNX files, end at 2 GiB."""


class CausalLm(torch.nn.Module):
    """Tokens and the cache so far, batch x heads x past x width of each layer's keys and values, to logits and the cache after them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count, total = input_ids.shape[1], attention_mask.shape[1]
        seen = torch.arange(total)[None, :] <= torch.arange(total - count, total)[:, None]
        seen = seen[None, None] & (attention_mask > 0)[:, None, None, :]
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        mask = torch.where(seen, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        out = self.model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return (out.logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values)))


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
def _check(model: PreTrainedModel, file: Path, tolerance: float) -> None:
    """Whole prompts, and one token at a time, against the library's own cache and mask."""
    run, inputs = export.session(file).run, _inputs(model, 2, 0, 12)
    ids = inputs["input_ids"]
    wanted = model(ids).logits.float().numpy()
    feeds = {name: value.numpy() for name, value in inputs.items()}
    whole = run(None, feeds)[0]
    stepped, past = [], {name: value for name, value in feeds.items() if name.startswith("past")}
    for at in range(ids.shape[1]):
        step = {"input_ids": ids[:, at : at + 1].numpy(), "attention_mask": np.ones((2, at + 1), np.int64), "position_ids": np.full((2, 1), at)}
        logits, *present = run(None, step | past)
        stepped.append(logits)
        past = dict(zip(past, present))
    off = max(float(np.abs(got - wanted).max()) for got in (whole, np.concatenate(stepped, 1)))
    print(f"{file}: logits within {off:.1e} of transformers', of {np.abs(wanted).max():.1f}")
    if not off <= tolerance * np.abs(wanted).max():
        raise SystemExit(f"{file} does not answer as the library does")


def write_causal_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: str) -> None:
    """Writes the folder of a summariser; `model` is in float32 or float16."""
    if getattr(model.config, "sliding_window", None) and "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
        raise SystemExit("layers that look at a window of the text only are not exported right: take optimum's or onnxruntime-genai's export")
    model.eval()
    inputs = _inputs(model, 2, 3, 5)
    names = [name.split(".", 1)[1] for name in inputs if name.startswith("past")]
    dynamic = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "total"}, "position_ids": {0: "batch", 1: "tokens"}}
    dynamic |= {"logits": {0: "batch", 1: "tokens"}}
    for name in names:
        dynamic |= {f"past_key_values.{name}": {0: "batch", 2: "past"}, f"present.{name}": {0: "batch", 2: "total"}}
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    file = folder / "onnx" / "model.onnx"
    outputs, beside = ["logits", *(f"present.{name}" for name in names)], "model.onnx_data" if size > ONE_FILE else None
    export.export(CausalLm(model), file, inputs, outputs, dynamic, external_data=beside)
    _check(model, file, 1e-4 if model.dtype == torch.float32 else 2e-2)
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
