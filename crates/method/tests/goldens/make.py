"""Writes crops.json, draws.json and scores.json: what the crate's tests hold it against.

An implementation of the method that shares nothing with the crate: OpenCV finds the crops, NumPy and Python's own numbers do the rest,
with fractions where the crate computes in floating point.

    pip install numpy opencv-python-headless
    python make.py
"""

import hashlib
import json
import math
import struct
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).parent
# A resized value this close to the middle between two bytes may be rounded either way: OpenCV's own results with and without
# cv2.setUseOptimized differ by up to 5e-4. Which way it took is written down.
NEAR = 6e-4


def write(name, cases):
    lines = ",\n".join(json.dumps(case, separators=(",", ":"), ensure_ascii=False) for case in cases)
    text = f"[\n{lines}\n]\n"
    (HERE / name).write_text(text, encoding="utf-8")
    print(f"{name}: {len(cases)} cases, {len(text.encode())} bytes")


def short(values):
    """Numbers whose shortest decimals give the same f32 again."""
    return [float(str(v)) for v in np.asarray(values, np.float32).ravel()]


# Step 1: crops.


def noise(rng, h, w):
    return rng.normal(size=(h, w))


def sparse(rng, h, w):
    return np.maximum(rng.normal(size=(h, w)) - 0.8, 0)


def blobs(rng, h, w):
    y, x = np.mgrid[:h, :w]
    out = np.zeros((h, w))
    for _ in range(rng.integers(1, 5)):
        cy, cx, s = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0.05, 0.25) * max(h, w)
        out += rng.uniform(0.5, 2) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s * s))
    return out


def rings(rng, h, w):
    """Rings with something in their holes, and something else beside them."""
    y, x = np.mgrid[:h, :w]
    r = np.hypot(y - h * 0.4, x - w * 0.4)
    size = min(h, w)
    out = (np.abs(r - 0.33 * size) < 0.06 * size + 0.5).astype(float)
    out[r < 0.1 * size] = rng.uniform(0.7, 1)
    out[-max(1, h // 8) :, -max(1, w // 8) :] = rng.uniform(0.7, 1)
    return out


def nested(rng, h, w):
    """Squares within squares."""
    y, x = np.mgrid[:h, :w]
    depth = np.minimum(np.minimum(y, h - 1 - y), np.minimum(x, w - 1 - x))
    return (depth % rng.integers(2, 5) == 0) * rng.uniform(1, 3) + 0.0


def ties(rng, h, w):
    return rng.integers(0, 3, size=(h, w)).astype(float)


def binary(rng, h, w):
    return (rng.random((h, w)) < rng.uniform(0.2, 0.6)).astype(float)


def plateaus(rng, h, w):
    return np.round(blobs(rng, h, w) * 4) / 4


def pixel(rng, h, w):
    out = np.zeros((h, w))
    out[rng.integers(h), rng.integers(w)] = rng.uniform(0.1, 9)
    return out


def checkerboard(rng, h, w):
    y, x = np.mgrid[:h, :w]
    n = int(rng.integers(1, 4))
    return ((y // n + x // n) % 2).astype(float)


def gradient(rng, h, w):
    y, x = np.mgrid[:h, :w]
    return rng.uniform(-1, 1) * y + rng.uniform(-1, 1) * x


def diagonals(rng, h, w):
    y, x = np.mgrid[:h, :w]
    n = int(rng.integers(3, 6))
    return (((y + x) % n == 0) | ((y - x) % (n + 2) == 0)).astype(float)


def negative(rng, h, w):
    return -3 - np.abs(noise(rng, h, w))


def huge(rng, h, w):
    return np.clip(noise(rng, h, w), -3, 3) * 1.1e38


def tiny(rng, h, w):
    return np.abs(noise(rng, h, w)) * 1e-42


def constant(rng, h, w):
    return np.full((h, w), rng.uniform(-1, 1))


def boxes(rng, h, w):
    """Rectangles, some of equal size."""
    out = np.zeros((h, w))
    sides = [(int(rng.integers(1, max(2, h // 3))), int(rng.integers(1, max(2, w // 3)))) for _ in range(2)]
    for _ in range(rng.integers(3, 9)):
        a, b = sides[rng.integers(2)]
        y, x = int(rng.integers(0, max(1, h - a))), int(rng.integers(0, max(1, w - b)))
        out[y : y + a, x : x + b] = 1
    return out


KINDS = [noise, sparse, blobs, rings, nested, ties, binary, plateaus, pixel, checkerboard, gradient, diagonals, negative, huge, tiny, boxes]
SMALL = [(7, 7), (14, 14), (7, 7), (5, 9), (13, 3), (1, 12), (9, 1), (2, 2), (6, 8), (14, 10), (3, 3), (11, 17)]


def seen_of(rng, picture):
    """Which part of a picture (height, width) a network sees, as exact top, left, height, width."""
    h, w = picture
    if rng.random() < 0.4 or min(h, w) < 2:
        return Fraction(0), Fraction(0), Fraction(h), Fraction(w)
    edge = int(rng.choice([256, 232, 64]))
    crop = edge * 7 // 8
    rh, rw = (edge, edge * w // h) if h <= w else (edge * h // w, edge)
    top, left = (rh - crop) // 2, (rw - crop) // 2
    return Fraction(top * h, rh), Fraction(left * w, rw), Fraction(crop * h, rh), Fraction(crop * w, rw)


def canvas_of(seen, side):
    _, _, h, w = seen
    scale = min(Fraction(1), Fraction(side) / max(h, w))
    return tuple(max(1, math.floor(length * scale + Fraction(1, 2))) for length in (h, w))


def otsu_of(heat):
    """The lowest of the best thresholds, in whole numbers."""
    histogram = np.bincount(heat.ravel(), minlength=256).tolist()
    n, total = heat.size, sum(v * c for v, c in enumerate(histogram))
    best, threshold, variances, below, mass = Fraction(-1), None, {}, 0, 0
    for value, count in enumerate(histogram):
        below, mass = below + count, mass + value * count
        if 0 < below < n:
            difference = Fraction(mass, below) - Fraction(total - mass, n - below)
            variances[value] = Fraction(below, n) * Fraction(n - below, n) * difference**2
            if variances[value] > best:
                best, threshold = variances[value], value
    if threshold is not None:
        found = int(cv2.threshold(heat, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0])
        # OpenCV sums in floating point: among equals any may seem the best.
        assert variances[found] >= best * (1 - Fraction(1, 10**9)), (found, threshold)
    return threshold


def iou(a, b):
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda c: (c[2] - c[0]) * (c[3] - c[1])
    return overlap / (area(a) + area(b) - overlap)


def crop_case(rng, name, values, picture, side=375, alpha=4, eta=0.5, canvas_iou=0.8):
    """With no rng the network sees the whole picture."""
    values = np.asarray(values, np.float32)
    seen = seen_of(rng, picture) if rng else (Fraction(0), Fraction(0), Fraction(picture[0]), Fraction(picture[1]))
    top, left, height, width = seen
    canvas = canvas_of(seen, side)
    case = {
        "name": name,
        "map": [*values.shape],
        "values": short(values),
        "picture": [*picture],
        "seen": [float(left), float(top), float(width), float(height)],
        "parameters": {"canvas_side": side, "crops_per_image": alpha, "crop_iou": eta, "canvas_iou": canvas_iou},
        "canvas": [*canvas],
    }
    low, high = float(values.min()), float(values.max())
    if low == high:
        return case
    stretched = ((values.astype(np.float64) - low) / (high - low) * 255).astype(np.float32)
    resized = cv2.resize(stretched, canvas[::-1], interpolation=cv2.INTER_CUBIC)
    clipped = np.clip(resized, 0, 255)
    heat = np.rint(clipped).astype(np.uint8)
    doubtful = (np.abs(np.mod(clipped.astype(np.float64), 1) - 0.5) < NEAR) & (canvas != values.shape)
    case["sha256"] = hashlib.sha256(heat.tobytes()).hexdigest()
    case["near"] = [int(v) for place in np.flatnonzero(doubtful) for v in (place, heat.flat[place])]
    threshold = otsu_of(heat)
    if threshold is None:
        return case
    case["otsu"] = threshold
    contours, _ = cv2.findContours((heat > threshold).astype(np.uint8) * 255, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    regions = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        first = min((int(p[0][1]), int(p[0][0])) for p in contour)
        regions.append((first, (x, y, x + w, y + h)))
    regions.sort()
    case["regions"] = [[first[1], first[0], *box] for first, box in regions]
    kept = []
    for first, box in sorted(regions, key=lambda r: ((r[1][2] - r[1][0]) * (r[1][3] - r[1][1]), r[0]), reverse=True):
        if len(kept) < alpha and all(iou(box, k) <= eta for k in kept) and iou(box, (0, 0, canvas[1], canvas[0])) < canvas_iou:
            kept.append(box)
    case["kept"] = [[*box] for box in kept]
    case["in_picture"] = [
        [
            math.floor(left + b[0] * width / canvas[1]),
            math.floor(top + b[1] * height / canvas[0]),
            math.ceil(left + b[2] * width / canvas[1]),
            math.ceil(top + b[3] * height / canvas[0]),
        ]
        for b in kept
    ]
    return case


def crops():
    rng = np.random.default_rng(1)
    cases = []

    def add(kind, shape, picture, decimals=3, **rules):
        values = kind(rng, *shape)
        if decimals is not None and kind not in (huge, tiny):
            values = np.round(values, decimals)
        cases.append(crop_case(rng, kind.__name__, values, picture, **rules))

    side = lambda low, high: int(rng.integers(low, high))
    # A network's map on a small picture, every kind in many shapes.
    for kind in KINDS:
        for _ in range(13):
            add(kind, SMALL[side(0, len(SMALL))], (side(20, 130), side(20, 130)))
    # On a picture of common size.
    for kind in KINDS:
        for shape, picture in (((7, 7), (333, 500)), ((14, 14), (480, 360))):
            add(kind, shape, picture, None if kind is noise else 3)
    # A map of the canvas's size: every pixel is what it was, so that regions of all forms are left as they are drawn.
    for kind in (binary, nested, rings, diagonals, checkerboard, ties, boxes, sparse):
        for _ in range(8):
            shape = (side(8, 40), side(8, 40))
            cases.append(crop_case(None, kind.__name__ + " as drawn", np.round(kind(rng, *shape), 2), shape))
    # Shrunk, and large maps.
    for kind in (noise, blobs, rings, binary, boxes):
        add(kind, (28, 28), (side(8, 27), side(8, 27)), 2)
        add(kind, (56, 56), (224, 224), 2)
        add(kind, (16, 31), (640, 427), 2, side=120)
    # Other rules.
    for kind in (boxes, binary, sparse, plateaus):
        for rules in ({"alpha": 0}, {"alpha": 1}, {"alpha": 40, "eta": 0.1}, {"alpha": 40, "eta": 0.0}, {"alpha": 9, "eta": 1.0, "canvas_iou": 1.0}, {"canvas_iou": 0.3}, {"side": 1}, {"side": 33}):
            add(kind, (14, 14), (side(40, 90), side(40, 90)), **rules)
    # Nothing to find.
    for shape in ((1, 1), (7, 7), (1, 9), (5, 2)):
        add(constant, shape, (50, 60))
    add(noise, (1, 1), (50, 60))
    # A box that is exactly 4/5 of the canvas; a region in a hole, and one that its neighbour goes around on two sides only.
    values = np.zeros((10, 10))
    values[:8] = 1
    cases.append(crop_case(None, "four fifths", values, (10, 10)))
    values = np.zeros((20, 30))
    values[2:12, 2] = values[2, 2:22] = values[11, 2:22] = values[2:12, 21] = 1
    values[4:9, 5:9] = 1
    cases.append(crop_case(None, "in a hole", values, (20, 30)))
    values = np.zeros((20, 30))
    values[0, :] = values[:, 0] = 1
    values[2:10, 2:] = 1
    cases.append(crop_case(None, "in a corner", values, (20, 30)))
    assert len(cases) >= 300
    write("crops.json", cases)


# Draws.


def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def encoded(part):
    return part.encode() if isinstance(part, str) else struct.pack("<Q", part)


def key_of(*parts):
    data = b"".join(struct.pack("<Q", len(encoded(part))) + encoded(part) for part in parts)
    return struct.unpack("<II", hashlib.sha256(data).digest()[:8])


def words_of(key):
    block = 0
    while True:
        yield from philox((block, 0, 0, 0), key)
        block += 1


def uniform(word):
    return (word + 0.5) / 2**32


def noise_of(seed, concept, index, size):
    words, out = words_of(key_of("noise", seed, concept, index)), []
    while len(out) < size:
        a, b = uniform(next(words)), uniform(next(words))
        radius = math.sqrt(-2 * math.log(a))
        out += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    return out[:size]


def order_of(count, seed, layer, unit, n):
    items = list(range(count))
    if n:
        words = words_of(key_of("shuffle", seed, layer, unit, n))
        for place in range(count - 1, 0, -1):
            m = place + 1
            product = next(words) * m
            while product % 2**32 < 2**32 % m:
                product = next(words) * m
            other = product // 2**32
            items[place], items[other] = items[other], items[place]
    return items


def token_of(logits, temperature, seed, prompt, n, position):
    """None where rounding may decide."""
    logits = np.asarray(logits, np.float32).astype(np.float64)
    scaled = logits / np.float64(np.float32(temperature))
    weights = np.exp(scaled - scaled.max())
    reached = np.cumsum(weights / weights.sum())
    u = uniform(next(words_of(key_of("lm", seed, prompt, n, position))))
    if np.abs(reached - u).min() < 1e-12:
        return None
    return int(np.searchsorted(reached, u, side="right"))


def draws():
    rng = np.random.default_rng(2)
    u32 = lambda count: [int(v) for v in rng.integers(0, 2**32, size=count)]
    seeds = [0, 1, 7, 2**32, 2**64 - 1]
    texts = ["", "dog", "polka dots", "red-themed scenes", "Straße bei Nacht", "青い鳥", "layer4.2", "a\nb"]
    cases = []
    for _ in range(50):
        counter, key = u32(4), u32(2)
        cases.append({"philox": {"counter": counter, "key": key, "words": philox(counter, key)}})
    for parts in (["noise", 0, "dog", 3], ["lm", 5, "", 0, 31], ["shuffle", 2**64 - 1, "layer4", 511, 4], ["青い鳥"], [0], []):
        cases.append({"key": {"parts": parts, "words": list(key_of(*parts))}})
    for i, size in enumerate([1, 2, 3, 4, 5, 16, 31, 64, 100, 256, 256, 256]):
        seed, concept, index = seeds[i % 5], texts[i % 8], [0, 1, 9, 999][i % 4]
        cases.append({"noise": {"seed": seed, "concept": concept, "index": index, "size": size, "tail": short(noise_of(seed, concept, index, size))}})
    cases.append({"noise": {"seed": 3, "concept": "dog", "index": 2, "size": 16384, "tail": short(noise_of(3, "dog", 2, 16384)[-9:])}})
    for count in (0, 1, 2, 3, 5, 10, 10, 10, 40, 100, 1000):
        for n in (0, 1, 2, 4):
            seed, layer, unit = seeds[(count + n) % 5], texts[(count * 3 + n) % 8], int(rng.integers(0, 4096))
            cases.append({"shuffle": {"seed": seed, "layer": layer, "unit": unit, "n": n, "order": order_of(count, seed, layer, unit, n)}})
    for i in range(400):
        logits = short(np.round(rng.normal(size=[1, 2, 5, 30, 60][i % 5]) * rng.uniform(0.1, 4), 3))
        temperature = [0.3, 1.0, 0.05, 10.0][i % 4]
        seed, prompt, n, position = seeds[i % 5], texts[i % 8] * (i % 3), i % 5, int(rng.integers(0, 32))
        token = token_of(logits, temperature, seed, prompt, n, position)
        if token is not None:
            cases.append({"token": {"logits": logits, "temperature": temperature, "seed": seed, "prompt": prompt, "n": n, "position": position, "token": token}})
    write("draws.json", cases)


# Step 3: ranks and scores.


def ranks_of(activations):
    a = np.asarray(activations, np.float32)
    return 1 + (a[None, :] > a[:, None]).sum(1)


def unit(v):
    v = np.asarray(v, np.float32).astype(np.float64)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def score_case(activating, candidates, beta, t, subset, overall, scoring):
    """`candidates`: for each concept a list of None or (activation, embedding)."""
    usable = [(j, i) for j, images in enumerate(candidates) for i, image in enumerate(images) if image is not None]
    activations = [candidates[j][i][0] for j, i in usable]
    rank = dict(zip(usable, ranks_of(activations).tolist()))
    highest = [usable[p] for p in sorted(range(len(usable)), key=lambda p: -np.float32(activations[p]))]
    counted = sorted({j for j, _ in usable})
    h = {j: sorted(rank[key] for key in usable if key[0] == j) for j in counted}
    topk = {j: -sum(Fraction(r) ** 2 for r in h[j][:beta]) / min(beta, len(h[j])) for j in counted}
    scores = []
    for j in range(len(candidates)):
        if j not in h:
            scores.append(None)
            continue
        if subset == "concept_top":
            chosen = [key for key in highest if key[0] == j][:t]
        else:
            chosen = [key for key in highest[:overall] if key[0] == j]
        products = -1.0
        if chosen:
            products = float(np.mean(unit(activating) @ unit([candidates[j][i][1] for _, i in chosen]).T))
        better = sum(topk[k] > topk[j] for k in counted)
        factor = better + 1 if products < 0 else len(counted) - better
        scores.append({
            "mean": -sum(h[j]) / len(h[j]),
            "topk_squared": float(topk[j]),
            "image_products": products,
            "topk_squared_image_products": factor * products,
        })
    place = lambda j: -math.inf if scores[j] is None else round(scores[j][scoring], 12)
    return {
        "parameters": {"beta": beta, "generated_top": t, "generated_subset": subset, "overall_top": overall, "scoring": scoring},
        "activating": [short(e) for e in activating],
        "candidates": [[None if x is None else {"activation": short([x[0]])[0], "embedding": short(x[1])} for x in images] for images in candidates],
        "ranks": [[rank.get((j, i)) for i in range(len(images))] for j, images in enumerate(candidates)],
        "scores": scores,
        "order": sorted(range(len(candidates)), key=lambda j: -place(j)),
    }


def scores():
    rng = np.random.default_rng(3)
    cases = []
    for i in range(160):
        dimensions = int(rng.integers(2, 6))
        # Half of the cases have embeddings all around, so that products are negative about half of the time; half have many equal activations.
        centre = np.ones(dimensions) * (i % 2) * 1.5
        embedding = lambda: np.round(rng.normal(size=dimensions) + centre, 2) + 0.001
        activation = (lambda: float(rng.integers(-2, 4))) if i % 4 < 2 else (lambda: round(float(rng.normal()), 3))
        candidates = []
        for _ in range(1 if i % 20 == 0 else int(rng.integers(2, 8))):
            count = int(rng.integers(1, 12))
            lost = [0.0, 0.1, 0.9][int(rng.integers(3))]
            candidates.append([None if rng.random() < lost else (activation(), embedding()) for _ in range(count)])
        if i % 5 == 0:
            candidates.append(list(candidates[0]))
        activating = [embedding() for _ in range(int(rng.integers(1, 6)))]
        scoring = ["topk_squared_image_products", "mean", "topk_squared", "image_products"][i // 2 % 4]
        cases.append(score_case(activating, candidates, int(rng.integers(1, 8)), int(rng.integers(1, 8)), ["concept_top", "overall_top"][i // 3 % 2], int(rng.integers(1, 15)), scoring))
    write("scores.json", cases)


if __name__ == "__main__":
    print("OpenCV", cv2.__version__, "NumPy", np.__version__)
    crops()
    draws()
    scores()
