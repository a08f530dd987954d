"""What a drawn picture may hold: colours, patterns, shapes, and scenes sampled from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 64
"""Side of a picture in pixels. All lengths of a scene are in these pixels."""

COLOURS = {
    "red": (220, 38, 38),
    "orange": (247, 140, 28),
    "yellow": (250, 222, 50),
    "green": (46, 158, 68),
    "blue": (45, 85, 225),
    "purple": (128, 52, 180),
    "pink": (250, 150, 195),
    "brown": (128, 78, 42),
    "black": (22, 22, 22),
    "white": (246, 246, 246),
    "gray": (142, 142, 142),
}
PATTERNS = ("horizontal stripes", "vertical stripes", "diagonal stripes", "polka dots", "checks")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (7.5, 10.0), "large": (14.5, 19.0)}
"""Radius of the circle that a shape is drawn in, lowest and highest."""

WITHHELD_PATTERNS = frozenset({
    ("red", "vertical stripes"), ("blue", "polka dots"), ("green", "checks"),
    ("purple", "horizontal stripes"), ("orange", "diagonal stripes"), ("pink", "checks"),
})
WITHHELD_SHAPES = frozenset({
    ("yellow", "star"), ("red", "ring"), ("blue", "triangle"),
    ("green", "circle"), ("purple", "cross"), ("brown", "square"),
})
"""Combinations that no model of the suite sees in training, neither drawn nor written."""


@dataclass(frozen=True)
class Fill:
    """One colour, or a pattern of it on white."""

    colour: str
    pattern: str | None = None


@dataclass(frozen=True)
class Thing:
    """A shape in the picture, centred at (x, y)."""

    shape: str
    size: str
    fill: Fill
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background with up to three things on it; `seed` fixes the shades and where the patterns start."""

    background: Fill
    things: tuple[Thing, ...]
    seed: int


def is_withheld(scene: Scene) -> bool:
    """Whether the scene shows a combination that training must not see."""
    fills = [scene.background, *(t.fill for t in scene.things)]
    return any((f.colour, f.pattern) in WITHHELD_PATTERNS for f in fills) or any(
        (t.fill.colour, t.shape) in WITHHELD_SHAPES for t in scene.things
    )


def _fill(rng: np.random.Generator, patterned: float, without: set[str]) -> Fill:
    pattern = str(rng.choice(PATTERNS)) if rng.random() < patterned else None
    # Patterns are drawn on white, so white itself has none.
    barred = without | ({"white"} if pattern else set())
    colour = str(rng.choice([c for c in COLOURS if c not in barred]))
    return Fill(colour, pattern)


def _place(rng: np.random.Generator, radius: float, placed: list[Thing]) -> tuple[float, float] | None:
    for _ in range(20):
        x, y = rng.uniform(radius + 1, SIDE - radius - 1, size=2)
        if all(np.hypot(x - t.x, y - t.y) > radius + t.radius + 2 for t in placed):
            return float(x), float(y)
    return None


def sample(rng: np.random.Generator, withheld: bool = False) -> Scene:
    """Draws a scene; one with a withheld combination only if `withheld` allows it."""
    while True:
        background = _fill(rng, 0.35, set())
        barred = {background.colour}
        if background.pattern:
            barred.add("white")
        things: list[Thing] = []
        for _ in range(int(rng.choice(4, p=(0.12, 0.48, 0.27, 0.13)))):
            size = "large" if rng.random() < 0.6 else "small"
            # Not told apart: a pattern on a pattern, one that starts with white on white, one of which a small shape shows a corner.
            plain_only = size == "small" or background.pattern is not None or background.colour == "white"
            fill = _fill(rng, 0.0 if plain_only else 0.55, barred)
            radius = float(rng.uniform(*SIZES[size]))
            spot = _place(rng, radius, things)
            if spot:
                things.append(Thing(str(rng.choice(SHAPES)), size, fill, *spot, radius))
        scene = Scene(background, tuple(things), int(rng.integers(2**31)))
        if withheld or not is_withheld(scene):
            return scene


def sample_many(seed: int, count: int, withheld: bool = False) -> list[Scene]:
    """Draws `count` scenes; equal seeds give equal scenes."""
    rng = np.random.default_rng(seed)
    return [sample(rng, withheld) for _ in range(count)]
