"""Makes scheduler.json: what the diffusers library's DPMSolverMultistepScheduler does, for the scheduler's tests.

Needs `pip install torch diffusers`. Run from this folder: `python make.py`.
"""

import json

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
CASES = {
    "stable diffusion 1": (STABLE_DIFFUSION, 50),
    "few steps": (STABLE_DIFFUSION, 4),
    "one step": (STABLE_DIFFUSION, 1),
    "leading": (STABLE_DIFFUSION | {"timestep_spacing": "leading", "steps_offset": 1}, 20),
    "trailing": (STABLE_DIFFUSION | {"timestep_spacing": "trailing"}, 25),
    "heun": (STABLE_DIFFUSION | {"solver_type": "heun"}, 20),
    "sigma_min": (STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min", "lower_order_final": False}, 20),
    "sigma_min, euler at the end": (STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, 20),
    "linear, sample": ({"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "sample"}, 20),
    "velocity on cosine": (COSINE | {"lambda_min_clipped": -5.1}, 20),
    "velocity on cosine, 50": (COSINE | {"lambda_min_clipped": -5.1}, 50),
    "zero terminal snr": (STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, 20),
}


def output(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """Stands for the UNet: any function that the test can write, too."""
    place = torch.arange(latents.numel(), dtype=torch.float64)
    return (0.4 * latents.double() + 0.5 * torch.sin(place + timestep / 100.0)).float()


cases = []
for name, (config, steps) in CASES.items():
    scheduler = DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal(12).astype(np.float32))
    start = latents.tolist()
    for t in scheduler.timesteps:
        latents = scheduler.step(output(latents, float(t)), t, latents).prev_sample
    cases.append({"name": name, "config": config, "steps": steps, "timesteps": [float(t) for t in scheduler.timesteps], "start": start, "end": latents.tolist()})

with open("scheduler.json", "w") as file:
    json.dump(cases, file, indent=1)
    file.write("\n")
