"""Stable Diffusion's parts, small: `python -m train.diffusion train`, then `export`; `sheet FILE` draws a contact sheet, `evaluate` asks the judge.

The autoencoder is solved, not trained: 4 x 4 px patches and the leading principal components of their values. Text encoder and UNet are
trained together, with classifier-free guidance, to predict velocity on a cosine schedule, whose last step is pure noise: on a schedule
that is not, small pictures leak their mean colour into it, and drawn colours drift.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from world import words

from . import export, texts
from .common import SKETCH, TRAIN_SEED, WORK, Checkpoint, Drawn, Ema, Log, command_line, drawn, one_thread, rate_factor, write_json

PATCH, CHANNELS, WIDTH = 4, 16, 96
BEND = 0.8
SCENES, STEPS, BATCH, RATE = 60_000, 14_000, 64, 1e-3
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
NAME = "denoiser"
FOLDER = SKETCH / "diffusion"


def to_patches(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) in -1..1 to (N, 48, 16, 16)."""
    return nn.functional.pixel_unshuffle(pictures, PATCH)


class Autoencoder(nn.Module):
    """Principal components of patches. Each component is scaled by the root of its deviation: the leading ones, the mean colours, keep the
    larger variance and are settled first when noise is taken away."""

    def __init__(self, components: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.register_buffer("components", components)  # (CHANNELS, 48)
        self.register_buffer("mean", mean)  # (48,)
        self.register_buffer("scale", scale)  # (CHANNELS,)

    @classmethod
    def solve(cls, pictures: torch.Tensor) -> Autoencoder:
        patches = to_patches(pictures).permute(0, 2, 3, 1).reshape(-1, 3 * PATCH * PATCH).double()
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
        values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
        print(f"{CHANNELS} components keep {100 * values.sum() / torch.cov((patches - mean).T).trace():.2f} % of the variance")
        deviation = values.sqrt()
        scale = deviation.pow(-0.5)
        scale = scale / (deviation * scale).square().mean().sqrt()
        return cls(vectors.T.float(), mean.float(), scale.float())

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        x = to_patches(pictures) - self.mean[:, None, None]
        return nn.functional.conv2d(x, (self.components * self.scale[:, None])[:, :, None, None])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv2d(latents, (self.components / self.scale[:, None]).T[:, :, None, None], self.mean)
        # Guidance leads beyond what pictures hold. A trained decoder would not follow it all the way: here the last fifth of the range is bent.
        bent = x.sign() * (BEND + (1 - BEND) * torch.tanh((x.abs() - BEND) / (1 - BEND)))
        return nn.functional.pixel_shuffle(torch.where(x.abs() > BEND, bent, x), PATCH)


def make(vocabulary: int) -> nn.ModuleDict:
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2, num_attention_heads=4, attn_implementation="eager",
        max_position_embeddings=texts.LENGTH, projection_dim=WIDTH, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    ))
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(40, 72, 96), layers_per_block=1, mid_block_type=None,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=8, use_linear_projection=True,
    )
    # Heads this narrow are trained twice as fast by plain matrix products as by the fused attention of a CPU.
    unet.set_attn_processor(AttnProcessor())
    return nn.ModuleDict({"text": text, "unet": unet})


KINDS = {"colour pattern": 5, "colour shape": 9, "background": 1, "colour": 1, "pattern": 1, "shape": 3, "pattern shape": 1, "colour pattern shape": 3}
"""How often a concept of each kind is asked for; outlines are what is learnt last."""


class Examples:
    """For every concept the scenes that show it, those more often in which it fills more of the picture and of what is in it."""

    def __init__(self, data: Drawn):
        weights: dict[words.Concept, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for i, scene in enumerate(data.scenes):
            areas = np.bincount(data.owners[i].ravel(), minlength=len(scene.things) + 1) / data.owners[i].size
            things = max(1e-6, float(areas[1:].sum()))
            whole = words.View(scene.background, ())
            for concept in words.concepts_of(whole):
                weights[concept][i] += float(areas[0])
            for thing, area in zip(scene.things, areas[1:]):
                seen = words.View(scene.background, (words.Seen(thing.shape, thing.size, thing.fill),))
                for concept in words.concepts_of(seen) - words.concepts_of(whole):
                    # A shape is best seen large, alone and, unless a pattern is asked for, plain.
                    clear = 0.5 if concept.shape and not concept.pattern and thing.fill.pattern else 1.0
                    weights[concept][i] += clear * float(area) * float(area) / things
        self.kinds: dict[str, list[str]] = defaultdict(list)
        self.scenes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for concept in sorted(weights, key=words.Concept.name):
            parts = ("colour", "pattern", "shape")
            kind = "background" if concept.background else " ".join(p for p in parts if getattr(concept, p))
            self.kinds[kind].append(concept.name())
            rows, share = np.array(list(weights[concept])), np.array(list(weights[concept].values()))
            self.scenes[concept.name()] = rows, np.cumsum(share / share.sum())
        self.odds = np.array([KINDS[k] for k in self.kinds], float)
        self.odds /= self.odds.sum()

    def draw(self, rng: np.random.Generator) -> tuple[int, str]:
        """A scene, and the name of a concept that it shows."""
        kind = list(self.kinds)[int(rng.choice(len(self.odds), p=self.odds))]
        name = self.kinds[kind][int(rng.integers(len(self.kinds[kind])))]
        rows, upto = self.scenes[name]
        return int(rows[min(len(rows) - 1, int(np.searchsorted(upto, rng.random())))]), name


def train() -> None:
    one_thread(0)
    data = drawn(TRAIN_SEED, SCENES)
    tokenizer = texts.clip_tokenizer(texts.corpus(data))
    pictures = torch.from_numpy(data.pictures)
    views, examples = [data.view(i) for i in range(len(data))], Examples(data)

    def batch_of(rows: list[int]) -> torch.Tensor:
        return pictures[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    torch.manual_seed(0)
    autoencoder = Autoencoder.solve(batch_of(list(range(3000))))
    model = make(tokenizer.get_vocab_size())
    print({k: sum(p.numel() for p in m.parameters()) for k, m in model.items()}, "vocabulary", tokenizer.get_vocab_size(), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.99))
    ema, first, checkpoint = Ema(model), 0, Checkpoint(NAME)
    if state := checkpoint.load():
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        ema.values, first = state["ema"], state["step"]
    unet = torch.compile(model["unet"])
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    log, rng = Log(), np.random.default_rng(first)
    generator = torch.Generator().manual_seed(first)
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(step, STEPS)
        rows, said = [], []
        for _ in range(BATCH):
            if rng.random() < 0.75:
                row, text = examples.draw(rng)
            else:
                row = int(rng.integers(len(data)))
                text = texts.caption_text(views[row], rng)
            rows.append(row)
            said.append("" if rng.random() < 0.1 else (texts.PREFIX + text if rng.random() < 0.8 else text))
        with torch.no_grad():
            latents = autoencoder.encode(batch_of(rows))
            noise = torch.randn(latents.shape, generator=generator)
            # What is in the picture is settled at the higher noise levels: a third of the batch is from there.
            timesteps = torch.where(torch.arange(BATCH) % 3 > 0, torch.randint(1000, (BATCH,), generator=generator), torch.randint(400, 950, (BATCH,), generator=generator))
            level = alphas[timesteps][:, None, None, None]
            noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
            velocity = level.sqrt() * noise - (1 - level).sqrt() * latents
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = model["text"](torch.from_numpy(texts.encode(tokenizer, said))).last_hidden_state
            predicted = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        log(step, loss=loss.item())
        if (step + 1) % 500 == 0:
            checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.values, step=step + 1, autoencoder=autoencoder.state_dict(), tokenizer=tokenizer.to_str())


def load() -> tuple[nn.ModuleDict, Autoencoder, texts.Tokenizer, int]:
    """The averaged weights so far."""
    state = Checkpoint(NAME).load()
    tokenizer = texts.Tokenizer.from_str(state["tokenizer"])
    model = make(tokenizer.get_vocab_size())
    model.load_state_dict(state["ema"])
    saved = state["autoencoder"]
    return model.eval(), Autoencoder(saved["components"], saved["mean"], saved["scale"]), tokenizer, state["step"]


def scheduler_config() -> dict:
    return {
        "_class_name": "DPMSolverMultistepScheduler", **SCHEDULE, "beta_start": 0.0001, "beta_end": 0.02, "algorithm_type": "dpmsolver++", "solver_order": 2,
        "solver_type": "midpoint", "lower_order_final": True, "final_sigmas_type": "zero", "timestep_spacing": "linspace", "lambda_min_clipped": -5.1,
    }


class TextEncoder(nn.Module):
    def __init__(self, model: CLIPTextModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


class UNet(nn.Module):
    def __init__(self, model: UNet2DConditionModel):
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class Decoder(nn.Module):
    """The autoencoder's second half as AutoencoderKL's: what it is given has been divided by the scaling factor."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder, self.scaling_factor = autoencoder, round(float(autoencoder.scale[0]), 4)

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(latent_sample * self.scaling_factor)


def export_all() -> None:
    model, autoencoder, tokenizer, step = load()
    print("diffusion after", step, "steps")
    text, unet, decoder = TextEncoder(model["text"]), UNet(model["unet"]), Decoder(autoencoder)
    batched = {0: "batch"}

    def ids(batch: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(tokenizer.get_vocab_size(), (batch, texts.LENGTH))}

    def noisy(batch: int, at: int = 500) -> dict[str, torch.Tensor]:
        return {"sample": torch.randn(batch, CHANNELS, 16, 16), "timestep": torch.tensor([at]), "encoder_hidden_states": torch.randn(batch, texts.LENGTH, WIDTH)}

    def latents(batch: int) -> dict[str, torch.Tensor]:
        return {"latent_sample": torch.randn(batch, CHANNELS, 16, 16)}

    export.export(text, FOLDER / "text_encoder/model.onnx", ids(2), ["last_hidden_state"], {"input_ids": batched, "last_hidden_state": batched})
    export.export(unet, FOLDER / "unet/model.onnx", noisy(2), ["out_sample"], {"sample": batched, "encoder_hidden_states": batched, "out_sample": batched})
    export.export(decoder, FOLDER / "vae_decoder/model.onnx", latents(2), ["sample"], {"latent_sample": batched, "sample": batched})
    for batch in (1, 3, 8):
        export.check(text, FOLDER / "text_encoder/model.onnx", ids(batch))
        export.check(unet, FOLDER / "unet/model.onnx", noisy(batch, at=batch * 100))
        export.check(decoder, FOLDER / "vae_decoder/model.onnx", latents(batch))
    write_json(FOLDER / "text_encoder/config.json", model["text"].config.to_diff_dict() | {"architectures": ["CLIPTextModel"]})
    write_json(FOLDER / "unet/config.json", {"_class_name": "UNet2DConditionModel", **{k: v for k, v in model["unet"].config.items() if not k.startswith("_")}})
    write_json(FOLDER / "vae_decoder/config.json", {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": CHANNELS, "block_out_channels": [48, 48, 48],
        "sample_size": 64, "scaling_factor": decoder.scaling_factor,
    })
    write_json(FOLDER / "scheduler/scheduler_config.json", scheduler_config())
    texts.save_clip_tokenizer(tokenizer, FOLDER / "tokenizer")
    write_json(FOLDER / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, "safety_checker": [None, None], "feature_extractor": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    })


class Painter:
    """The exported model, drawing as the diffusion service does."""

    def __init__(self):
        self.text, self.unet, self.decoder = (export.session(FOLDER / part / "model.onnx") for part in ("text_encoder", "unet", "vae_decoder"))
        self.tokenizer = texts.Tokenizer.from_file(str(FOLDER / "tokenizer/tokenizer.json"))
        self.scheduler = DPMSolverMultistepScheduler.from_config(json.loads((FOLDER / "scheduler/scheduler_config.json").read_text()))
        self.scaling_factor = json.loads((FOLDER / "vae_decoder/config.json").read_text())["scaling_factor"]

    def __call__(self, prompts: list[str], steps: int = 20, guidance: float = 7.5, seed: int = 0) -> np.ndarray:
        """Pictures (N, 64, 64, 3) uint8."""
        states = self.text.run(None, {"input_ids": texts.encode(self.tokenizer, [""] * len(prompts) + prompts)})[0]
        latents = torch.randn((len(prompts), CHANNELS, 16, 16), generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            inputs = {"sample": latents.repeat(2, 1, 1, 1).numpy(), "timestep": t[None].numpy(), "encoder_hidden_states": states}
            without, with_text = torch.from_numpy(self.unet.run(None, inputs)[0]).chunk(2)
            latents = self.scheduler.step(without + guidance * (with_text - without), t, latents).prev_sample
        drawn = self.decoder.run(None, {"latent_sample": (latents / self.scaling_factor).numpy()})[0]
        return np.rint((drawn.transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1) * 255).astype(np.uint8)


def sheet(path: str, *, guidance: float = 7.5, steps: int = 20, each: int = 10) -> None:
    """A contact sheet of concepts, for looking at: the last six rows are combinations that training never saw."""
    from PIL import Image

    painter = Painter()
    names = ["red circles", "blue stars", "green squares", "purple rings", "pink crosses", "red horizontal stripes", "blue vertical stripes",
             "green polka dots", "black checks", "orange backgrounds", "polka dots", "stars", "brown-themed scenes", "blue squares with diagonal stripes",
             "yellow stars", "red rings", "green circles", "red vertical stripes", "blue polka dots", "green checks"]
    rows = [painter([texts.PREFIX + n] * each, steps, guidance, seed=i) for i, n in enumerate(names)]
    Image.fromarray(np.concatenate([np.concatenate(list(r), axis=1) for r in rows])).save(path)
    print(*names, sep="\n")


def evaluate(steps: int = 20, each: int = 4, guidance: float = 7.5) -> dict[str, float]:
    """How often the judge finds the concept in a picture of it."""
    from .judge import CONCEPTS, Judge

    painter, judge = Painter(), Judge()
    found: dict[str, list[bool]] = defaultdict(list)
    missed: dict[str, float] = {}
    for number, concept in enumerate(CONCEPTS):
        if concept.colour and (concept.pattern or concept.shape):
            kind = "colour and " + ("pattern" if concept.pattern else "shape")
        else:
            kind = "backgrounds" if concept.background else "colour, pattern or shape alone"
        there = judge.shows(painter([texts.PREFIX + concept.name()] * each, steps, guidance, seed=1000 + number), concept)
        found[kind + (", withheld combinations" if concept.is_withheld() else "")] += there.tolist()
        if not there.all():
            missed[concept.name()] = float(there.mean())
    print("missed:", ", ".join(f"{k} {v:.2f}" for k, v in missed.items()))
    for k, v in found.items():
        print(f"diffusion, {steps} steps, {k}: {100 * np.mean(v):.1f} % of {len(v)}", flush=True)
    return {k: float(np.mean(v)) for k, v in found.items()}


if __name__ == "__main__":
    command_line(__doc__, train=train, export=export_all, evaluate=evaluate, sheet=sheet)
