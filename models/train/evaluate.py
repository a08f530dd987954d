"""Measures what is exported, on pictures and texts that no training saw, and writes the model card's table: `python -m train.evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from . import captioner, clip, diffusion, judge, resnet, summarizer
from .common import SKETCH

ROWS: dict[str, Callable[[], dict[str, float]]] = {
    "captioner: colours, patterns and shapes all right": captioner.evaluate,
    "CLIP: right caption first among 64": clip.evaluate,
    "diffusion, 20 steps: the judge finds the concept": lambda: diffusion.evaluate(20),
    "diffusion, 50 steps: the judge finds the concept": lambda: diffusion.evaluate(50),
    "language model, temperature 0.3": summarizer.evaluate,
    "ResNet: right class": resnet.evaluate,
    "the judge itself, on drawn pictures": judge.evaluate,
}
START, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def main() -> None:
    lines = ["| what | on | % |", "| --- | --- | ---: |"]
    for what, measure in ROWS.items():
        lines += [f"| {what} | {on} | {100 * value:.1f} |" for on, value in measure().items()]
    table = "\n".join(lines) + "\n"
    print("\n" + table)
    card = SKETCH / "README.md"
    before, _, rest = card.read_text().partition(START)
    card.write_text(before + START + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    sys.exit(main())
