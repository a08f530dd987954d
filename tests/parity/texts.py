"""Texts of many scripts to try tokenizers on, and digests of what comes of them."""

from __future__ import annotations

import hashlib
import random
import struct

BLOCKS = [
    (0x0021, 0x007E), (0x00A1, 0x024F), (0x0370, 0x03FF), (0x0400, 0x04FF), (0x0531, 0x0586), (0x05D0, 0x05EA), (0x0620, 0x064A), (0x0905, 0x0939),
    (0x0E01, 0x0E30), (0x10D0, 0x10FF), (0x1100, 0x1112), (0x1E00, 0x1EFF), (0x1F00, 0x1F15), (0x2010, 0x2027), (0x20A0, 0x20BF), (0x2100, 0x214F),
    (0x2190, 0x21FF), (0x2460, 0x24FF), (0x2500, 0x257F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFB00, 0xFB06),
    (0xFF01, 0xFF5E), (0x10330, 0x1034A), (0x1D400, 0x1D433), (0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x20000, 0x200FF),
]
MARKS = [*range(0x0300, 0x0316), 0x0327, 0x093E, 0x094D, 0x064E, 0x05B0, 0x3099, 0x200D, 0xFE0F]
SPACES = " \t\n\r\v\f\u00a0\u1680\u2003\u2028\u200b\u3000\ufeff\u0085"
CONTROLS = "\x00\x01\x1b\x1c\x7f\x80\u202a\u202e\u2066\u2069\ufffd\u00ad"
WORDS = (
    "a the of red background photograph Straße naïve don't they're I'll we've O'Neill U.S.A. 3.14 1,000 e-mail user@host.net <|endoftext|> [CLS] [MASK] "
    "<|im_start|> ##ing x² ½ Ⅳ ﬁne İstanbul ǅ ΣΑΣ café cafe\u0301 Łódź 東京 서울 مرحبا שלום привет नमस्ते สวัสดี 👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ \u1e9b\u0323 I\u0307 "
    "&amp; &lt; http://a.b/c?d=e --- ... !? 'quoted' \"double\" `tick` snake_case CamelCase 2026-11-25 $5 50% #tag"
).split(" ")


def texts(count: int = 5000, seed: int = 0) -> list[str]:
    rng = random.Random(seed)

    def block() -> str:
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))

    def marked() -> str:
        return "".join(c + "".join(chr(rng.choice(MARKS)) for _ in range(rng.randint(0, 2))) for c in block())

    def piece() -> str:
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(WORDS)
        if kind < 0.75:
            return block()
        if kind < 0.85:
            return marked()
        return rng.choice(CONTROLS) if kind < 0.9 else str(rng.randint(0, 10 ** rng.randint(1, 9)))

    def text() -> str:
        space = lambda: " " if rng.random() < 0.7 else rng.choice(SPACES) * rng.randint(0, 3)  # noqa: E731
        return "".join(p + space() for p in (piece() for _ in range(rng.randint(1, 5))))

    made = ["", " ", "  \n\t ", "a" * 101, "é" * 100, "字" * 60, "a" * 300 + " b", "'" * 20, "<|endoftext|>" * 3, "[SEP][PAD] [UNK]", "\x00"]
    made.append("e" + "\u0301" * 30)
    return made + [text() for _ in range(count - len(made))]


def digest(parts: list[list[int]] | list[str]) -> str:
    """Of lists of ids, or of texts, each with its length before it."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else b"".join(struct.pack("<I", i) for i in part)
        sha.update(struct.pack("<Q", len(data)) + data)
    return sha.hexdigest()[:16]
