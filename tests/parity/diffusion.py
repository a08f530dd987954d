"""Stable Diffusion 1.5 at full size with seeded random weights: `python diffusion.py FOLDER [SIDE]`, SIDE the latents' (16 by default, 64 in the public model).

Exports the model to FOLDER/model with the project's recipe, draws with diffusers' pipeline from the project's keyed noise, and writes what came of it:
FOLDER/expected.json and, beside it, tensors as raw little-endian float32. Pictures are small (of 128 px by default), to be quick
on a processor; the networks are those of the public model. Weights are not of a trained model: they are scaled so that what is predicted depends on text, time step and latents, which is printed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler,
    StableDiffusionPipeline, UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "models"), str(Path(__file__).parent)]

from noise import noise  # noqa: E402
from recipes import stable_diffusion  # noqa: E402
from vocabulary import TOKENS, tokenizer  # noqa: E402

SIDE = int(sys.argv[2]) if len(sys.argv) == 3 else 16
CONCEPT, PROMPT = "polka dots", "One realistic image of {}"
LONG = "a photograph of " + "a very old and very large red barn beside a river and " * 12 + "a dog"
TEXTS = ["", PROMPT.format(CONCEPT), PROMPT.format("a café in Zürich, 1920s' style"), LONG]
# Of Stable Diffusion 1.5, as published; what it leaves out is its class's default.
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PNDM = BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
TURBO = BETAS | {"timestep_spacing": "trailing", "steps_offset": 1}
RUNS = {
    # name: class in the file, class that samples, configuration, steps, guidance
    "dpm-solver++": (PNDMScheduler, DPMSolverMultistepScheduler, PNDM, 50, 7.5),
    "dpm-solver++, v-prediction": (DPMSolverMultistepScheduler, DPMSolverMultistepScheduler, BETAS | {"prediction_type": "v_prediction"}, 6, 7.5),
    "ddim": (DDIMScheduler, DDIMScheduler, BETAS | {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, 6, 7.5),
    "euler": (EulerDiscreteScheduler, EulerDiscreteScheduler, BETAS | {"timestep_spacing": "leading", "steps_offset": 1}, 6, 7.5),
    "euler ancestral": (EulerAncestralDiscreteScheduler, EulerAncestralDiscreteScheduler, BETAS, 6, 7.5),
    "turbo, no guidance": (EulerDiscreteScheduler, EulerDiscreteScheduler, TURBO, 4, 0.0),
    "lcm, no guidance": (LCMScheduler, LCMScheduler, BETAS | {"original_inference_steps": 50}, 4, 1.0),
}


@torch.no_grad()
def model() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=TOKENS, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, initializer_factor=2.0, attn_implementation="eager",
    ))
    unet = UNet2DConditionModel(sample_size=SIDE, cross_attention_dim=768, attention_head_dim=8)
    for name, weight in unet.named_parameters():
        if ".attn2.to_out.0.weight" in name:
            weight *= 6
        elif ".attn2.to_q" in name or ".attn2.to_k" in name:
            weight *= 2
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=4, sample_size=8 * SIDE, scaling_factor=0.18215,
    )
    pipeline = StableDiffusionPipeline(
        text_encoder=text.eval(), unet=unet.eval(), vae=vae.eval(), tokenizer=tokenizer(), scheduler=PNDMScheduler.from_config(PNDM), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    states, latents = encode(pipeline, TEXTS), torch.randn(1, 4, SIDE, SIDE)
    predicted = unet(latents, torch.tensor(500.0), states[1:2]).sample
    unet.conv_out.weight *= 1 / predicted.std()
    unet.conv_out.bias *= 0
    predicted = unet(latents, torch.tensor(500.0), states[1:2]).sample
    picture = vae.decode(latents / 0.18215).sample
    vae.decoder.conv_out.weight *= 0.4 / picture.std()
    for what, other in (
        ("another text", (latents, torch.tensor(500.0), states[2:3])), ("another time step", (latents, torch.tensor(480.0), states[1:2])),
        ("other latents", (torch.randn_like(latents), torch.tensor(500.0), states[1:2])),
    ):
        print(f"{what} changes the prediction by {float((unet(*other).sample - predicted).std() / predicted.std()):.3f} of its deviation", flush=True)
    return pipeline


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, said: list[str]) -> torch.Tensor:
    ids = pipeline.tokenizer(said, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids).last_hidden_state


def drawn(pipeline: StableDiffusionPipeline, concept: str, index: int, steps: int, guidance: float) -> torch.Tensor:
    """Latents of a picture, each draw of noise replaced by the keyed one."""
    shape = 1, 4, SIDE, SIDE
    draws = iter(range(1, 1000))

    def keyed(*_, **__) -> torch.Tensor:
        return torch.from_numpy(noise(0, concept, index, next(draws), 4 * SIDE * SIDE)).reshape(shape)

    modules = ("lcm", "euler_ancestral_discrete")
    patches = [mock.patch(f"diffusers.schedulers.scheduling_{module}.randn_tensor", keyed) for module in modules]
    start = torch.from_numpy(noise(0, concept, index, 0, 4 * SIDE * SIDE)).reshape(shape)
    with patches[0], patches[1]:
        return pipeline(PROMPT.format(concept), num_inference_steps=steps, guidance_scale=guidance, latents=start, output_type="latent").images


@torch.no_grad()
def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = model()

    def keep(name: str, tensor: torch.Tensor) -> dict:
        tensor.numpy().astype("<f4").tofile(folder / f"{name}.f32")
        return {"file": f"{name}.f32", "shape": list(tensor.shape), "deviation": float(tensor.std())}

    states = encode(pipeline, TEXTS)
    expected: dict = {"side": SIDE, "concept": CONCEPT, "prompt": PROMPT.format(CONCEPT), "texts": TEXTS, "states": keep("states", states)}
    sample = torch.from_numpy(noise(0, CONCEPT, 0, 0, 4 * SIDE * SIDE)).reshape(1, 4, SIDE, SIDE)
    expected["step"] = {"timestep": 981.0, "output": keep("step", pipeline.unet(sample, torch.tensor(981.0), states[1:2]).sample)}
    expected["runs"] = {}
    for name, (said, sampler, config, steps, guidance) in RUNS.items():
        started = time.time()
        pipeline.scheduler = sampler.from_config(config)
        latents = drawn(pipeline, CONCEPT, 0, steps, guidance)
        expected["runs"][name] = {"config": {"_class_name": said.__name__, **config}, "steps": steps, "guidance": guidance, "latents": keep(name, latents)}
        print(f"{name}: {steps} steps in {time.time() - started:.0f} s, latents of deviation {float(latents.std()):.3g}", flush=True)
        if name == "dpm-solver++":
            expected["picture"] = keep("picture", pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))
    pipeline.scheduler = PNDMScheduler.from_config(PNDM)
    stable_diffusion.write(pipeline, folder / "model", "seeded random weights")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
