"""The language model of step 2B: `python -m train.summarizer train`, `export`, `evaluate`.

A small Llama that answers the two prompts of the paper's A.1.2, and nothing else: the first simplifies a caption, the second names what descriptions share.
What they share is decided by `shared`, from what the captions say; the model learns to read that off their words. Three things make the training short:

- The turns before the descriptions are the same for every example: their keys and values are made once a step, and every example attends to them.
- A list of descriptions has an answer after each of them: a step asks for the answers after several of its beginnings, as branches of one sequence.
- So that the words of a concept are copied from the descriptions rather than remembered together, words of some lists are exchanged for words that no picture knows.
  No list holds a combination that training must not see.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

from world import draw, scene, words
from world.words import Concept, Seen, View

from .common import SKETCH, WORK, Box, Checkpoint, Ema, Log, command_line, one_thread, rate_factor, write_json
from .export import session, strip

FOLDER = SKETCH / "summarizer"

# What is asked (A.1.2): a user turn is the prompt, a space, and the texts joined by ", "; texts of examples end in a period.

SIMPLIFY = (
    "Only state your answer without a period and quotation marks. Do not number your answer. State one coherent and concise concept label that simplifies "
    "the following description and deletes any unnecessary details:"
)
SUMMARIZE = (
    "Only state your answer without a period and quotation marks and do not simply repeat the descriptions. State one coherent and concise concept label that is "
    "1-5 words long and can semantically summarize and represent most, not necessarily all, of the conceptual similarities in the following descriptions:"
)
SIMPLIFY_EXAMPLES = [(["a red background with a red background and a red background with a red background"], "A red background")]
SUMMARIZE_EXAMPLES = [
    (
        [
            "a purple background with a very soft texture",
            "a brown background with a diagonal pattern of lines and lines",
            "a white windmill with a red door and a red door in the middle of the picture",
            "a beige background with a rough texture of linen",
            "a beige background with a rough texture and a very soft texture",
        ],
        "multicolored textiles",
    ),
    (
        [
            "a little girl is sitting in a red tractor with the word sofy on the front",
            "a toy car sits on a red ottoman in a play room",
            "a red dress with silver studs and a silver belt",
            "a red chevrolet camaro is on display at a car show",
            "a red spool of a cable with the word red on it",
        ],
        "red-themed scenes",
    ),
]
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def opening(prompt: str, examples: list[tuple[list[str], str]]) -> str:
    """What stands before the live texts, rendered."""
    said = [f"{START}user\n{prompt} {', '.join(f'{t}.' for t in texts)}{END}\n{START}assistant\n{answer}{END}\n" for texts, answer in examples]
    return "".join(said) + f"{START}user\n{prompt}"


def rendered(prompt: str, examples: list[tuple[list[str], str]], texts: Sequence[str]) -> str:
    """The whole of what the model reads before it answers."""
    return f"{opening(prompt, examples)} {', '.join(texts)}{END}\n{START}assistant\n"


# What the right answer is.


def concepts_in_order(view: View) -> list[Concept]:
    """The concepts of a view, things before the background, what says most of a part first."""
    parts = [View(s.fill, ()) for s in view.things] + [View(view.background, ())]
    named = []
    for part, seen in zip(parts, [*view.things, None]):
        fill, shape = part.background, seen.shape if seen else None
        found = words.concepts_of(View(fill, (Seen(shape, "large", fill),))) - ({Concept(colour=fill.colour, background=True)} if seen else set())
        named += sorted(found, key=lambda c: (_vagueness(c), c.shape is None))
    return list(dict.fromkeys(named))


def concepts_of_name(concept: Concept) -> list[Concept]:
    """What a concept's name says, for lists of names."""
    if concept.background or not (concept.pattern or concept.shape):
        return [concept] + ([Concept(colour=concept.colour)] if concept.background else [])
    found = {
        Concept(colour, pattern, shape)
        for colour in {concept.colour, None} for pattern in {concept.pattern, None} for shape in {concept.shape, None}
        if colour or pattern or shape
    }
    return sorted(found, key=lambda c: (_vagueness(c), c.shape is None))


def _vagueness(concept: Concept) -> int:
    if concept.background:
        return 4
    match (bool(concept.colour), bool(concept.pattern), bool(concept.shape)):
        case (True, True, True):
            return 0
        case (True, True, False) | (True, False, True):
            return 1
        case (False, True, True):
            return 2
        case (False, _, _):
            return 3
    return 5


def shared(descriptions: Sequence[Sequence[Concept]]) -> str:
    """What descriptions share, each given as its concepts in order: the right answer to the second prompt.

    The most specific concept that at least 70 % of them hold. Of equally specific ones the more frequent, then the one that is mentioned first.
    Is there none, the single colour, pattern or shape that most of them hold, if at least half do; else what kind of picture they are of.
    """
    held = Counter(c for concepts in descriptions for c in concepts)
    # Counter keeps the order of first mention, and min gives the first of equals.
    by_most = [c for c in held if 10 * held[c] >= 7 * len(descriptions)]
    if by_most:
        return min(by_most, key=lambda c: (_vagueness(c), -held[c])).name()
    by_half = [c for c in held if 2 * held[c] >= len(descriptions) and _vagueness(c) in (3, 5)]
    if by_half:
        return min(by_half, key=lambda c: (-held[c], _vagueness(c))).name()
    with_shapes = sum(any(c.shape for c in concepts) for concepts in descriptions)
    with_patterns = sum(any(c.pattern for c in concepts) for concepts in descriptions)
    if 2 * with_shapes >= len(descriptions):
        return "assorted shapes"
    return "assorted patterns" if 2 * with_patterns >= len(descriptions) else "assorted backgrounds"


def is_right(label: str, concept: Concept) -> bool:
    """Whether a label names the concept and nothing else, by words.json."""
    known = json.loads((SKETCH / "words.json").read_text())
    of = {word: set(accepted) for kind in ("colours", "patterns", "shapes") for word, accepted in known[kind].items()}
    wanted = [of[w] for w in concept.content_words()]
    telling = set().union(*of.values(), *known["others"].values())
    said = re.findall(r"[a-z0-9]+", label.lower())
    return 1 <= len(said) <= 6 and all(w & set(said) for w in wanted) and all(w in set().union(*wanted) for w in said if w in telling)


# Descriptions to learn from.


@dataclass
class Pool:
    """Descriptions: each in a short form and as captions have it, what it says, and which of them say a thing."""

    short: list[str]
    long: list[list[str]]
    concepts: list[list[Concept]]
    holding: dict[Concept, np.ndarray]

    @classmethod
    def of(cls, short: list[str], long: list[list[str]], concepts: list[list[Concept]], least: int) -> Pool:
        holding: dict[Concept, list[int]] = {}
        for i, held in enumerate(concepts):
            for c in held:
                holding.setdefault(c, []).append(i)
        return cls(short, long, concepts, {c: np.array(i) for c, i in holding.items() if len(i) >= least})


def _box(rng: np.random.Generator, drawn: scene.Scene) -> Box:
    """A part of a picture: around a thing, more or less closely, or anywhere."""
    if drawn.things and rng.random() < 0.6:
        thing = drawn.things[int(rng.integers(len(drawn.things)))]
        left, top, right, bottom = (
            round(centre + side * thing.radius * rng.uniform(0.5, 1.6)) for side in (-1, 1) for centre in (thing.x, thing.y)
        )
    else:
        left, top = (int(v) for v in rng.integers(0, scene.SIDE - 12, size=2))
        right, bottom = left + int(rng.integers(10, scene.SIDE)), top + int(rng.integers(10, scene.SIDE))
    return max(0, left), max(0, top), min(scene.SIDE, right), min(scene.SIDE, bottom)


def _mistaken(rng: np.random.Generator, view: View) -> View:
    """The view with one word of its caption wrong."""
    part = int(rng.integers(-1, len(view.things)))
    fill, kind = (view.background if part < 0 else view.things[part].fill), rng.random()
    if kind < 0.4 or (part < 0 and kind < 0.7):
        colours = [c for c in scene.COLOURS if not (fill.pattern and c == "white")]
        fill = replace(fill, colour=str(rng.choice(colours)))
    elif kind < 0.7:
        shape = str(rng.choice(scene.SHAPES))
        return replace(view, things=tuple(replace(s, shape=shape) if i == part else s for i, s in enumerate(view.things)))
    elif kind < 0.85 and part >= 0:
        return replace(view, things=tuple(s for i, s in enumerate(view.things) if i != part))
    elif fill.colour != "white":
        fill = replace(fill, pattern=None if fill.pattern and rng.random() < 0.5 else str(rng.choice(scene.PATTERNS)))
    if part < 0:
        return replace(view, background=fill)
    return replace(view, things=tuple(replace(s, fill=fill) if i == part else s for i, s in enumerate(view.things)))


def captions_of_scenes(seed: int, count: int, withheld: bool) -> Pool:
    """Descriptions of scenes, of parts of them, and some with a mistake, as captions have; without withheld combinations not even a mistake makes one."""
    rng, views = np.random.default_rng(seed), []
    for drawn in scene.sample_many(seed, count, withheld):
        owner = np.zeros((scene.SIDE, scene.SIDE), dtype=np.uint8)
        for number, thing in enumerate(drawn.things, start=1):
            owner[draw.thing_mask(thing) > 0.5] = number
        here = [words.look(drawn, owner)] + [words.look(drawn, owner, _box(rng, drawn)) for _ in range(2)]
        wrong = _mistaken(rng, here[int(rng.integers(len(here)))])
        if withheld or not any(c.is_withheld() for c in words.concepts_of(wrong)):
            here.append(wrong)
        views += here
    long = [list({words.caption(v, int(form), sizes) for form in rng.permutation(words.FORMS)[:2] for sizes in (True, bool(form % 2))}) for v in views]
    return Pool.of([words.simplified(v) for v in views], long, [concepts_in_order(v) for v in views], least=12)


def names_of_concepts(of: Pool) -> Pool:
    """Short lists are also made of the names of concepts: of answers that held several."""
    names = list(of.holding)
    return Pool.of([c.name() for c in names], [[c.name()] for c in names], [concepts_of_name(c) for c in names], least=1)


KINDS = {"three": 0.1, "two": 0.42, "pattern or shape": 0.2, "background": 0.1, "colour": 0.13, "nothing": 0.05}
"""What the lists are about, and how often."""


def _kind(concept: Concept) -> str:
    return ("three", "two", "two", "pattern or shape", "background", "colour")[_vagueness(concept)]


class Lists:
    """Lists of descriptions that share more or less."""

    def __init__(self, of: Pool, only: set[Concept] | None = None):
        self.pool = of
        self.by_kind: dict[str, list[Concept]] = {}
        for c in of.holding:
            if only is None or c in only:
                self.by_kind.setdefault(_kind(c), []).append(c)
        self.kinds = [k for k in KINDS if k in self.by_kind or (k == "nothing" and only is None)]
        weights = np.array([KINDS[k] for k in self.kinds])
        self.weights = weights / weights.sum()

    def about(self, rng: np.random.Generator) -> Concept | None:
        kind = str(rng.choice(self.kinds, p=self.weights))
        return None if kind == "nothing" else self.by_kind[kind][int(rng.integers(len(self.by_kind[kind])))]

    def sample(self, rng: np.random.Generator, about: Concept | None, length: int, share: float) -> list[int]:
        """Numbers of descriptions; about `share` of them hold the concept, the others are any, many of them nearly so."""
        everything = len(self.pool.short)
        if about is None:
            return [int(i) for i in rng.integers(everything, size=length)]
        holding = self.pool.holding[about]
        if rng.random() < 0.15:
            # A picture, its crops and its like say the same.
            holding = rng.choice(holding, size=max(2, length // 2))
        near = [c for c in (Concept(colour=about.colour), Concept(pattern=about.pattern), Concept(shape=about.shape)) if c != Concept() and c in self.pool.holding]
        chosen = []
        for wanted in rng.random(length) < share:
            if wanted:
                chosen.append(int(rng.choice(holding)))
            elif near and rng.random() < 0.5:
                chosen.append(int(rng.choice(self.pool.holding[near[int(rng.integers(len(near)))]])))
            else:
                chosen.append(int(rng.integers(everything)))
        return chosen


# The words.

OTHER_WORDS = {
    # Put in for words of the world in some lists; a space goes before each. Plurals go with their singulars.
    "colours": [
        "teal", "gold", "silver", "tan", "navy", "maroon", "lime", "cyan", "beige", "violet", "coral", "mint", "peach", "ruby", "cream", "lemon", "rose", "sand",
        "copper", "plum",
    ],
    "shapes": [
        "heart", "moon", "tree", "arrow", "diamond", "flower", "cloud", "dog", "cat", "house", "boat", "car", "bird", "cup", "hexagon", "cube", "lamp", "chair",
        "table", "bottle", "book", "clock", "key", "train",
    ],
    "ways": ["wavy", "dotted", "thick", "thin", "curved", "neon", "tiny", "dark", "light", "crossed"],
    "marks": ["lines", "bands", "spots", "waves", "loops", "tiles", "letters", "grids"],
}


def tokenizer_corpus() -> list[str]:
    rng = np.random.default_rng(0)
    corpus = [rendered(p, e, []) for p, e in ((SIMPLIFY, SIMPLIFY_EXAMPLES), (SUMMARIZE, SUMMARIZE_EXAMPLES))] * 150
    for drawn in scene.sample_many(0, 4000):
        owner = np.zeros((scene.SIDE, scene.SIDE), dtype=np.uint8)
        for number, thing in enumerate(drawn.things, start=1):
            owner[draw.thing_mask(thing) > 0.5] = number
        view = words.look(drawn, owner)
        corpus += [words.caption(view, int(rng.integers(words.FORMS))), words.simplified(view)] + [c.name() for c in words.concepts_of(view)]
    said = [w for kind in OTHER_WORDS.values() for w in kind] + [f"{w}s" for w in OTHER_WORDS["shapes"]]
    said += [*scene.COLOURS, *scene.SHAPES, *words.PLURALS.values(), *(w for p in scene.PATTERNS for w in p.split())]
    for w in said + ["assorted shapes", "assorted patterns", "assorted backgrounds", "backgrounds", "themed scenes"]:
        corpus += [w, f" {w}"] * 150
    corpus += [" A", " An", ", A"] * 150
    return corpus


def learn_tokenizer() -> Tokenizer:
    """Byte pairs in the way of GPT-2: every text can be written, the world's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (END, START)],
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    return tokenizer


class Texts:
    """Descriptions and answers as ids, and what stands around them."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.comma, self.space = self.one(","), " "
        self.end = tokenizer.token_to_id(END)
        self.turn = self.ids(f"{END}\n{START}assistant\n")
        self.answers: dict[str, list[int]] = {}
        self.same = np.arange(tokenizer.get_vocab_size())

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def answer(self, text: str) -> list[int]:
        if text not in self.answers:
            self.answers[text] = [*self.ids(text), self.end]
        return self.answers[text]

    def one(self, text: str) -> int:
        ids = self.ids(text)
        if len(ids) != 1:
            raise ValueError(f"not one token: {text!r} is {[self.tokenizer.id_to_token(i) for i in ids]}")
        return ids[0]

    def exchange(self, rng: np.random.Generator) -> np.ndarray:
        """For every token what to write instead: some of the world's words become others, each another."""
        table = self.same.copy()

        def put(old: list[str], new: list[str], share: float) -> None:
            fresh = rng.permutation(new)
            for o, n in zip([o for o in old if rng.random() < share], fresh):
                for before, after in ((f" {o}", f" {n}"), (o, n)):
                    table[self.one(before)] = self.one(after)
                if o in words.PLURALS:
                    for before, after in ((f" {words.PLURALS[o]}", f" {n}s"), (words.PLURALS[o], f"{n}s")):
                        table[self.one(before)] = self.one(after)

        put([c for c in scene.COLOURS if c != "orange"], OTHER_WORDS["colours"], 0.5)
        put(list(scene.SHAPES), OTHER_WORDS["shapes"], 0.5)
        put(["horizontal", "vertical", "diagonal", "polka"], OTHER_WORDS["ways"], 0.4)
        put(["stripes", "dots", "checks"], OTHER_WORDS["marks"], 0.4)
        return table


# The model.

LAYERS, WIDTH, HEADS, HEAD, INNER, VOCABULARY, POSITIONS = 6, 160, 4, 32, 448, 953, 2048
EPSILON, THETA = 1e-5, 10_000.0


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: the halves of each head turned by the position's angles."""
    a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention in training, in plain words: compiled, its gradient takes less time on a CPU than that of torch's own."""
    scores = ((q * HEAD**-0.5).to(v.dtype) @ k.to(v.dtype).transpose(2, 3)).float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = nn.ModuleDict({
            **{f"{n}_proj": nn.Linear(WIDTH, HEADS * HEAD, bias=False) for n in "qkv"}, "o_proj": nn.Linear(HEADS * HEAD, WIDTH, bias=False),
        })
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(WIDTH, INNER, bias=False), "up_proj": nn.Linear(WIDTH, INNER, bias=False), "down_proj": nn.Linear(INNER, WIDTH, bias=False),
        })

    def split(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normal = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{n}_proj"](normal).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for n in "qkv")
        return turned(q, cos, sin), turned(k, cos, sin), v

    def join(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn["o_proj"](attended.transpose(1, 2).flatten(2))
        normal = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](normal)) * self.mlp["up_proj"](normal))


class Llama(nn.Module):
    """transformers' LlamaForCausalLM with its parameters' names, tied embeddings; written out so that examples can share their beginning."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(VOCABULARY, WIDTH), "layers": nn.ModuleList([Layer() for _ in range(LAYERS)]), "norm": Norm()})
        self.register_buffer("frequencies", THETA ** (-torch.arange(0, HEAD, 2) / HEAD), persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.04)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None, :, None].float() * self.frequencies
        return angles.cos(), angles.sin()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["norm"](x) @ self.model["embed_tokens"].weight.T

    def share(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of one beginning, ids (1, P)."""
        cos, sin = self.angles(torch.arange(ids.shape[1])[None])
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        x, cache = self.model["embed_tokens"](ids), []
        for layer in self.model["layers"]:
            q, k, v = layer.split(x, cos, sin)
            cache.append((k, v))
            x = layer.join(x, attend(q, k, v, seen))
        return cache

    def after(self, cache: list[tuple[torch.Tensor, torch.Tensor]], ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The last states of sequences that all begin with the cached one; positions (N, S), mask (N, 1, S, P + S), true where it is attended to."""
        cos, sin = self.angles(positions)
        x, n = self.model["embed_tokens"](ids), len(ids)
        for layer, (keys, values) in zip(self.model["layers"], cache):
            q, k, v = layer.split(x, cos, sin)
            k, v = torch.cat([keys.expand(n, -1, -1, -1), k], dim=2), torch.cat([values.expand(n, -1, -1, -1), v], dim=2)
            x = layer.join(x, attend(q, k, v, mask))
        return x

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One step as it is exported: attention_mask (N, P + S) is 0 at padding, past are keys and values (N, H, P, D) layer by layer."""
        cos, sin = self.angles(position_ids)
        total, count = attention_mask.shape[1], input_ids.shape[1]
        order = torch.arange(total)
        # A token sees what is not padding and does not come after it; what is attended to nowhere (a padding's row) stays finite.
        seen = (order[None, :] <= order[total - count :, None])[None, None] & (attention_mask[:, None, None, :] > 0)
        penalty = torch.where(seen, 0.0, -1e9)
        x, present = self.model["embed_tokens"](input_ids), []
        for i, layer in enumerate(self.model["layers"]):
            q, k, v = layer.split(x, cos, sin)
            k, v = torch.cat([past[2 * i], k], dim=2), torch.cat([past[2 * i + 1], v], dim=2)
            present += [k, v]
            weights = torch.softmax(q @ k.transpose(2, 3) * HEAD**-0.5 + penalty, dim=-1)
            x = layer.join(x, weights @ v)
        return self.logits(x), *present


# Training.

STEPS, SHORT_STEPS, RATE = 3200, 750, 2e-3
"""The first lists are short: what words belong together is learnt there, and counting afterwards."""
LONGEST_SUMMARY, LONGEST_SHORT = 6, 32


@dataclass
class Question:
    """A list of texts as ids, after how many of its tokens it is asked, and the answers."""

    ids: list[int]
    cuts: list[int]
    answers: list[list[int]]


class Asker:
    """Makes questions of every kind."""

    def __init__(self, texts: Texts, of: Pool):
        self.texts, self.lists, self.names = texts, Lists(of), Lists(names_of_concepts(of))

    def summary(self, rng: np.random.Generator, names: bool, short: bool, branches: int) -> Question:
        lists = self.names if names else self.lists
        if names or short:
            length = int(rng.integers(2, 7 if names else 5))
        else:
            length = int(rng.choice([10, 12, rng.integers(2, 10)], p=[0.55, 0.2, 0.25]))
        share = 1.0 if rng.random() < 0.15 else rng.uniform(0.6, 1.0)
        chosen = lists.sample(rng, lists.about(rng), length, share)
        long = float(rng.choice([0.0, 0.0, 0.15, 1.0], p=[0.6, 0.1, 0.2, 0.1]))
        written = [str(rng.choice(lists.pool.long[i])) if rng.random() < long else lists.pool.short[i] for i in chosen]
        ids, ends = [], []
        for text in written:
            ids += ([self.texts.comma] if ids else []) + self.texts.ids(" " + text)
            ends.append(len(ids))
        others = rng.permutation(length - 1)[: branches - 1] + 1 if length > 1 else []
        counts = [length, *(int(c) for c in others)]
        counts += [length] * (branches - len(counts))
        answers = [self.texts.answer(shared([lists.pool.concepts[i] for i in chosen[:count]])) for count in counts]
        question = Question(ids, [ends[count - 1] for count in counts], answers)
        return self._exchanged(rng, question) if rng.random() < 0.25 else question

    def simplification(self, rng: np.random.Generator) -> Question:
        pool = self.lists.pool
        i = int(rng.integers(len(pool.short)))
        said = pool.short[i] if rng.random() < 0.03 else str(rng.choice(pool.long[i]))
        ids = self.texts.ids(" " + said)
        question = Question(ids, [len(ids)], [self.texts.answer(pool.short[i])])
        return self._exchanged(rng, question) if rng.random() < 0.25 else question

    def _exchanged(self, rng: np.random.Generator, question: Question) -> Question:
        table = self.texts.exchange(rng)
        return Question(table[question.ids].tolist(), question.cuts, [table[a].tolist() for a in question.answers])


@dataclass
class Batch:
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    wanted: torch.Tensor
    """What each token is to be followed by, -100 where it does not matter."""


def batch_of(questions: list[Question], texts: Texts, before: int, longest: int) -> Batch:
    """Lists side by side, each followed by its branches; a branch is a turn's change and an answer, and sees the list up to its cut."""
    n, branches, turn = len(questions), len(questions[0].cuts), len(texts.turn)
    width, each = max(len(q.ids) for q in questions), turn + longest - 1
    total = width + branches * each
    ids, wanted = np.zeros((n, total), dtype=np.int64), np.full((n, total), -100, dtype=np.int64)
    limits, positions = np.empty((n, total), dtype=np.int64), np.empty((n, total), dtype=np.int64)
    limits[:, :width] = np.arange(width) + 1
    positions[:, :width] = np.arange(width)
    for row, question in enumerate(questions):
        ids[row, : len(question.ids)] = question.ids
        for b, (cut, answer) in enumerate(zip(question.cuts, question.answers)):
            start = width + b * each
            limits[row, start : start + each] = cut
            positions[row, start : start + each] = cut + np.arange(each)
            said = [*texts.turn, *answer[:-1]]
            ids[row, start : start + len(said)] = said
            wanted[row, start + turn - 1 : start + turn - 1 + len(answer)] = answer
    mask = np.ones((n, total, before + total), dtype=bool)
    mask[:, :, before : before + width] = np.arange(width) < limits[:, :, None]
    own = np.zeros((total, branches * each), dtype=bool)
    own[width:] = np.kron(np.eye(branches), np.tril(np.ones((each, each)))) > 0
    mask[:, :, before + width :] = own
    return Batch(*(torch.from_numpy(a) for a in (ids, positions + before, mask[:, None], wanted)))


def train() -> None:
    one_thread(0)
    checkpoint = Checkpoint("summarizer")
    state = checkpoint.load()
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else learn_tokenizer()
    texts, model = Texts(tokenizer), Llama()
    asker = Asker(texts, captions_of_scenes(1, 30_000, withheld=False))
    hidden = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.dim() > 1 and "embed" not in n)]
    optimizers = [
        torch.optim.Muon(hidden, lr=RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    ema, first = Ema(model, 0.998), 0
    if state:
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        ema.values, first = state["ema"], state["step"]
    openings = {k: torch.tensor([texts.ids(opening(p, e))]) for k, p, e in (
        ("simplify", SIMPLIFY, SIMPLIFY_EXAMPLES), ("summarize", SUMMARIZE, SUMMARIZE_EXAMPLES), ("again", SUMMARIZE, []),
    )}
    global attend
    Layer.split, Layer.join, attend = (torch.compile(f, dynamic=True) for f in (Layer.split, Layer.join, attend))
    log, rng = Log(50), np.random.default_rng(first)
    for step in range(first, STEPS):
        factor = rate_factor(step, STEPS)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor
        drawn, short, longest = rng.random(), step < SHORT_STEPS, LONGEST_SUMMARY
        if drawn < 0.15:
            kind, longest = "simplify", LONGEST_SHORT
            questions = [asker.simplification(rng) for _ in range(48)]
        else:
            names = drawn < 0.27
            kind = "again" if names or rng.random() < (0.8 if step < STEPS * 2 // 3 else 0.4) else "summarize"
            questions = [asker.summary(rng, names, short, branches=3 if names or short else 5) for _ in range(64 if names or short else 32)]
        before = openings[kind]
        batch = batch_of(questions, texts, before.shape[1], longest)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model.after(model.share(before), batch.ids, batch.positions, batch.mask)
            asked = batch.wanted >= 0
            logits = model.logits(states[asked])
        loss = F.cross_entropy(logits.float(), batch.wanted[asked])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model, step)
        log(step, **{kind: loss.item()})
        if (step + 1) % 250 == 0 or step + 1 == STEPS:
            checkpoint.save(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], ema=ema.values, step=step + 1, tokenizer=tokenizer.to_str())


# The exported folder.


def load() -> tuple[Llama, Tokenizer, int]:
    """The averaged weights so far; without any, untrained ones of the same layout."""
    state, model = Checkpoint("summarizer").load(), Llama()
    if not state:
        return model.eval(), learn_tokenizer(), 0
    model.load_state_dict(state["ema"])
    return model.eval(), Tokenizer.from_str(state["tokenizer"]), state["step"]


def config(tokenizer: Tokenizer) -> dict:
    end = tokenizer.token_to_id(END)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD, "hidden_act": "silu",
        "max_position_embeddings": POSITIONS, "rms_norm_eps": EPSILON, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "rope_theta": THETA,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "use_cache": True, "dtype": "float32",
        "bos_token_id": tokenizer.token_to_id(START), "eos_token_id": end, "pad_token_id": end,
    }


def to_onnx(model: Llama, file: Path) -> None:
    """One file with a cache that may be empty, in the layout of common exports; written beside and put in place at once."""
    names = [f"{i}.{n}" for i in range(LAYERS) for n in ("key", "value")]
    past = [torch.zeros(2, HEADS, 3, HEAD) for _ in names]
    inputs = (torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long), *past)
    free = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model, inputs, dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)],
        dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, tuple({0: free, 2: free} for _ in past)),
    )
    proto = program.model_proto
    strip(proto, keep_scopes=False)
    del proto.graph.value_info[:]
    whole = "past_sequence_length + sequence_length"
    for value in [*proto.graph.input, *proto.graph.output]:
        kind, dims = value.name.split(".")[0], value.type.tensor_type.shape.dim
        dims[0].dim_param = "batch_size"
        if kind in ("input_ids", "position_ids", "logits"):
            dims[1].dim_param = "sequence_length"
        elif kind == "attention_mask":
            dims[1].dim_param = whole
        else:
            dims[2].dim_param = "past_sequence_length" if kind == "past_key_values" else whole
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(proto.SerializeToString())
    part.rename(file)


def against_transformers(model: Llama, file: Path) -> None:
    """The file against the library's own model: whole prompts, left padding, and one token after a cache."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    (texts, answer), = SIMPLIFY_EXAMPLES
    turns = [("user", f"{SIMPLIFY} {', '.join(texts)}."), ("assistant", answer), ("user", f"{SIMPLIFY} a red star")]
    asked = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], add_generation_prompt=True, tokenize=False)
    if asked != rendered(SIMPLIFY, SIMPLIFY_EXAMPLES, ["a red star"]):
        raise RuntimeError(f"the chat template writes other turns than were trained: {asked!r}")
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(FOLDER)).eval()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    if unexpected or missing not in ([], ["lm_head.weight"]):
        raise RuntimeError(f"not a LlamaForCausalLM: missing {missing}, unexpected {unexpected}")
    reference.tie_weights()
    run = session(file).run
    ids = torch.tensor([tokenizer(rendered(SIMPLIFY, SIMPLIFY_EXAMPLES, [t]), add_special_tokens=False).input_ids for t in ("a red star", "a blue ring")])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = reference(ids, attention_mask=mask, position_ids=positions).logits.numpy()
    empty = {f"past_key_values.{i}.{n}": np.zeros((2, HEADS, 0, HEAD), np.float32) for i in range(LAYERS) for n in ("key", "value")}
    whole = run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **empty})
    begun = run(None, {"input_ids": ids[:, :-1].numpy(), "attention_mask": mask[:, :-1].numpy(), "position_ids": positions[:, :-1].numpy(), **empty})
    last = run(None, {
        "input_ids": ids[:, -1:].numpy(), "attention_mask": mask.numpy(), "position_ids": positions[:, -1:].numpy(), **dict(zip(empty, begun[1:])),
    })
    real = mask.numpy() > 0
    off = max(abs(whole[0] - wanted)[real].max(), abs(last[0][:, 0] - wanted[:, -1]).max())
    print(f"logits differ by at most {off:.2e} from transformers', of {abs(wanted).max():.1f}")
    if off > 1e-3:
        raise RuntimeError("the file does not answer as the library does")


def export() -> None:
    model, tokenizer, step = load()
    FOLDER.mkdir(parents=True, exist_ok=True)
    ids = config(tokenizer)
    write_json(FOLDER / "config.json", ids)
    write_json(FOLDER / "generation_config.json", {k: ids[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    write_json(FOLDER / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS, "bos_token": START, "eos_token": END, "pad_token": END,
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    })
    file = FOLDER / "onnx" / "model.onnx"
    to_onnx(model, file)
    print(f"step {step}: {file.relative_to(SKETCH)} has {file.stat().st_size / 1e6:.2f} MB")
    against_transformers(model, file)


# How well it answers.


class Answerer:
    """Asks the exported file; prompts that open alike share the cache of their opening."""

    def __init__(self, folder: Path):
        self.session = session(folder / "onnx" / "model.onnx")
        self.texts = Texts(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.past = [f"past_key_values.{i}.{n}" for i in range(LAYERS) for n in ("key", "value")]

    def run(self, ids: np.ndarray, past: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        before, (n, count) = past[0].shape[2], ids.shape
        positions = np.broadcast_to(np.arange(before, before + count), (n, count))
        feeds = {"input_ids": ids, "attention_mask": np.ones((n, before + count), np.int64), "position_ids": np.ascontiguousarray(positions)}
        logits, *present = self.session.run(None, feeds | dict(zip(self.past, past)))
        return logits[:, -1], present

    def answer(self, prompt: str, examples: list[tuple[list[str], str]], lists: list[list[str]], temperature: float, longest: int, seed: int = 0) -> list[str]:
        rng, answers = np.random.default_rng(seed), [""] * len(lists)
        empty = [np.zeros((1, HEADS, 0, HEAD), np.float32) for _ in self.past]
        _, opened = self.run(np.array([self.texts.ids(opening(prompt, examples))]), empty)
        written = [self.texts.ids(f" {', '.join(texts)}") + self.texts.turn for texts in lists]
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(written):
            by_length.setdefault(len(ids), []).append(i)
        for rows in (r[i : i + 32] for r in by_length.values() for i in range(0, len(r), 32)):
            logits, past = self.run(np.array([written[i] for i in rows]), [np.repeat(p, len(rows), axis=0) for p in opened])
            said: list[list[int]] = [[] for _ in rows]
            for _ in range(longest):
                if temperature:
                    logits = logits / temperature + rng.gumbel(size=logits.shape)
                ids = logits.argmax(-1)
                for row, i in zip(said, ids):
                    if self.texts.end not in row:
                        row.append(int(i))
                if all(self.texts.end in row for row in said):
                    break
                logits, past = self.run(ids[:, None], past)
            for i, row in zip(rows, said):
                answers[i] = self.texts.tokenizer.decode(row, skip_special_tokens=True).strip()
        return answers


def _sharing(rng: np.random.Generator, lists: Lists, count: int, share: tuple[int, int]) -> tuple[list[list[str]], list[str]]:
    """Lists of ten, in each of which some number of descriptions share a concept; and the right answers."""
    asked, right = [], []
    while len(asked) < count:
        about = lists.about(rng)
        chosen = lists.sample(rng, about, 10, rng.integers(share[0], share[1] + 1) / 10)
        concepts = [lists.pool.concepts[i] for i in chosen]
        if about and share[0] <= sum(about in c for c in concepts) <= share[1]:
            asked.append([lists.pool.short[i] for i in chosen])
            right.append(shared(concepts))
    return asked, right


def evaluate(count: int = 500, shown: int = 0) -> dict[str, float]:
    """How often the exported model gives the right answer at temperature 0.3, on scenes that no training saw. `shown` wrong answers of each kind are printed, too."""
    one_thread(0)
    figures: dict[str, float] = {}
    answerer = Answerer(FOLDER)
    # More scenes with withheld combinations than come by chance, so that each is in many of them.
    known, every = captions_of_scenes(2, 12_000, withheld=False), captions_of_scenes(3, 30_000, withheld=True)
    withheld = {c for c in every.holding if c.is_withheld()}

    def ask(what: str, lists: list[list[str]], right: list[str], prompt: str = SUMMARIZE, examples=SUMMARIZE_EXAMPLES, longest: int = LONGEST_SHORT) -> None:
        shares, wrong = [], []
        for temperature in (0.0, 0.3):
            got = answerer.answer(prompt, examples, lists, temperature, longest)
            shares.append(sum(g == r for g, r in zip(got, right)) / len(right))
            wrong += [(texts, g, r) for texts, g, r in zip(lists, got, right) if g != r]
        figures[what] = shares[1]
        print(f"{what}: {100 * shares[0]:.1f} % greedy, {100 * shares[1]:.1f} % at temperature 0.3, of {len(right)}", flush=True)
        for texts, g, r in wrong[:shown]:
            print(f"    {', '.join(texts)}\n      => {g!r}, right is {r!r}")

    rng = np.random.default_rng(0)
    for what, of, only in (("", known, None), (", withheld combinations", every, withheld)):
        rows = [i for i, held in enumerate(of.concepts) if only is None or only & set(held)]
        rows = [int(i) for i in rng.choice(rows, size=count)]
        ask(f"simplifies captions{what}", [[str(rng.choice(of.long[i]))] for i in rows], [of.short[i] for i in rows], SIMPLIFY, SIMPLIFY_EXAMPLES)
    for what, lists in (("", Lists(known)), (" of a withheld combination", Lists(every, withheld))):
        ask(f"names what 7 to 10 of 10 share{what}", *_sharing(rng, lists, count, (7, 10)))
        ask(f"names what 8 to 10 of 10 share{what}", *_sharing(rng, lists, count, (8, 10)))
    ask("answers as the rule says where 3 to 6 of 10 share", *_sharing(rng, Lists(known), count, (3, 6)))
    names = Lists(names_of_concepts(known))
    chosen = [names.sample(rng, names.about(rng), int(rng.integers(2, 6)), 0.8) for _ in range(count)]
    asked = [[names.pool.short[i] for i in c] for c in chosen]
    ask("names what short lists of concepts share, without examples", asked, [shared([names.pool.concepts[i] for i in c]) for c in chosen], SUMMARIZE, [])
    return figures


if __name__ == "__main__":
    command_line(__doc__, train=train, export=export, evaluate=evaluate)
