"""The keyed noise of a diffusion model's pictures, written once more (see crates/method/src/draw.rs for what it has to be)."""

from __future__ import annotations

import hashlib

import numpy as np


def _philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (block, 0, 0, 0): four words a block."""
    low = np.uint64(0xFFFFFFFF)
    c = [counters.astype(np.uint64), *(np.zeros(len(counters), np.uint64) for _ in range(3))]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1)


def noise(seed: int, concept: str, index: int, draw: int, size: int) -> np.ndarray:
    """`size` standard normal values, float32: draw 0 is the latents that a picture starts from, draw n the noise that is added after step n."""
    digest = hashlib.sha256()
    for part in (b"noise", seed.to_bytes(8, "little"), concept.encode(), index.to_bytes(8, "little")):
        digest.update(len(part).to_bytes(8, "little") + part)
    key = int.from_bytes(digest.digest()[:4], "little"), int.from_bytes(digest.digest()[4:8], "little")
    blocks = -(-size // 4)
    words = _philox(np.arange(draw * blocks, (draw + 1) * blocks), key).reshape(-1, 2)
    a, b = ((words + 0.5) / 2**32).T
    radius = np.sqrt(-2 * np.log(a))
    return np.stack([radius * np.cos(2 * np.pi * b), radius * np.sin(2 * np.pi * b)], axis=1).reshape(-1)[:size].astype(np.float32)
