"""Writes docs/parity.md: what was measured of each engine beside its library. `python tests/parity/table.py FOLDER`, the folder that `make parity` fills."""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/parity.md"
TITLES = {
    "captions": "Captions", "diffusion": "Diffusion", "diffusion/512": "Diffusion, pictures of 512 px", "clip": "CLIP", "language": "Language models", "language/tokenizers": "Tokenizers", "pictures": "Pictures",
    "targets": "Targets",
}
HEAD = """# Parity

Made by `make parity`; do not edit. A label is worth something only if the models behave here as they do in the libraries that they come from. Each
line below is a model at the size of its published configuration that ran on both sides, on the same inputs. Weights are drawn from a seed and scaled so that
what comes out differs from input to input, except where "real weights" stands. The control is the same comparison with something made wrong, which
must show.

That the method itself is the paper's is held by `tests/tests/parity.rs`: {units} units of the sketch suite's two targets, by the mean and the maximum of
their maps, by every scoring function, against `tests/parity/reference.py`, which is the method once more on transformers, diffusers, OpenCV and Pillow. Top pictures, boxes,
thresholds, captions, tokens, prompts, answers, candidates, ranks and labels are equal; activations are within 1e-5 (of drawn pictures 1e-3) of the largest,
image products within 1e-4.
"""


def main(folder: Path) -> None:
    method = json.loads((Path(__file__).parent / "goldens/method.json").read_text())
    text = HEAD.format(units=sum(len(job["results"]) for job in method))
    for name, title in TITLES.items():
        measured = folder / name / "measured.json"
        if not measured.exists():
            continue
        text += f"\n## {title}\n\n| what | reference | measured | limit | control |\n|---|---|---|---|---|\n"
        for row in json.loads(measured.read_text()):
            text += "| " + " | ".join(row[k].replace("|", "\\|") for k in ("what", "reference", "measured", "limit", "control")) + " |\n"
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
