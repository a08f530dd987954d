"""What all trainings share: folders, drawn data, checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from world import draw, scene, words

MODELS = Path(__file__).resolve().parent.parent
WORK = MODELS / ".work"
"""Checkpoints, caches and logs; not committed."""
SKETCH = MODELS / "sketch"
"""The exported suite."""

TRAIN_SEED, TEST_SEED, PROBING_SEED = 1, 2, 3
"""Of the scenes: what models are trained on, what their figures are measured on, the probing set. No two share a picture."""

Box = tuple[int, int, int, int]


@dataclass
class Drawn:
    """Drawn scenes: pictures (N, 64, 64, 3) uint8, owners (N, 64, 64) uint8, and the scenes themselves."""

    scenes: list[scene.Scene]
    pictures: np.ndarray
    owners: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)

    def view(self, i: int, box: Box = (0, 0, scene.SIDE, scene.SIDE)) -> words.View:
        return words.look(self.scenes[i], self.owners[i], box)


def drawn(seed: int, count: int, withheld: bool = False) -> Drawn:
    """Draws scenes, once: they are kept in WORK."""
    WORK.mkdir(exist_ok=True)
    path = WORK / f"drawn-{seed}-{count}-{int(withheld)}.pkl"
    if path.exists():
        return pickle.loads(path.read_bytes())
    scenes = scene.sample_many(seed, count, withheld)
    rendered = [draw.render(s) for s in scenes]
    data = Drawn(scenes, np.stack([p for p, _ in rendered]), np.stack([o for _, o in rendered]))
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps(data, protocol=5))
    part.rename(path)
    return data


def one_thread(seed: int) -> None:
    """Several trainings share the machine: each takes one thread; equal seeds give equal models."""
    torch.set_num_threads(int(os.environ.get("TRAIN_THREADS", "1")))
    torch.manual_seed(seed)
    # Gradients that have all but vanished would be worked out ten times slower.
    torch.set_flush_denormal(True)


def command_line(usage: str | None, **commands: Callable) -> None:
    """Runs the command that the program was started with, on the words after it; numbers are numbers."""
    name, *words = sys.argv[1:] or [""]
    if name not in commands:
        sys.exit(usage)
    commands[name](*(int(word) if word.isdigit() else word for word in words))


class Checkpoint:
    """Keeps a training's state in WORK, so that it goes on where it stopped."""

    def __init__(self, name: str):
        WORK.mkdir(exist_ok=True)
        self.path = WORK / f"{name}.pt"

    def load(self) -> dict | None:
        return torch.load(self.path, weights_only=False) if self.path.exists() else None

    def save(self, **state) -> None:
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.path)


class Ema:
    """A moving average of a module's parameters, which draws and captions better than the last step's."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999):
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for k, v in module.state_dict().items():
            if v.dtype.is_floating_point:
                self.values[k].lerp_(v, 1 - decay)
            else:
                self.values[k].copy_(v)


class Log:
    """Prints a line now and then: the step, its rate, and smoothed figures."""

    def __init__(self, every: int = 100):
        self.every, self.start, self.first, self.mean = every, time.time(), None, {}

    def __call__(self, step: int, **figures: float) -> None:
        self.first = step if self.first is None else self.first
        for k, v in figures.items():
            self.mean[k] = 0.98 * self.mean.get(k, v) + 0.02 * v
        if step % self.every == 0:
            rate = (time.time() - self.start) / max(1, step - self.first)
            print(f"step {step}  {rate:.3f} s/step  " + "  ".join(f"{k} {v:.4f}" for k, v in self.mean.items()), flush=True)


def rate_factor(step: int, total: int, warm_up: int = 200) -> float:
    """A learning rate's factor: up over the warm-up, level, and down to nothing over the last fifth."""
    return min((step + 1) / warm_up, 1.0, max(0.0, (total - step) / (0.2 * total)))


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
