"""What every recipe leaves beside a model: `manifest.json`, which says where the model comes from and what each file's digest is."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from train.common import write_json

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "transformers", "onnx")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, source: str) -> None:
    """Writes the manifest of all files in a folder and below: their sizes in bytes and SHA-256. `source` is the model's name, or what it was made from; no path of this machine."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    write_json(folder / MANIFEST, {
        "source": source,
        "made_with": {library: version(library) for library in LIBRARIES},
        "files": {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths},
    })
