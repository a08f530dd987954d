"""CLIP's kind of tokenizer, learnt on the world's words, and the texts that pictures are trained with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from world import words

from .common import Drawn, write_json

LENGTH = 32
"""Tokens of a text, the start and end token counted; longer ones are cut."""
START, END = "<|startoftext|>", "<|endoftext|>"
PREFIX = "One realistic image of "

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _base(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def clip_tokenizer(corpus: list[str], size: int = 1024) -> Tokenizer:
    """Byte pairs in the way of CLIP: lower-case, the end of a word marked, every text encodable."""
    learner = _base(models.BPE(end_of_word_suffix="</w>"))
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False))
    learnt = json.loads(learner.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet]
    merges = [tuple(m) for m in learnt]
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += [START, END]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    tokenizer = _base(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing((END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False)
    return tokenizer


def save_clip_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that a published CLIP tokenizer has."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, "bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END,
    })


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Ids (N, LENGTH), cut and padded with the end token."""
    end = tokenizer.token_to_id(END)
    ids = np.full((len(texts), LENGTH), end, dtype=np.int64)
    for row, encoding in zip(ids, tokenizer.encode_batch(texts)):
        cut = encoding.ids[:LENGTH]
        row[: len(cut)] = cut
        row[-1] = end
    return ids


def corpus(data: Drawn, seed: int = 0, count: int = 20_000) -> list[str]:
    """Texts of many kinds, for learning a tokenizer."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in rng.integers(len(data), size=count):
        view = data.view(int(i))
        texts += [words.caption(view, int(rng.integers(words.FORMS))), PREFIX + sorted(c.name() for c in words.concepts_of(view))[0]]
    return texts


def concept_text(view: words.View, rng: np.random.Generator) -> str:
    """The name of a concept that is well to be seen in the view: of its background or of one of its things, larger ones more often."""
    weights = [1.2 if not view.things else 0.5] + [1.0 if t.size == "large" else 0.35 for t in view.things]
    pick = int(rng.choice(len(weights), p=np.array(weights) / sum(weights)))
    part = view.things[pick - 1] if pick else None
    fill, shape = (part.fill, part.shape) if part else (view.background, None)
    options = [words.Concept(colour=fill.colour)]
    if part is None and not fill.pattern:
        options += [words.Concept(colour=fill.colour, background=True)] * 4
    if fill.pattern:
        options += [words.Concept(pattern=fill.pattern)] + [words.Concept(colour=fill.colour, pattern=fill.pattern)] * 4
    if shape:
        options += [words.Concept(shape=shape)] + [words.Concept(colour=fill.colour, shape=shape)] * 4
    if shape and fill.pattern:
        options += [words.Concept(pattern=fill.pattern, shape=shape)] + [words.Concept(colour=fill.colour, pattern=fill.pattern, shape=shape)] * 2
    return options[int(rng.integers(len(options)))].name()


def caption_text(view: words.View, rng: np.random.Generator) -> str:
    """A caption of the view in any form."""
    if rng.random() < 0.3:
        return words.simplified(view)
    return words.caption(view, int(rng.integers(words.FORMS)), sizes=bool(rng.random() < 0.6))
