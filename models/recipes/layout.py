"""What every exported folder has besides its model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from train.common import write_json


def write_manifest(folder: Path, source: str) -> None:
    """Writes manifest.json: where the model came from, and the SHA-256 of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(folder / "manifest.json", {"source": source, "files": digests})
