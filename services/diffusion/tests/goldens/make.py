"""Makes scheduler.json, what the diffusers library's schedulers do, and guidance.json, how a latent consistency model is told the guidance scale.

Needs `pip install torch diffusers`. Run from this folder: `python make.py`.
"""

import json
import sys
from unittest import mock

import diffusers
import numpy as np
import torch

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
VELOCITY = STABLE_DIFFUSION | {"prediction_type": "v_prediction"}
ZERO_SNR = VELOCITY | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
DPM, DDIM, EULER, ANCESTRAL, LCM = "DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"
PNDM = STABLE_DIFFUSION | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
DDIM_SD = STABLE_DIFFUSION | {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
CASES = {
    "stable diffusion 1": ("PNDMScheduler", PNDM, 50),
    "few steps": (DPM, STABLE_DIFFUSION, 4),
    "one step": (DPM, STABLE_DIFFUSION, 1),
    "leading": (DPM, STABLE_DIFFUSION | {"timestep_spacing": "leading", "steps_offset": 1}, 20),
    "trailing": (DPM, STABLE_DIFFUSION | {"timestep_spacing": "trailing"}, 25),
    "heun": (DPM, STABLE_DIFFUSION | {"solver_type": "heun"}, 20),
    "sigma_min": (DPM, STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min", "lower_order_final": False}, 20),
    "sigma_min, euler at the end": (DPM, STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, 20),
    "linear, sample": (DPM, {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "sample"}, 20),
    "the class's own betas": (DPM, {}, 20),
    "velocity on cosine": (DPM, COSINE | {"lambda_min_clipped": -5.1}, 20),
    "velocity on cosine, 50": (DPM, COSINE | {"lambda_min_clipped": -5.1}, 50),
    "zero terminal snr": (DPM, ZERO_SNR, 20),
    "ddim of stable diffusion 1": (DDIM, DDIM_SD, 50),
    "ddim, a count that does not divide": (DDIM, DDIM_SD, 7),
    "ddim, one step": (DDIM, DDIM_SD, 1),
    "ddim, ending without noise": (DDIM, STABLE_DIFFUSION | {"clip_sample": False}, 20),
    "ddim, linspace": (DDIM, DDIM_SD | {"timestep_spacing": "linspace"}, 12),
    "ddim, trailing": (DDIM, DDIM_SD | {"timestep_spacing": "trailing"}, 25),
    "ddim, velocity": (DDIM, DDIM_SD | {"prediction_type": "v_prediction"}, 20),
    "ddim, sample": (DDIM, DDIM_SD | {"prediction_type": "sample"}, 20),
    "ddim, zero terminal snr": (DDIM, ZERO_SNR | {"clip_sample": False}, 20),
    "ddim, the class's own betas": (DDIM, {"clip_sample": False}, 10),
    "euler": (EULER, STABLE_DIFFUSION, 50),
    "euler between whole time steps": (EULER, STABLE_DIFFUSION, 7),
    "euler, one step": (EULER, STABLE_DIFFUSION, 1),
    "euler, leading": (EULER, STABLE_DIFFUSION | {"timestep_spacing": "leading", "steps_offset": 1}, 20),
    "euler, velocity": (EULER, VELOCITY, 20),
    "euler, sample": (EULER, STABLE_DIFFUSION | {"prediction_type": "sample"}, 20),
    "euler, sigma_min": (EULER, STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min"}, 20),
    "euler, zero terminal snr": (EULER, ZERO_SNR, 20),
    **{f"turbo, {n} steps": (EULER, STABLE_DIFFUSION | {"timestep_spacing": "trailing", "steps_offset": 1}, n) for n in (1, 2, 3, 4)},
    "euler ancestral": (ANCESTRAL, STABLE_DIFFUSION, 20),
    "euler ancestral, leading": (ANCESTRAL, STABLE_DIFFUSION | {"timestep_spacing": "leading", "steps_offset": 1}, 10),
    "euler ancestral, velocity": (ANCESTRAL, VELOCITY | {"timestep_spacing": "trailing"}, 10),
    **{f"lcm, {n} steps": (LCM, STABLE_DIFFUSION | {"original_inference_steps": 50}, n) for n in (1, 4, 8, 6)},
    "lcm, the class's own betas": (LCM, {}, 4),
    "lcm, distilled on 100 steps": (LCM, STABLE_DIFFUSION | {"original_inference_steps": 100, "timestep_scaling": 5.0}, 12),
    "lcm, a boundary that is felt": (LCM, STABLE_DIFFUSION | {"timestep_scaling": 0.01}, 4),
    "lcm, velocity": (LCM, VELOCITY, 4),
    "lcm, zero terminal snr": (LCM, ZERO_SNR, 4),
}


def output(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """Stands for the UNet: any function that the test can write, too."""
    place = torch.arange(latents.numel(), dtype=torch.float64)
    return (0.4 * latents.double() + 0.5 * torch.sin(place + timestep / 100.0)).float()


def noise(step: int, count: int) -> torch.Tensor:
    """Stands for the noise that is added after a step, counted from 0."""
    return torch.cos(torch.arange(count, dtype=torch.float64) * (step + 1)).float()


cases = []
for name, (class_name, config, steps) in CASES.items():
    # Stable Diffusion 1's file is of PNDM, and sampled with DPM-Solver++.
    scheduler = getattr(diffusers, DPM if class_name == "PNDMScheduler" else class_name).from_config(config)
    scheduler.set_timesteps(steps)
    start = torch.from_numpy(np.random.default_rng(0).standard_normal(12).astype(np.float32))
    latents = start * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        drawn = mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: noise(i, 12), create=True)
        with drawn:
            latents = scheduler.step(output(scheduler.scale_model_input(latents, t), float(t)), t, latents).prev_sample
    cases.append({
        "name": name, "config": {"_class_name": class_name, **config}, "steps": steps, "timesteps": [float(t) for t in scheduler.timesteps],
        "start": start.tolist(), "end": latents.tolist(),
    })

with open("scheduler.json", "w") as file:
    file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")

embedding = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
with open("guidance.json", "w") as file:
    json.dump([(scale, embedding(None, torch.tensor([scale - 1.0]), 48)[0].tolist()) for scale in (1.0, 7.5, 8.5)], file)
    file.write("\n")
