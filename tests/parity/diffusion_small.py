"""The sketch suite's diffusion model in PyTorch: `python diffusion_small.py` makes what services/diffusion/tests/parity.rs expects.

Its scheduler is a cosine one; most runs start below the first time steps, where such a schedule has next to no signal.
"""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline,
)
from transformers import CLIPTokenizer

import sketch
from drawn import PROMPT, expect

CONCEPT = "red horizontal stripes"
TEXTS = ["", PROMPT.format(CONCEPT), PROMPT.format("a large blue star and a small pink ring on a background of gray checks " * 3)]
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
LEADING = COSINE | {"timestep_spacing": "leading", "steps_offset": 1}
LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RUNS = {
    "dpm-solver++": (DPMSolverMultistepScheduler, DPMSolverMultistepScheduler, COSINE | {"lambda_min_clipped": -5.1}, 20, 7.5),
    "ddim": (DDIMScheduler, DDIMScheduler, LEADING | {"set_alpha_to_one": False, "clip_sample": False}, 8, 7.5),
    "euler": (EulerDiscreteScheduler, EulerDiscreteScheduler, LEADING, 8, 7.5),
    "euler ancestral": (EulerAncestralDiscreteScheduler, EulerAncestralDiscreteScheduler, LEADING, 8, 7.5),
    "turbo, no guidance": (EulerDiscreteScheduler, EulerDiscreteScheduler, LINEAR | {"timestep_spacing": "trailing", "steps_offset": 1}, 4, 0.0),
    "lcm, no guidance": (LCMScheduler, LCMScheduler, COSINE | {"original_inference_steps": 50}, 4, 1.0),
}


def main() -> None:
    pipeline = StableDiffusionPipeline(
        text_encoder=sketch.text_encoder(), unet=sketch.unet(), vae=None, tokenizer=CLIPTokenizer.from_pretrained(sketch.SUITE / "diffusion/tokenizer"),
        scheduler=DDIMScheduler.from_config(LEADING), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    decoder = sketch.vae_decoder()
    expect(pipeline, lambda latents: decoder(latents / decoder.scaling_factor), RUNS, CONCEPT, TEXTS, sketch.ROOT / "services/diffusion/tests/goldens/parity")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
