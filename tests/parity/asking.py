"""How a language model is asked (paper 3.2, step 2B), written once more on transformers: prompts 1 and 2, and the keyed draws of an answer's tokens."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models"))

from train.summarizer import SIMPLIFY, SIMPLIFY_EXAMPLES, SUMMARIZE, SUMMARIZE_EXAMPLES  # noqa: E402

Messages = list[dict[str, str]]


def _turns(prompt: str, examples: list[tuple[list[str], str]], texts: list[str]) -> Messages:
    turns = []
    for shown, answer in examples:
        turns += [("user", f"{prompt} {', '.join(text + '.' for text in shown)}"), ("assistant", answer)]
    turns.append(("user", f"{prompt} {', '.join(texts)}"))
    return [{"role": role, "content": content} for role, content in turns]


def simplify(caption: str) -> Messages:
    return _turns(SIMPLIFY, SIMPLIFY_EXAMPLES, [caption])


def summarize(descriptions: list[str]) -> Messages:
    return _turns(SUMMARIZE, SUMMARIZE_EXAMPLES, descriptions)


def summarize_again(parts: list[str]) -> Messages:
    return _turns(SUMMARIZE, [], parts)


def philox4x32(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    for _ in range(rounds):
        (high0, low0), (high1, low1) = (divmod(m * c, 1 << 32) for m, c in ((0xD2511F53, counter[0]), (0xCD9E8D57, counter[2])))
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return counter


def uniform(*parts: bytes | str | int) -> float:
    """The first number of the draw that the parts name."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part.to_bytes(8, "little") if isinstance(part, int) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    key = np.frombuffer(digest.digest()[:8], "<u4").tolist()
    return (philox4x32([0, 0, 0, 0], key)[0] + 0.5) / 2**32


def drawn(logits: torch.Tensor, temperature: float, seed: int, prompt: str, n: int, position: int) -> tuple[int, float]:
    """The next token, and by how much another would have been drawn: of logits for temperature 0, else of the cumulated probability."""
    values = logits.double().numpy()
    if temperature == 0:
        first, second = np.partition(values, -2)[[-1, -2]]
        return int(values.argmax()), float(first - second)
    weights = np.exp((values - values.max()) / temperature)
    sums = np.cumsum(weights) / math.fsum(weights)
    at = uniform("lm", seed, prompt, n, position)
    token = min(int(np.searchsorted(sums, at, side="right")), len(sums) - 1)
    return token, float(min(sums[token] - at, at - (sums[token - 1] if token else 0.0)))


@torch.no_grad()
def answer(model, ids: list[int], ends: set[int], prompt: str, temperature: float, seed: int, n: int, longest: int) -> tuple[list[int], list[float]]:
    """An answer's tokens, without the one that ends it, and how clearly each was drawn."""
    said, margins, past, given = [], [], None, torch.tensor([ids])
    for position in range(longest):
        out = model(given, past_key_values=past, use_cache=True)
        token, margin = drawn(out.logits[0, -1], temperature, seed, prompt, n, position)
        margins.append(margin)
        if token in ends:
            break
        said.append(token)
        past, given = out.past_key_values, torch.tensor([[token]])
    return said, margins
