"""The probing set of the suite and its manifest: `python -m train.probing_set`."""

from __future__ import annotations

import io
import os
import tarfile

from PIL import Image

from world import draw, scene

from .common import PROBING_SEED, SKETCH, write_json

COUNT = 2000

SUITE = {
    "name": "sketch",
    "version": "1",
    "notice": "Trained on drawn pictures only: labels hold for drawn pictures of plain and patterned shapes, not for photographs.",
    "models": {"captioner": "captioner", "clip": "clip", "diffusion": "diffusion", "summarizer": "summarizer"},
    "targets": {"planted": "targets/planted/planted.onnx", "resnet": "targets/resnet/resnet.onnx"},
    "probing_set": "probing.tar",
}


def write() -> None:
    """Draws the pictures, the withheld combinations among them, into one tar file, whose bytes are the same each time."""
    path = SKETCH / "probing.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, drawn in enumerate(scene.sample_many(PROBING_SEED, COUNT, withheld=True), start=1):
            png = io.BytesIO()
            Image.fromarray(draw.render(drawn)[0]).save(png, "PNG", optimize=True)
            entry = tarfile.TarInfo(f"{number:05}.png")
            entry.size = len(png.getvalue())
            tar.addfile(entry, io.BytesIO(png.getvalue()))
    os.replace(part, path)
    write_json(SKETCH / "suite.json", SUITE)
    print(f"{path.name}: {COUNT} pictures, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    write()
