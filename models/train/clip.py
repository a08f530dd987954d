"""CLIP, small: `python -m train.clip train`, then `export`; `evaluate` measures what was exported."""

from __future__ import annotations


import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPModel

from world import words
from world.scene import SIDE

from . import crops, export, texts
from .common import SKETCH, TEST_SEED, TRAIN_SEED, Checkpoint, Ema, Log, command_line, drawn, one_thread, rate_factor, write_json

SCENES, STEPS, BATCH, RATE = 60_000, 4_000, 128, 1e-3
RECOLOURED = 0.25
"""Share of the pictures that train the image encoder alone, in colours without names, so that it knows a shape in any colour."""
FOLDER = SKETCH / "clip"


def make(vocabulary: int) -> CLIPModel:
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    vision = {"hidden_size": 144, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8, "projection_dim": 96}
    text = {
        "vocab_size": vocabulary, "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": texts.LENGTH, "projection_dim": 96, **ends,
    }
    # Heads this narrow are trained faster by plain matrix products than by the fused attention of a CPU.
    return CLIPModel._from_config(CLIPConfig(vision_config=vision, text_config=text, projection_dim=96), attn_implementation="eager")


def image_embeds(model: CLIPModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected embeddings, not normalised, and the states of the patches."""
    out = model.vision_model(pixel_values=pixels)
    return model.visual_projection(out.pooler_output), out.last_hidden_state[:, 1:]


def text_embeds(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """The projected embeddings, not normalised."""
    return model.text_projection(model.text_model(input_ids=ids).pooler_output)


class Said:
    """What is said of each view of a batch, and of which other views it holds too."""

    def __init__(self, views: list[words.View], rng: np.random.Generator):
        self.texts = []
        alike = [words.simplified(v) for v in views]
        shown = [{c.name() for c in words.concepts_of(v)} for v in views]
        self.true = np.zeros((len(views), len(views)), bool)
        for i, view in enumerate(views):
            if rng.random() < 0.35:
                text = texts.concept_text(view, rng)
                self.true[i] = [text in s for s in shown]
            else:
                text = texts.caption_text(view, rng)
                self.true[i] = [a == alike[i] for a in alike]
            self.texts.append(texts.PREFIX + text if rng.random() < 0.25 else text)


def train() -> None:
    one_thread(4)
    data = drawn(TRAIN_SEED, SCENES)
    tokenizer = texts.clip_tokenizer(texts.corpus(data))
    model = make(tokenizer.get_vocab_size())
    heads = nn.Linear(model.config.vision_config.hidden_size, sum(crops.KINDS))
    parameters = [*model.parameters(), *heads.parameters()]
    print({"vision": sum(p.numel() for p in model.vision_model.parameters()), "text": sum(p.numel() for p in model.text_model.parameters())}, flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.02, betas=(0.9, 0.98))
    ema, first, checkpoint = Ema(model), 0, Checkpoint("clip")
    if state := checkpoint.load():
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        heads.load_state_dict(state["heads"])
        ema.values, first = state["ema"], state["step"]
    log, rng = Log(), np.random.default_rng(first)
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(step, STEPS)
        pictures, rows, boxes = crops.batch(data, BATCH, rng, whole=0.6)
        said = Said([data.view(i, box) for i, box in zip(rows, boxes)], rng)
        kinds = crops.what_is_where(data, rows, boxes, SIDE // 8)
        recoloured = torch.from_numpy(crops.some_recoloured(data, pictures, rows, kinds, RECOLOURED, rng))
        kinds = torch.from_numpy(kinds)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, patches = image_embeds(model, crops.pixels(pictures))
            written = text_embeds(model, torch.from_numpy(texts.encode(tokenizer, said.texts)))
            guesses = heads(patches).float().split(crops.KINDS, dim=-1)
        images, written = nn.functional.normalize(images.float(), dim=1), nn.functional.normalize(written.float(), dim=1)
        scores = model.logit_scale.exp().clamp(max=100) * written @ images.T
        # What holds of another picture too is neither right nor wrong for it; no text is about a recoloured one.
        scores = scores.masked_fill(torch.from_numpy(said.true) & ~torch.eye(BATCH, dtype=torch.bool), -torch.inf)[~recoloured][:, ~recoloured]
        right = torch.arange(len(scores))
        apart = (nn.functional.cross_entropy(scores, right) + nn.functional.cross_entropy(scores.T, right)) / 2
        where = sum(nn.functional.cross_entropy(g.flatten(0, 1), kinds[..., k].flatten()) for k, g in enumerate(guesses))
        loss = apart + 0.7 * where
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update(model, step)
        log(step, apart=apart.item(), where=where.item(), scale=model.logit_scale.exp().item())
        if (step + 1) % 250 == 0:
            checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.values, step=step + 1, tokenizer=tokenizer.to_str(), heads=heads.state_dict())


class Vision(nn.Module):
    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return image_embeds(self.model, pixel_values)[0]


class Text(nn.Module):
    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return text_embeds(self.model, input_ids)


def load() -> tuple[CLIPModel, Tokenizer]:
    state = Checkpoint("clip").load()
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    model = make(tokenizer.get_vocab_size())
    model.load_state_dict(state["ema"])
    print("clip after", state["step"], "steps")
    return model.eval(), tokenizer


def export_all() -> None:
    model, tokenizer = load()

    def ids(batch: int) -> dict[str, torch.Tensor]:
        said = ["a red circle", "polka dots", "a picture of a large blue star and a small pink ring on a background of gray checks"]
        return {"input_ids": torch.from_numpy(texts.encode(tokenizer, (said * batch)[:batch]))}

    def pixels(batch: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(batch, 3, SIDE, SIDE)}

    batched = {0: "batch"}
    vision, text = FOLDER / "onnx/vision_model.onnx", FOLDER / "onnx/text_model.onnx"
    export.export(Vision(model), vision, pixels(2), ["image_embeds"], {"pixel_values": batched, "image_embeds": batched})
    export.export(Text(model), text, ids(2), ["text_embeds"], {"input_ids": batched, "text_embeds": batched})
    for batch in (1, 3, 8):
        export.check(Vision(model), vision, pixels(batch))
        export.check(Text(model), text, ids(batch))
    write_json(FOLDER / "config.json", model.config.to_diff_dict() | {"architectures": ["CLIPModel"]})
    write_json(FOLDER / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **crops.PREPROCESSOR, "do_center_crop": False, "do_convert_rgb": True})
    texts.save_clip_tokenizer(tokenizer, FOLDER)


class Clip:
    """The exported model: unit-length embeddings."""

    def __init__(self):
        self.vision, self.text = export.session(FOLDER / "onnx/vision_model.onnx"), export.session(FOLDER / "onnx/text_model.onnx")
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def images(self, pictures: np.ndarray) -> np.ndarray:
        return _unit(self.vision.run(None, {"pixel_values": crops.pixels(pictures).numpy()})[0])

    def texts(self, said: list[str]) -> np.ndarray:
        return _unit(self.text.run(None, {"input_ids": texts.encode(self.tokenizer, said)})[0])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def evaluate(count: int = 4000, among: int = 64) -> dict[str, float]:
    """How often a picture's own caption is the nearest of 64 different ones, on scenes that training never saw."""
    data, clip = drawn(TEST_SEED, count, withheld=True), Clip()
    views = [data.view(i) for i in range(count)]
    figures: dict[str, list[bool]] = {"all": [], "withheld combinations": []}
    group: list[int] = []
    seen: set[str] = set()
    for i, view in enumerate(views):
        if words.caption(view) in seen:
            continue
        group.append(i), seen.add(words.caption(view))
        if len(group) == among:
            scores = clip.images(data.pictures[group]) @ clip.texts([words.caption(views[j]) for j in group]).T
            for row, j in enumerate(group):
                first = bool(scores[row].argmax() == row)
                figures["all"].append(first)
                if any(c.is_withheld() for c in words.concepts_of(views[j])):
                    figures["withheld combinations"].append(first)
            group, seen = [], set()
    for k, v in figures.items():
        print(f"clip, right caption first among {among}, {k}: {100 * np.mean(v):.1f} % of {len(v)}")
    return {k: float(np.mean(v)) for k, v in figures.items()}


if __name__ == "__main__":
    command_line(__doc__, train=train, export=export_all, evaluate=evaluate)
