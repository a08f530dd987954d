"""The judge of what a picture shows, for measuring what the diffusion model draws: `python -m train.judge train`, then `evaluate`.

A small convolutional network that says for every concept whether it is in the picture. It is no part of the suite, shares nothing with its models but
the drawn world, and, being a measure, has seen the withheld combinations too.
"""

from __future__ import annotations


import numpy as np
import torch
from torch import nn

from world import words
from world.scene import COLOURS, PATTERNS, SHAPES

from . import crops
from .common import Checkpoint, Ema, Log, command_line, drawn, one_thread, rate_factor

SEED, TEST = 71, 72
SCENES, STEPS, BATCH, RATE = 60_000, 4_000, 64, 2e-3

CONCEPTS = (
    [words.Concept(colour=c) for c in COLOURS]
    + [words.Concept(colour=c, background=True) for c in COLOURS]
    + [words.Concept(pattern=p) for p in PATTERNS]
    + [words.Concept(shape=s) for s in SHAPES]
    + [words.Concept(colour=c, pattern=p) for c in COLOURS if c != "white" for p in PATTERNS]
    + [words.Concept(colour=c, shape=s) for c in COLOURS for s in SHAPES]
)
INDEX = {concept: i for i, concept in enumerate(CONCEPTS)}


def make() -> nn.Module:
    def stage(into: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *stage(3, 16, 2), *stage(16, 32, 1), *stage(32, 48, 2), *stage(48, 80, 1), *stage(80, 112, 2), *stage(112, 144, 1), *stage(144, 144, 1),
        nn.Conv2d(144, 320, 1), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(320, len(CONCEPTS)),
    )


def truth(view: words.View) -> np.ndarray:
    """1 for every concept that the view is an example of."""
    row = np.zeros(len(CONCEPTS), np.float32)
    row[[INDEX[c] for c in words.concepts_of(view) if c in INDEX]] = 1
    return row


def train() -> None:
    one_thread(2)
    data = drawn(SEED, SCENES, withheld=True)
    truths = np.stack([truth(data.view(i)) for i in range(len(data))])
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    ema, first, checkpoint = Ema(model), 0, Checkpoint("judge")
    if state := checkpoint.load():
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        ema.values, first = state["ema"], state["step"]
    log, rng = Log(), np.random.default_rng(first)
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(step, STEPS)
        pictures, rows, _ = crops.batch(data, BATCH, rng, whole=1.0, blur=0.4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(crops.pixels(pictures))
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), torch.from_numpy(truths[rows]), reduction="none").sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(model, step)
        log(step, loss=loss.item())
        if (step + 1) % 500 == 0:
            checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.values, step=step + 1)


class Judge:
    def __init__(self):
        self.model = make()
        self.model.load_state_dict(Checkpoint("judge").load()["ema"])
        self.model.eval()

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """How sure it is of each of CONCEPTS, (N, len(CONCEPTS)) in 0..1, for pictures (N, 64, 64, 3) uint8."""
        return torch.cat([self.model(crops.pixels(p)).sigmoid() for p in np.array_split(pictures, -(-len(pictures) // 64))]).numpy()

    def shows(self, pictures: np.ndarray, concept: words.Concept) -> np.ndarray:
        """Whether each picture shows the concept."""
        return self(pictures)[:, INDEX[concept]] > 0.5


def evaluate(count: int = 2000) -> dict[str, float]:
    """How far the judge can be trusted: on drawn pictures that it never saw."""
    data, judge = drawn(TEST, count, withheld=True), Judge()
    said = judge(data.pictures) > 0.5
    want = np.stack([truth(data.view(i)) for i in range(count)]) > 0.5
    pairs = np.array([bool(c.colour and (c.pattern or c.shape)) for c in CONCEPTS])
    withheld = np.array([c.is_withheld() for c in CONCEPTS])
    figures = {
        "all concepts of a picture right": float((said == want).all(1).mean()),
        "pairs found": float(said[:, pairs][want[:, pairs]].mean()),
        "pairs found, withheld combinations": float(said[:, withheld][want[:, withheld]].mean()),
        "pairs said that are there": float(want[:, pairs][said[:, pairs]].mean()),
    }
    for k, v in figures.items():
        print(f"judge, {k}: {100 * v:.1f} %")
    return figures


if __name__ == "__main__":
    command_line(__doc__, train=train, evaluate=evaluate)
