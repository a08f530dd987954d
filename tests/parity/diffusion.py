"""Stable Diffusion 1.5 at full size with seeded random weights: `python diffusion.py FOLDER`.

Exports the model to FOLDER/model with the project's recipe, draws with diffusers' pipeline from the project's keyed noise, and writes what came of it:
FOLDER/expected.json and, beside it, tensors as raw little-endian float32. The networks are those of the public model; what is drawn is small (128 px), to be quick
on a processor. FOLDER/512 has the same at the public model's 512 px, where one UNet step is taken and one picture decoded. Weights are not of a trained model: they
are scaled so that what is predicted depends on text, time step and latents, which is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler,
    StableDiffusionPipeline, UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "models"), str(Path(__file__).parent)]

from drawn import PROMPT, Runs, encode, expect  # noqa: E402
from recipes import stable_diffusion  # noqa: E402
from vocabulary import TOKENS, tokenizer  # noqa: E402

SMALL, PUBLIC = 16, 64
"""Sides of latents."""
CONCEPT = "polka dots"
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
def model(side: int) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=TOKENS, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, initializer_factor=2.0, attn_implementation="eager",
    ))
    unet = UNet2DConditionModel(sample_size=side, cross_attention_dim=768, attention_head_dim=8)
    for name, weight in unet.named_parameters():
        if ".attn2.to_out.0.weight" in name:
            weight *= 6
        elif ".attn2.to_q" in name or ".attn2.to_k" in name:
            weight *= 2
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=4, sample_size=8 * side, scaling_factor=0.18215,
    )
    pipeline = StableDiffusionPipeline(
        text_encoder=text.eval(), unet=unet.eval(), vae=vae.eval(), tokenizer=tokenizer(), scheduler=PNDMScheduler.from_config(PNDM), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    states, latents = encode(pipeline, TEXTS), torch.randn(1, 4, side, side)
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
def write(folder: Path, side: int, runs: Runs) -> None:
    pipeline = model(side)
    vae = pipeline.vae
    expect(pipeline, lambda latents: vae.decode(latents / vae.config.scaling_factor).sample, runs, CONCEPT, TEXTS, folder)
    pipeline.scheduler = PNDMScheduler.from_config(PNDM)
    stable_diffusion.write(pipeline, folder / "model", "seeded random weights")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(2)
    write(Path(sys.argv[1]), SMALL, RUNS)
    write(Path(sys.argv[1]) / "512", PUBLIC, {})
