"""Coverage: finds the known drawing that each sample shows, so that diversity can be counted.

Every drawing of the base model is a point in 64 dimensions, and a sample shows the nearest drawing. The points are
discriminant features of EfficientNet-Lite2, which the rewards do not use. They ship with the package, so the drawings
themselves are not needed. `python -m nabla_gfn_jax.emoji.fit_atlas` makes the file and prints how often the nearest
drawing is correct.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.checkpoints.files import read_safetensors
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.base import Batch, NotAvailable, Samples, Weighting
from nabla_gfn_jax.metrics.entropy import entropy, rarefied_entropy
from nabla_gfn_jax.metrics.tilt import Estimate, Strata, Values
from nabla_gfn_jax.models import efficientnet
from nabla_gfn_jax.models.efficientnet import EfficientNetLite
from nabla_gfn_jax.typing import Images, Params

FILE = Path(__file__).parent / "data" / "drawings.safetensors"
NETWORK = EfficientNetLite("lite2")
SHAPE = (64, 64, 3)  # of the images of the model whose drawings are known
_BATCH = 64


@dataclass(frozen=True)
class Atlas:
    """The base model's drawings: their points, concepts and vendors."""

    params: Params
    points: Float[Array, "drawings 64"]
    concept: Int[np.ndarray, " drawings"]
    vendor: Int[np.ndarray, " drawings"]
    names: tuple[str, ...]  # the CLDR name of each concept
    captions: tuple[tuple[str, ...], ...]  # the captions of each concept, the most specific first

    def captioned(self, caption: str) -> list[int]:
        """The concepts that have this caption. Raises `UserError` if there is none."""
        found = [i for i, captions in enumerate(self.captions) if caption in captions]
        if not found:
            raise UserError(f"no drawing is called {caption!r}, so coverage cannot be counted for it")
        return found


@cache
def atlas() -> Atlas:
    """The shipped atlas. Raises `UserError` if the metric network's package is not installed."""
    tensors, metadata = read_safetensors(FILE)
    return Atlas(
        params={
            "network": efficientnet.load("lite2"),
            "mean": jnp.asarray(tensors["mean"]),
            "basis": jnp.asarray(tensors["basis"].astype(np.float32)),
        },
        points=jnp.asarray(tensors["points"].astype(np.float32)),
        concept=tensors["concept"].astype(int),
        vendor=tensors["vendor"].astype(int),
        names=tuple(metadata["names"].split("|")),
        captions=tuple(map(tuple, json.loads(metadata["captions"]))),
    )


def layout(network: Params, images: Images) -> Float[Array, "batch 1080"]:
    """EfficientNet-Lite2's features at each place of a coarse grid over the image."""
    with jax.default_matmul_precision("highest"):
        grid = jnp.asarray(NETWORK.apply({"params": network}, images, method="layout"))
    return grid.reshape(grid.shape[0], -1)


@jax.jit
def _nearest(params: Params, points: Float[Array, "drawings 64"], images: Images) -> Int[Array, " batch"]:
    at = (layout(params["network"], images) - params["mean"][None]) @ params["basis"]
    return jnp.argmin(jnp.square(at[:, None] - points[None]).sum(axis=-1), axis=-1)


def nearest_drawing(images: Float[np.ndarray, "batch height width 3"]) -> Int[np.ndarray, " batch"]:
    """For each image in [0, 1], the drawing that it shows, as an index into the arrays of `atlas()`."""
    known = atlas()
    padding = -len(images) % _BATCH
    padded = np.pad(np.asarray(images, np.float32), ((0, padding), (0, 0), (0, 0), (0, 0)))
    find = partial(_nearest, known.params, known.points)
    batches = [np.asarray(find(padded[i : i + _BATCH])) for i in range(0, len(padded), _BATCH)]
    return np.concatenate(batches)[: len(images)]


def concept_captions() -> list[str]:
    """One caption, with an article, for each concept of the base model."""
    return [captions[min(1, len(captions) - 1)] for captions in atlas().captions]


class Coverage:
    """The drawings that images show, and their entropies. The prompts must be captions of the base model's drawings."""

    def __init__(self) -> None:
        self._concepts: list[list[int]] = []

    @property
    def name(self) -> str:
        return "coverage"

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raises `NotAvailable` if a prompt is not a drawing's caption or the metric's network is not installed."""
        try:
            self._concepts = [atlas().captioned(prompt) for prompt in prompts]
        except UserError as error:
            raise NotAvailable(str(error)) from error

    def update(self, batch: Batch) -> Samples:
        drawing = nearest_drawing(batch.images)
        right = [c in self._concepts[p] for c, p in zip(atlas().concept[drawing], batch.prompt, strict=True)]
        return Samples(batch.prompt, {"drawing": drawing, "right": np.asarray(right, bool)})

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        """The share of images that show their prompt, and the entropies over vendors (mean of prompts) and drawings."""
        state = state.by_prompt()
        weighting = weighting or Weighting.equal(state.prompt)
        drawing, vendor = state.values["drawing"], atlas().vendor[state.values["drawing"]]

        def figures(weights: Values) -> dict[str, float]:
            return {
                "concept_accuracy": float(weights @ state.values["right"]),
                "vendor_entropy": float(np.mean([entropy(vendor[p], weights[p]) for p in Strata(state.prompt).slices])),
                "drawing_entropy": entropy(drawing, weights),
            }

        return weighting.estimate(figures)

    def compute_as(self, state: Samples, weighting: Weighting) -> dict[str, Estimate]:
        """The entropies of `compute` at the effective sample sizes of `weighting`, which has the same prompts.

        Few samples miss drawings, and no correction removes this bias completely. Entropies are therefore comparable
        only at equal sample sizes.
        """
        state = state.by_prompt()
        drawing, vendor = state.values["drawing"], atlas().vendor[state.values["drawing"]]
        equal = Weighting.equal(state.prompt)
        prompts = list(zip(equal.strata.slices, weighting.effective_of_prompts, strict=True))

        def figures(weights: Values) -> dict[str, float]:
            counts = np.round(weights / equal.weights).astype(int)
            vendors = [rarefied_entropy(np.bincount(vendor[p], counts[p]), round(n)) for p, n in prompts]
            drawings = rarefied_entropy(np.bincount(drawing, counts), round(weighting.effective))
            return {"vendor_entropy": float(np.mean(vendors)), "drawing_entropy": drawings}

        return equal.estimate(figures)
