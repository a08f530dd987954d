"""What diffusers' pipeline draws from the project's keyed noise, kept for the tests: expected.json, and tensors as raw little-endian float32."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from diffusers import StableDiffusionPipeline

from noise import noise

PROMPT = "One realistic image of {}"

Runs = dict[str, tuple[type, type, dict, int, float]]
"""By name: the class in the file, the class that samples, the configuration, steps, guidance."""


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, said: list[str]) -> torch.Tensor:
    length = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(said, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids).last_hidden_state


def drawn(pipeline: StableDiffusionPipeline, concept: str, steps: int, guidance: float, shape: tuple[int, ...]) -> torch.Tensor:
    """Latents of the concept's first picture, each draw of noise replaced by the keyed one."""
    size, draws = torch.Size(shape).numel(), iter(range(1, 1000))

    def keyed(*_, **__) -> torch.Tensor:
        return torch.from_numpy(noise(0, concept, 0, next(draws), size)).reshape(shape)

    start = torch.from_numpy(noise(0, concept, 0, 0, size)).reshape(shape)
    lcm, ancestral = (mock.patch(f"diffusers.schedulers.scheduling_{module}.randn_tensor", keyed) for module in ("lcm", "euler_ancestral_discrete"))
    with lcm, ancestral:
        return pipeline(PROMPT.format(concept), num_inference_steps=steps, guidance_scale=guidance, latents=start, output_type="latent").images


@torch.no_grad()
def expect(pipeline: StableDiffusionPipeline, decode: Callable[[torch.Tensor], torch.Tensor], runs: Runs, concept: str, texts: list[str], folder: Path) -> None:
    """Embeds texts, of which the second is the concept's prompt, takes one UNet step, draws each run, decodes the first (or the noise, where there are none), and
    keeps it all."""
    assert texts[1] == PROMPT.format(concept)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str, tensor: torch.Tensor) -> dict:
        tensor.numpy().astype("<f4").tofile(folder / f"{name}.f32")
        return {"file": f"{name}.f32", "shape": list(tensor.shape)}

    side, states = pipeline.unet.config.sample_size, encode(pipeline, texts)
    shape = 1, pipeline.unet.config.in_channels, side, side
    sample = torch.from_numpy(noise(0, concept, 0, 0, torch.Size(shape).numel())).reshape(shape)
    step = {"timestep": 981.0, "output": keep("step", pipeline.unet(sample, torch.tensor(981.0), states[1:2]).sample)}
    expected: dict = {"side": side, "concept": concept, "texts": texts, "states": keep("states", states), "step": step, "runs": {}}
    if not runs:
        expected["picture"] = keep("picture", decode(sample))
        (folder / "expected.json").write_text(json.dumps(expected, indent=1))
    for number, (name, (said, sampler, config, steps, guidance)) in enumerate(runs.items()):
        started = time.time()
        pipeline.scheduler = sampler.from_config(config)
        latents = drawn(pipeline, concept, steps, guidance, shape)
        expected["runs"][name] = {"config": {"_class_name": said.__name__, **config}, "steps": steps, "guidance": guidance, "latents": keep(f"latents-{number}", latents)}
        print(f"{name}: {steps} steps in {time.time() - started:.0f} s, latents of deviation {float(latents.std()):.3g}", flush=True)
        if number == 0:
            expected["picture"] = keep("picture", decode(latents))
        # After each run, so that a run that is broken off leaves what there is.
        (folder / "expected.json").write_text(json.dumps(expected, indent=1))
