"""The method once more, in Python: Describe-and-Dissect on transformers, diffusers, OpenCV and Pillow.

`python tests/parity/reference.py` runs it on the sketch suite's PyTorch weights for some units of both of its targets, and writes what each step gives
to goldens/method.json. tests/tests/parity.rs holds the mesh against it. Nothing here is shared with the Rust side: not the draws, not the prompts, not
the constants.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import sketch

GOLDENS = Path(__file__).parent / "goldens" / "method.json"
SUITE = sketch.SUITE
BATCH = 64

# The keyed draws: Philox4x32-10, its key the first 8 bytes of a SHA-256 over the parts, each after its length.


def key(*parts: str | int) -> tuple[int, int]:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else struct.pack("<Q", part)
        digest.update(struct.pack("<Q", len(raw)) + raw)
    return struct.unpack("<II", digest.digest()[:8])


def philox(counter: int, keys: tuple[int, int]) -> list[int]:
    c, k, mask = [counter, 0, 0, 0], list(keys), 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def draws(keys: tuple[int, int]):
    block = 0
    while True:
        yield from philox(block, keys)
        block += 1


def fraction(word: int) -> float:
    return (word + 0.5) / 2**32


def normal_noise(seed: int, concept: str, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    stream, values = draws(key("noise", seed, concept, index)), []
    while len(values) < math.prod(shape):
        u, v = fraction(next(stream)), fraction(next(stream))
        radius = math.sqrt(-2 * math.log(u))
        values += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return torch.tensor(values[: math.prod(shape)], dtype=torch.float32).reshape(shape)


def shuffled(texts: list[str], seed: int, layer: str, unit: int, n: int) -> list[str]:
    texts = list(texts)
    if n == 0:
        return texts
    stream = draws(key("shuffle", seed, layer, unit, n))
    for last in range(len(texts) - 1, 0, -1):
        while True:
            product = next(stream) * (last + 1)
            if product % 2**32 >= 2**32 % (last + 1):
                break
        other = product >> 32
        texts[last], texts[other] = texts[other], texts[last]
    return texts


# The models.


@dataclass
class Picture:
    path: str
    image: Image.Image
    box: tuple[int, int, int, int] | None = None
    """Of a crop: left, top, right, bottom."""
    order: tuple = ()
    """Originals by their place in the set; crops after them, by parent, then box."""
    threshold: int | None = None
    activation: float = math.nan


def batches(items: list) -> list[list]:
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


class Target:
    """A network, and what of a picture it sees."""

    def __init__(self, name: str, preprocessor: dict | None):
        self.network = {"planted": sketch.planted_target, "resnet": sketch.resnet_target}[name]()
        self.name = name
        self.config = preprocessor or json.loads((SUITE / "targets" / name / "preprocessor_config.json").read_text())
        self.processor = CLIPImageProcessorPil(**{"do_center_crop": False, **self.config})

    @torch.no_grad()
    def maps(self, images: list[Image.Image], layer: str) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(self.processor(images, return_tensors="np")["pixel_values"]))
        if self.name == "planted":
            return self.network.maps(pixels)[["colour", "pattern", "mixture"].index(layer)]
        kept = {}
        handle = self.network.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.update(out=out))
        self.network(pixels)
        handle.remove()
        return kept["out"]

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, width and height in pixels of the picture."""
        if not self.config.get("do_center_crop"):
            return 0.0, 0.0, float(width), float(height)
        edge, crop = self.config["size"]["shortest_edge"], self.config["crop_size"]["width"]
        if width <= height:
            wide, high = edge, int(edge * height / width)
        else:
            wide, high = int(edge * width / height), edge
        x, y = width / wide, height / high
        return (wide - crop) // 2 * x, (high - crop) // 2 * y, crop * x, crop * y


class Captioner:
    def __init__(self):
        self.model = sketch.captioner()
        self.processor = BlipImageProcessorPil.from_pretrained(SUITE / "captioner")
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(SUITE / "captioner/tokenizer.json"))

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> tuple[str, list[int]]:
        pixels = torch.from_numpy(np.stack(self.processor([image], return_tensors="np")["pixel_values"]))
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=32, min_length=5, num_beams=1, do_sample=False)[0].tolist()
        text = self.model.config.text_config
        tokens = tokens[1:]
        tokens = tokens[: tokens.index(text.sep_token_id)] if text.sep_token_id in tokens else tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens


class LanguageModel:
    LONGEST = 32

    def __init__(self):
        self.model = sketch.language_model()
        self.tokenizer = AutoTokenizer.from_pretrained(SUITE / "summarizer")
        self.end = json.loads((SUITE / "summarizer/generation_config.json").read_text())["eos_token_id"]
        self.answers: dict[tuple, str] = {}

    def render(self, turns: list[tuple[str, str]]) -> str:
        return self.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False, add_generation_prompt=True)

    def __call__(self, prompt: str, temperature: float, seed: int, n: int) -> str:
        asked = prompt, temperature, seed, n if temperature else 0
        if asked not in self.answers:
            self.answers[asked] = self._answer(prompt, temperature, seed, n)
        return self.answers[asked]

    @torch.no_grad()
    def _answer(self, prompt: str, temperature: float, seed: int, n: int) -> str:
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        if temperature == 0:
            said = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=self.LONGEST, eos_token_id=self.end, pad_token_id=self.end,
            )[0, ids.shape[1] :].tolist()
        else:
            said, past, next_ids = [], None, ids
            while len(said) < self.LONGEST and (not said or said[-1] != self.end):
                out = self.model(next_ids, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[0, -1].double() / temperature
                chances = torch.softmax(logits, dim=0).numpy()
                u = fraction(next(draws(key("lm", seed, prompt, n, len(said)))))
                said.append(int(np.searchsorted(np.cumsum(chances), u, side="right")))
                next_ids = torch.tensor([[said[-1]]])
        return self.tokenizer.decode([t for t in said if t != self.end], skip_special_tokens=True).strip()


class Painter:
    def __init__(self):
        self.text, self.unet, self.decoder = sketch.text_encoder(), sketch.unet(), sketch.vae_decoder()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(SUITE / "diffusion/tokenizer/tokenizer.json"), pad_token="<|endoftext|>")
        self.length = self.text.config.max_position_embeddings
        self.scheduler = DPMSolverMultistepScheduler.from_config(json.loads((SUITE / "diffusion/scheduler/scheduler_config.json").read_text()))
        self.scaling = json.loads((SUITE / "diffusion/vae_decoder/config.json").read_text())["scaling_factor"]
        self.drawn: dict[tuple, list[Image.Image | None]] = {}

    @torch.no_grad()
    def states(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt").input_ids
        return self.text(input_ids=ids).last_hidden_state

    def __call__(self, concept: str, count: int, steps: int, guidance: float, seed: int) -> list[Image.Image | None]:
        asked = concept, count, steps, guidance, seed
        if asked not in self.drawn:
            self.drawn[asked] = self._draw(*asked)
        return self.drawn[asked]

    @torch.no_grad()
    def _draw(self, concept: str, count: int, steps: int, guidance: float, seed: int) -> list[Image.Image | None]:
        shape = self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size
        latents = torch.stack([normal_noise(seed, concept, i, shape) for i in range(count)])
        states = torch.cat([self.states("").repeat(count, 1, 1), self.states(f"One realistic image of {concept}").repeat(count, 1, 1)])
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            without, told = self.unet(torch.cat([latents, latents]), t, states).sample.chunk(2)
            latents = self.scheduler.step(without + guidance * (told - without), t, latents).prev_sample
        decoded = self.decoder(latents / self.scaling)
        pictures = []
        for picture in decoded:
            pixels = np.rint((picture.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)
            pictures.append(Image.fromarray(pixels) if pixels.min() != pixels.max() else None)
        return pictures


class Clip:
    def __init__(self):
        self.model = sketch.clip_model()
        self.processor = CLIPImageProcessorPil.from_pretrained(SUITE / "clip")
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(SUITE / "clip/tokenizer.json"), pad_token="<|endoftext|>")
        self.length = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(self.processor(images, return_tensors="np")["pixel_values"]))
        return self._unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        ids = self.tokenizer(texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt").input_ids
        return self._unit(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))

    @staticmethod
    def _unit(x: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(x.double(), dim=1).numpy()


# Step 1 (3.1, A.1.1).


def attention_boxes(activation_map: np.ndarray, seen: tuple[float, float, float, float]) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Otsu's threshold and the boxes in the picture (left, top, right, bottom), the largest first."""
    low, high = float(activation_map.min()), float(activation_map.max())
    if not np.isfinite(activation_map).all() or low == high:
        return []
    left, top, wide, high_ = seen
    shrink = min(1.0, 375 / max(wide, high_))
    canvas = max(1, math.floor(wide * shrink + 0.5)), max(1, math.floor(high_ * shrink + 0.5))
    scaled = ((activation_map.astype(np.float64) - low) / (high - low) * 255).astype(np.float32)
    heat = np.rint(cv2.resize(scaled, canvas, interpolation=cv2.INTER_CUBIC).clip(0, 255)).astype(np.uint8)
    if heat.min() == heat.max():
        return []
    threshold, mask = cv2.threshold(heat, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        first = min((int(p[0][1]), int(p[0][0])) for p in contour)
        found.append((w * h, *first, (x, y, x + w, y + h)))
    kept: list[tuple[int, int, int, int]] = []
    for _, _, _, box in sorted(found, key=lambda f: f[:3], reverse=True):
        if len(kept) < 4 and all(overlap(box, k) <= 0.5 for k in kept) and overlap(box, (0, 0, *canvas)) < 0.8:
            kept.append(box)
    x, y = wide / canvas[0], high_ / canvas[1]
    floor, ceil = (lambda v: math.floor(v + 1e-9)), (lambda v: math.ceil(v - 1e-9))
    return [(int(threshold), (floor(left + b[0] * x), floor(top + b[1] * y), ceil(left + b[2] * x), ceil(top + b[3] * y))) for b in kept]


def overlap(a: tuple, b: tuple) -> float:
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def highest(pictures: list[Picture], count: int) -> list[Picture]:
    return sorted((p for p in pictures if math.isfinite(p.activation)), key=lambda p: (-p.activation, p.order))[:count]


# Step 2 (3.2, A.1.2).

ONE = (
    "Only state your answer without a period and quotation marks. Do not number your answer. State one coherent and concise concept label that simplifies "
    "the following description and deletes any unnecessary details:"
)
TWO = (
    "Only state your answer without a period and quotation marks and do not simply repeat the descriptions. State one coherent and concise concept label "
    "that is 1-5 words long and can semantically summarize and represent most, not necessarily all, of the conceptual similarities in the following "
    "descriptions:"
)
SHOTS_ONE = [(["a red background with a red background and a red background with a red background."], "A red background")]
SHOTS_TWO = [
    (
        [
            "a purple background with a very soft texture.", "a brown background with a diagonal pattern of lines and lines.",
            "a white windmill with a red door and a red door in the middle of the picture.", "a beige background with a rough texture of linen.",
            "a beige background with a rough texture and a very soft texture.",
        ],
        "multicolored textiles",
    ),
    (
        [
            "a little girl is sitting in a red tractor with the word sofy on the front.", "a toy car sits on a red ottoman in a play room.",
            "a red dress with silver studs and a silver belt.", "a red chevrolet camaro is on display at a car show.",
            "a red spool of a cable with the word red on it.",
        ],
        "red-themed scenes",
    ),
]


def turns(prompt: str, shots: list[tuple[list[str], str]], texts: list[str]) -> list[tuple[str, str]]:
    said = []
    for shown, answer in shots:
        said += [("user", f"{prompt} {', '.join(shown)}"), ("assistant", answer)]
    return [*said, ("user", f"{prompt} {', '.join(texts)}")]


def tidy(text: str) -> str:
    pairs = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
    while True:
        before, text = text, text.strip()
        if len(text) > 1 and pairs.get(text[0]) == text[-1]:
            text = text[1:-1]
        text = text.removesuffix(".")
        if text == before:
            return text.lower()


def after_colon(text: str) -> str:
    return text.split(":", 1)[1] if ":" in text else text


# Step 3 (3.3, A.1.3, A.5).


def ranks(values: list[float]) -> list[int]:
    return [1 + sum(other > value for other in values) for value in values]


@dataclass
class Job:
    name: str
    target: str
    layers: list[str]
    units: list[int]
    summary: str = "mean"
    temperature: float = 0.3
    images: int = 10
    steps: int = 20
    scoring: str = "topk_squared_image_products"
    subset: str = "concept_top"
    overall: int = 10
    preprocessor: dict | None = None
    seed: int = 0
    guidance: float = 7.5

    def arguments(self) -> dict[str, str]:
        """How `dnd dissect` is told."""
        return {
            "--summary": self.summary, "--temperature": str(self.temperature), "--images-per-concept": str(self.images),
            "--num-inference-steps": str(self.steps), "--scoring": self.scoring, "--generated-subset": self.subset, "--overall-top": str(self.overall),
            "--seed": str(self.seed), "--guidance-scale": str(self.guidance),
        }


PROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 80}, "resample": 2, "do_center_crop": True, "crop_size": {"height": 64, "width": 64},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
JOBS = [
    Job("planted units by their mean, greedy", "planted", ["colour", "pattern"], [1, 4, 7, 11], temperature=0.0, images=6),
    Job("planted units by their maximum, sampled", "planted", ["mixture"], [0, 5, 9, 14, 18, 23], summary="max", temperature=1.5, images=5, steps=8, scoring="mean", seed=7),
    Job("classifier by its mean, centre crop, sampled", "resnet", ["layer4"], [3, 20, 41, 60, 77, 90], temperature=1.5, images=5, steps=8, scoring="topk_squared", preprocessor=PROCESSOR),
    Job("classifier by its maximum, greedy", "resnet", ["layer3"], [0, 13, 31, 48], summary="max", temperature=0.0, images=5, steps=8, scoring="image_products", subset="overall_top"),
    Job("classifier by its maximum, sampled", "resnet", ["layer3"], [5, 22, 40, 63], summary="max", temperature=1.2, images=5, steps=8, subset="overall_top", overall=8, guidance=3.0, seed=1),
]


@dataclass
class Method:
    """The three steps over the probing set."""

    captioner: Captioner = field(default_factory=Captioner)
    language: LanguageModel = field(default_factory=LanguageModel)
    painter: Painter = field(default_factory=Painter)
    clip: Clip = field(default_factory=Clip)

    def __post_init__(self) -> None:
        with tarfile.open(SUITE / "probing.tar") as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
        self.probing, seen = [], set()
        for path in sorted(files, key=str.encode):
            if (digest := hashlib.sha256(files[path]).digest()) not in seen:
                seen.add(digest)
                self.probing.append((path, Image.open(io.BytesIO(files[path])).convert("RGB")))
        self.captions: dict[bytes, tuple[str, list[int]]] = {}

    def run(self, job: Job) -> list[dict]:
        target = Target(job.target, job.preprocessor)
        units = []
        for layer in job.layers:
            maps = torch.cat([target.maps([image for _, image in part], layer)[:, job.units] for part in batches(self.probing)])
            g = maps.mean(dim=(2, 3)) if job.summary == "mean" else maps.amax(dim=(2, 3))
            for place, number in enumerate(job.units):
                units.append(self.unit(job, target, layer, number, g[:, place].numpy(), maps[:, place].numpy()))
                print(job.name, layer, number, units[-1].get("label"), len(units[-1].get("concepts", [])), flush=True)
        return units

    def activations(self, job: Job, target: Target, layer: str, unit: int, images: list[Image.Image]) -> list[float]:
        maps = torch.cat([target.maps(part, layer)[:, unit] for part in batches(images)])
        return (maps.mean(dim=(1, 2)) if job.summary == "mean" else maps.amax(dim=(1, 2))).tolist()

    def unit(self, job: Job, target: Target, layer: str, unit: int, g: np.ndarray, maps: np.ndarray) -> dict:
        result: dict = {"layer": layer, "unit": unit}
        finite = g[np.isfinite(g)]
        if finite.min() == finite.max():
            return result | {"state": "dead"}
        originals = [Picture(path, image, order=(0, i), activation=float(g[i])) for i, (path, image) in enumerate(self.probing)]
        top = highest(originals, 10)
        result["probed"] = [{"path": p.path, "activation": p.activation} for p in top]
        crops = []
        for picture in top:
            for place, (threshold, box) in enumerate(attention_boxes(maps[picture.order[1]], target.seen(*picture.image.size))):
                crops.append(Picture(picture.path, picture.image.crop(box), box, (1, picture.order[1], place), threshold))
        if crops:
            for crop, activation in zip(crops, self.activations(job, target, layer, unit, [c.image for c in crops])):
                crop.activation = activation
        result["crops"] = [{"path": c.path, "box": c.box, "threshold": c.threshold, "activation": c.activation} for c in crops]
        images = highest(originals + crops, 10)

        captions = [self.caption(p.image) for p in images]
        simplify = [self.language.render(turns(ONE, SHOTS_ONE, [text])) for text, _ in captions]
        simplified = [self.language(prompt, job.temperature, job.seed, 0) or text for prompt, (text, _) in zip(simplify, captions)]
        result["images"] = [
            {"path": p.path, "box": p.box, "activation": p.activation, "caption": text, "tokens": tokens, "simplified": short, "prompt": digest(prompt)}
            for p, (text, tokens), short, prompt in zip(images, captions, simplified, simplify)
        ]
        concepts, answers, prompts, again = [], [], [], []
        for n in range(5):
            prompt = self.language.render(turns(TWO, SHOTS_TWO, shuffled(simplified, job.seed, layer, unit, n)))
            answer = self.language(prompt, job.temperature, job.seed, n)
            prompts.append(digest(prompt)), answers.append(answer)
            said = after_colon(answer)
            parts = [part.strip() for part in said.split(",") if part.strip()]
            if "," in said and parts:
                prompt = self.language.render(turns(TWO, [], parts))
                said = self.language(prompt, job.temperature, job.seed, n)
                again.append(said)
                said = after_colon(said)
            concepts.append(tidy(said))
        concepts = [c for c in concepts if c]
        concepts += [f"{c} background" for c in concepts if c.split()[-1] in ("design", "designs", "graphic", "graphics")]
        candidates = list(dict.fromkeys(concepts))
        result |= {"prompts": prompts, "answers": answers + again, "candidates": candidates}
        if not candidates:
            return result | {"state": "failed", "reason": "no_concept"}
        return result | self.select(job, target, layer, unit, candidates, [p.image for p in images])

    def caption(self, image: Image.Image) -> tuple[str, list[int]]:
        asked = image.size[0].to_bytes(4, "little") + image.tobytes()
        if asked not in self.captions:
            self.captions[asked] = self.captioner(image)
        return self.captions[asked]

    def select(self, job: Job, target: Target, layer: str, unit: int, candidates: list[str], images: list[Image.Image]) -> dict:
        drawn = {c: self.painter(c, job.images, job.steps, job.guidance, job.seed) for c in candidates}
        usable = [(c, i, p) for c in candidates for i, p in enumerate(drawn[c]) if p is not None]
        activation = self.activations(job, target, layer, unit, [p for _, _, p in usable])
        rank = ranks(activation)
        real, made = self.clip.images(images), self.clip.images([p for _, _, p in usable])
        mine = {c: sorted((k for k, (other, _, _) in enumerate(usable) if other == c), key=lambda k: (-activation[k], k)) for c in candidates}
        mine = {c: ks for c, ks in mine.items() if ks}
        overall = set(sorted(range(len(usable)), key=lambda k: (-activation[k], k))[: job.overall])
        topk = {c: -float(np.mean([rank[k] ** 2 for k in ks[:5]])) for c, ks in mine.items()}
        scores = {}
        for c, ks in mine.items():
            shown = ks[:5] if job.subset == "concept_top" else [k for k in ks if k in overall]
            product = float((real @ made[shown].T).mean()) if shown else -1.0
            worse_than = sum(other > topk[c] for other in topk.values())
            factor = worse_than + 1 if product < 0 else len(mine) - worse_than
            scores[c] = {
                "mean": -float(np.mean([rank[k] for k in ks])), "topk_squared": topk[c], "image_products": product,
                "topk_squared_image_products": factor * product,
            }
        best = sorted(mine, key=lambda c: -scores[c][job.scoring])  # stable: equals stay in the candidates' order
        texts, labels = self.clip.texts(best[:3]), []
        for place in range(len(texts)):
            if all(float(texts[place] @ texts[kept]) <= 0.81 for kept in labels):
                labels.append(place)
        at = {(c, i): k for k, (c, i, _) in enumerate(usable)}
        pictures = {
            c: [{"activation": activation[at[c, i]], "rank": rank[at[c, i]]} if (c, i) in at else None for i in range(job.images)] for c in candidates
        }
        ranked = [{"concept": c, "scores": scores.get(c), "pictures": pictures[c]} for c in best + [c for c in candidates if c not in mine]]
        return {"state": "labelled", "label": best[0], "labels": [best[i] for i in labels], "concepts": ranked}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    torch.set_num_threads(2)
    method = Method()
    made = []
    for job in JOBS:
        made.append({
            "name": job.name, "target": job.target, "layers": job.layers, "units": job.units, "arguments": job.arguments(), "preprocessor": job.preprocessor,
            "scoring": job.scoring, "results": rounded(method.run(job)),
        })
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text(json.dumps(made, indent=None, separators=(",", ":"), ensure_ascii=False).replace('{"layer"', '\n{"layer"') + "\n")
