"""Compares 50 guided steps of the emoji model with diffusers' pipeline."""

from collections.abc import Iterator

import jax
import numpy as np
import torch

from benchmarks.emoji import Ours, Theirs
from benchmarks.timing import compare


def run() -> Iterator[tuple[str, str, str, str]]:
    """Times 32 images, from the features of prompts (diffusers: from prompts) to pixels."""
    ours = Ours()
    theirs = Theirs(ours)
    config, given = ours.config.sampling, (ours.keys, ours.ids.cycle(len(ours.keys)))
    prompts = [ours.texts[i] for i in given[1]]

    def draw() -> jax.Array:
        return jax.block_until_ready(ours.trainer.images(ours.trainer.frozen, ours.state.params, *given))

    def pipeline() -> np.ndarray:
        options = {"num_inference_steps": config.num_steps, "guidance_scale": config.guidance, "eta": 1.0}
        with torch.no_grad():
            return theirs.pipe(prompts, output_type="np", **options).images

    means = [float(np.mean(images)) for images in (pipeline(), draw())]
    assert abs(means[0] - means[1]) < 0.05, means  # other noise, the same distribution
    yield compare("(b) 50 guided steps, 32 images of the emoji model", pipeline, draw, rounds=5)
