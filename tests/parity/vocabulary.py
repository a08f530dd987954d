"""CLIP's tokenizer, made of the vocabulary that the package open_clip_torch has (`pip install --no-deps open_clip_torch==3.3.0`; MIT licence)."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

from transformers import CLIPTokenizer

TOKENS = 49408


def tokenizer() -> CLIPTokenizer:
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise SystemExit("the package open_clip_torch is not installed: CLIP's vocabulary is in it")
    file = Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    # The first line is a heading; there are more merges than CLIP was trained with.
    merges = [tuple(line.split()) for line in gzip.decompress(file.read_bytes()).decode().split("\n")[1 : TOKENS - 2 * len(letters) - 2 + 1]]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)
