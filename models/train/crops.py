"""Pictures as the mesh shows them to the models: whole, cut out, drawn by the diffusion model; always resized to the input's side."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter

from world.scene import COLOURS, PATTERNS, SHAPES, SIDE, WITHHELD_PATTERNS, WITHHELD_SHAPES, Fill

from .common import Box, Drawn

WHOLE: Box = (0, 0, SIDE, SIDE)


def random_box(rng: np.random.Generator) -> Box:
    """A box such as attention crops have: any place, any aspect, 14 px at least."""
    width, height = (int(v) for v in rng.integers(14, SIDE + 1, size=2))
    if rng.random() < 0.5:
        height = int(np.clip(round(width * rng.uniform(0.7, 1.4)), 14, SIDE))
    left, top = int(rng.integers(SIDE - width + 1)), int(rng.integers(SIDE - height + 1))
    return left, top, left + width, top + height


def box_around_thing(data: Drawn, i: int, rng: np.random.Generator) -> Box:
    """A box around one of the scene's things, roughly."""
    things = data.scenes[i].things
    if not things:
        return random_box(rng)
    thing = things[int(rng.integers(len(things)))]
    reach = thing.radius * rng.uniform(0.9, 1.7)
    x, y = thing.x + rng.uniform(-4, 4), thing.y + rng.uniform(-4, 4)
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    return left, top, max(left + 10, min(SIDE, int(np.ceil(x + reach)))), max(top + 10, min(SIDE, int(np.ceil(y + reach))))


def clamp(box: Box) -> Box:
    left, top, right, bottom = box
    right, bottom = min(right, SIDE), min(bottom, SIDE)
    return min(left, right - 8), min(top, bottom - 8), right, bottom


def sample(data: Drawn, i: int, rng: np.random.Generator, whole: float = 0.5, blur: float = 0.25) -> tuple[np.ndarray, Box]:
    """A picture of scene i, (SIDE, SIDE, 3) uint8, and the box of the scene that it shows: all or a crop, sometimes blurred and noisy as
    generated ones are."""
    if rng.random() < whole:
        picture, box = data.pictures[i], WHOLE
    else:
        box = clamp(box_around_thing(data, i, rng) if rng.random() < 0.5 else random_box(rng))
        left, top, right, bottom = box
        picture = np.asarray(Image.fromarray(data.pictures[i][top:bottom, left:right]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    if rng.random() < blur:
        picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1))))
        picture = np.clip(picture + rng.normal(0, rng.uniform(0, 7), picture.shape) + rng.normal(0, 6, 3), 0, 255).astype(np.uint8)
    return picture, box


def batch(data: Drawn, size: int, rng: np.random.Generator, **how) -> tuple[np.ndarray, np.ndarray, list[Box]]:
    """Pictures (size, SIDE, SIDE, 3), and the scenes and boxes that they show."""
    rows = rng.integers(len(data), size=size)
    pairs = [sample(data, int(i), rng, **how) for i in rows]
    return np.stack([p for p, _ in pairs]), rows, [b for _, b in pairs]


KINDS = (len(SHAPES) + 1, len(COLOURS), len(PATTERNS) + 1)
"""Of shapes (the last: background), colours, and patterns (the last: plain)."""


NOTHING = -100
"""What a loss leaves out."""


def some_recoloured(data: Drawn, pictures: np.ndarray, rows: np.ndarray, kinds: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Recolours some of the pictures, takes the colours out of their `what_is_where`, and says which they are."""
    done = rng.random(len(rows)) < share
    for at in np.flatnonzero(done):
        changed = recolour(data, int(rows[at]), pictures[at], rng)
        if changed is None:
            done[at] = False
        else:
            pictures[at] = changed
            kinds[at, :, 1] = NOTHING
    return done


def what_is_where(data: Drawn, rows: np.ndarray, boxes: list[Box], cells: int) -> np.ndarray:
    """For each cell of a picture's grid the shape, colour and pattern in its middle, (N, cells * cells, 3): what trains an image encoder fast."""
    middles = (np.arange(cells) + 0.5) / cells
    found = np.empty((len(rows), cells * cells, 3), np.int64)
    for kinds, i, (left, top, right, bottom) in zip(found, rows, boxes):
        scene = data.scenes[i]
        table = np.array([[len(SHAPES), *_fill(scene.background)]] + [[SHAPES.index(t.shape), *_fill(t.fill)] for t in scene.things])
        ys, xs = (top + middles * (bottom - top)).astype(int), (left + middles * (right - left)).astype(int)
        kinds[:] = table[data.owners[i][np.ix_(ys, xs)].ravel()]
    return found


def recolour(data: Drawn, i: int, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The picture of scene i in colours that have no names, to learn shapes and patterns from whatever their colour; None if this draw is of no use.

    No thing and no pattern gets a colour whose nearest named one makes a withheld combination with it, or one that hardly shows.
    """
    mix = rng.dirichlet((0.5, 0.5, 0.5), size=3) if rng.random() < 0.8 else np.tile(rng.dirichlet((1, 1, 1)), (3, 1))
    flip = rng.random(3) < 0.5 if rng.random() < 0.5 else np.zeros(3, bool)

    def changed(colours: np.ndarray) -> np.ndarray:
        mixed = colours @ mix.T
        return np.where(flip, 255 - mixed, mixed)

    scene = data.scenes[i]
    fills = [(None, scene.background), *((t.shape, t.fill) for t in scene.things)]
    after = changed(np.array([COLOURS[f.colour] for _, f in fills], float))
    white, named = changed(np.array([COLOURS["white"]], float))[0], np.array(list(COLOURS.values()), float)
    ground = (after[0] + white) / 2 if scene.background.pattern else after[0]
    for number, ((shape, fill), colour) in enumerate(zip(fills, after)):
        name = list(COLOURS)[int(np.linalg.norm(named - colour, axis=1).argmin())]
        if (name, shape) in WITHHELD_SHAPES or (name, fill.pattern) in WITHHELD_PATTERNS:
            return None
        if (number and np.linalg.norm(colour - ground) < 70) or (fill.pattern and np.linalg.norm(colour - white) < 70):
            return None
    return np.clip(changed(picture.astype(float)), 0, 255).astype(np.uint8)


def _fill(fill: Fill) -> tuple[int, int]:
    return list(COLOURS).index(fill.colour), PATTERNS.index(fill.pattern) if fill.pattern else len(PATTERNS)


def pixels(pictures: np.ndarray) -> torch.Tensor:
    """The models' input: (N, 3, SIDE, SIDE) in -1..1, as PREPROCESSOR says."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


PREPROCESSOR = {
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
