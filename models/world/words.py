"""The words for drawn pictures: what is seen in one, captions of it, and the names of concepts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, SIDE, WITHHELD_PATTERNS, WITHHELD_SHAPES, Fill, Scene

PLURALS = {
    "circle": "circles", "square": "squares", "triangle": "triangles",
    "star": "stars", "cross": "crosses", "ring": "rings",
}
FORMS = 4
"""Number of sentence forms that `caption` knows."""


@dataclass(frozen=True)
class Seen:
    """A thing as seen in a (part of a) picture; `shape` is None where too little of it shows to tell."""

    shape: str | None
    size: str
    fill: Fill


@dataclass(frozen=True)
class View:
    """What a picture or a crop of one shows; no background where things fill it to the edge."""

    background: Fill
    things: tuple[Seen, ...]


def look(scene: Scene, owner: np.ndarray, box: tuple[int, int, int, int] = (0, 0, SIDE, SIDE)) -> View:
    """What the box (left, top, right, bottom) of a drawn scene shows; `owner` comes from `draw.render`.

    A thing that fills the box is its background; one that shows less than half of itself is some shape or other;
    one that is hardly there is not mentioned.
    """
    left, top, right, bottom = box
    part = owner[top:bottom, left:right]
    background = scene.background
    seen: list[tuple[float, Seen]] = []
    for number, thing in enumerate(scene.things, start=1):
        shown = int((part == number).sum())
        share, of_itself = shown / part.size, shown / max(1, int((owner == number).sum()))
        if share > 0.9:
            background = thing.fill
        elif share >= 0.03 and (of_itself >= 0.6 or share >= 0.08):
            diameter = 2 * thing.radius / np.sqrt((right - left) * (bottom - top))
            size = "large" if diameter > 0.39 else "small"
            seen.append((share, Seen(thing.shape if of_itself >= 0.6 else None, size, thing.fill)))
    seen.sort(key=lambda pair: -pair[0])
    return View(background, tuple(s for _, s in seen))


def _thing(seen: Seen, sizes: bool = True) -> str:
    size = f"{seen.size} " if sizes else ""
    shape = seen.shape or "shape"
    article = "an" if not sizes and seen.fill.colour == "orange" else "a"
    text = f"{article} {size}{seen.fill.colour} {shape}"
    return f"{text} with {seen.fill.pattern}" if seen.fill.pattern else text


def _a_background(fill: Fill) -> str:
    if fill.pattern:
        return f"a background of {fill.colour} {fill.pattern}"
    return f"{'an' if fill.colour == 'orange' else 'a'} {fill.colour} background"


def form_of(view: View) -> int:
    """The sentence form of a view: any rule will do that can be seen in the picture and varies among those of one concept."""
    first = view.things[0] if view.things else None
    number = list(COLOURS).index(view.background.colour) + len(view.things)
    return (number + (1 if first and first.size == "large" else 0)) % FORMS


def caption(view: View, form: int | None = None, sizes: bool = True) -> str:
    """A caption of what is seen, in one of the sentence forms (`form_of` by default)."""
    form = form_of(view) if form is None else form
    background = _a_background(view.background)
    if not view.things:
        return (background, f"a picture of {background}", background, f"there is {background}")[form]
    things = " and ".join(_thing(s, sizes) for s in view.things)
    return (
        f"{things} on {background}",
        f"a picture of {things} on {background}",
        f"{background} with {things}",
        f"there is {things} on {background}",
    )[form]


def simplified(view: View) -> str:
    """What a caption of the view says without its unnecessary details: no sizes, one sentence form, a capital first."""
    text = caption(view, form=0, sizes=False)
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Concept:
    """What pictures may share: any of a colour, a pattern and a shape on one thing, or on the background."""

    colour: str | None = None
    pattern: str | None = None
    shape: str | None = None
    background: bool = False

    def name(self) -> str:
        """The concept in words, as a label has them."""
        words = self.colour or ""
        if self.background and not self.pattern:
            return f"{words} backgrounds"
        if self.shape:
            text = f"{words} {PLURALS[self.shape]}".strip()
            return f"{text} with {self.pattern}" if self.pattern else text
        if self.pattern:
            return f"{words} {self.pattern}".strip()
        return f"{words}-themed scenes"

    def is_withheld(self) -> bool:
        """Whether it names a combination that training must not see."""
        return (self.colour, self.pattern) in WITHHELD_PATTERNS or (self.colour, self.shape) in WITHHELD_SHAPES

    def content_words(self) -> list[str]:
        """The words that a right label must hold."""
        return [w for part in (self.colour, self.pattern, self.shape) if part for w in part.split()]


def concepts_of(view: View) -> set[Concept]:
    """Every concept that the view is an example of."""
    found = set()
    fills = [(view.background, None, True)] + [(s.fill, s.shape, False) for s in view.things]
    for fill, shape, background in fills:
        found.add(Concept(colour=fill.colour))
        if background and not fill.pattern:
            found.add(Concept(colour=fill.colour, background=True))
        if fill.pattern:
            found |= {Concept(pattern=fill.pattern), Concept(colour=fill.colour, pattern=fill.pattern)}
        if shape:
            found |= {Concept(shape=shape), Concept(colour=fill.colour, shape=shape)}
        if shape and fill.pattern:
            found |= {
                Concept(pattern=fill.pattern, shape=shape),
                Concept(colour=fill.colour, pattern=fill.pattern, shape=shape),
            }
    return found
