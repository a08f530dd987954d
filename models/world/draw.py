"""Scenes to pixels."""

from __future__ import annotations

import numpy as np

from .scene import COLOURS, SIDE, Fill, Scene, Thing

_YS, _XS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
_SHADE = 14
"""A colour varies by this much from scene to scene, of 255."""


def _soft(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel from its signed distance to the edge (negative inside): an antialiased mask."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, (n, 2) corners in order."""
    inside = np.zeros(x.shape, dtype=bool)
    nearest = np.full(x.shape, np.inf, dtype=np.float32)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - t * ex, y - ay - t * ey))
        if ay != by:
            crosses = (y < ay) != (y < by)
            inside ^= crosses & (x < ex * (y - ay) / (by - ay) + ax)
    return np.where(inside, -nearest, nearest)


def _ring_of_points(angles_deg: list[float], radii: list[float]) -> np.ndarray:
    angles = np.deg2rad(angles_deg)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


_TRIANGLE = _ring_of_points([-90, 30, 150], [1.12] * 3) + (0, 0.14)
_STAR = _ring_of_points([-90 + 36 * i for i in range(10)], [1.12, 0.46] * 5) + (0, 0.06)


def thing_mask(thing: Thing) -> np.ndarray:
    """How much of each pixel the thing covers, (SIDE, SIDE) in 0..1."""
    x, y, r = _XS - thing.x, _YS - thing.y, thing.radius
    match thing.shape:
        case "circle":
            return _soft(np.hypot(x, y) - r)
        case "square":
            return _soft(np.maximum(abs(x), abs(y)) - 0.86 * r)
        case "triangle":
            return _soft(_polygon(_TRIANGLE * r, x, y))
        case "star":
            return _soft(_polygon(_STAR * r, x, y))
        case "cross":
            arm = 0.34 * r
            across = np.maximum(abs(x) - r, abs(y) - arm)
            down = np.maximum(abs(x) - arm, abs(y) - r)
            return _soft(np.minimum(across, down))
        case "ring":
            return _soft(np.maximum(np.hypot(x, y) - r, 0.55 * r - np.hypot(x, y)))
    raise ValueError(f"no such shape: {thing.shape}")


def _wave(distance: np.ndarray, period: float) -> np.ndarray:
    """Soft bands: 1 on half of each period, 0 on the other half."""
    phase = np.mod(distance / period, 1.0)
    return np.clip((0.25 - abs(phase - 0.5)) * period + 0.5, 0, 1)


def _pattern_mask(pattern: str, rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(7.5, 8.5)
    dx, dy = rng.uniform(0, period, size=2)
    x, y = _XS + dx, _YS + dy
    match pattern:
        case "horizontal stripes":
            return _wave(y, period)
        case "vertical stripes":
            return _wave(x, period)
        case "diagonal stripes":
            return _wave((x + y) / np.sqrt(2), period)
        case "polka dots":
            pitch = period * 1.2
            return _soft(np.hypot(np.mod(x, pitch) - pitch / 2, np.mod(y, pitch) - pitch / 2) - 0.34 * pitch)
        case "checks":
            pitch = period * 1.3
            a, b = _wave(x, pitch), _wave(y, pitch)
            return a * b + (1 - a) * (1 - b)
    raise ValueError(f"no such pattern: {pattern}")


def _shade(colour: str, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.uniform(-_SHADE, _SHADE, size=3), 0, 255)


def _paint(fill: Fill, rng: np.random.Generator) -> np.ndarray:
    colour = _shade(fill.colour, rng)
    if fill.pattern is None:
        return np.broadcast_to(colour, (SIDE, SIDE, 3))
    mask = _pattern_mask(fill.pattern, rng)[..., None]
    return mask * colour + (1 - mask) * _shade("white", rng)


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene: the picture (SIDE, SIDE, 3) uint8, and which thing each pixel shows (0 the background, 1.. the things)."""
    rng = np.random.default_rng(scene.seed)
    picture = np.array(_paint(scene.background, rng), dtype=np.float64)
    owner = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for number, thing in enumerate(scene.things, start=1):
        mask = thing_mask(thing)
        picture = mask[..., None] * _paint(thing.fill, rng) + (1 - mask[..., None]) * picture
        owner[mask > 0.5] = number
    return np.rint(picture).astype(np.uint8), owner
