"""Which known drawing does a sample show? Then diversity can be counted instead of guessed.

Every drawing of the base model is a point in 64 dimensions; a sample shows the nearest one. The points are
discriminant features of EfficientNet-Lite2, not the network of the rewards, and ship with the package, so that no
picture is needed. `python -m nabla_gfn_jax.emoji.fit_atlas` makes the file and says how often the nearest
drawing is the right one.
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
_BATCH = 64


@dataclass(frozen=True)
class Atlas:
    """The base model's N drawings: where they lie, and what they are."""

    params: Params
    points: Float[Array, "drawings 64"]
    concept: Int[np.ndarray, " drawings"]
    vendor: Int[np.ndarray, " drawings"]
    names: tuple[str, ...]  # CLDR's, of the concepts
    captions: tuple[tuple[str, ...], ...]  # of each concept, the most specific first

    def captioned(self, caption: str) -> list[int]:
        """The concepts that a caption describes. Raises `UserError` if it describes none."""
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
    """What is where in the image, as EfficientNet-Lite2 sees it."""
    with jax.default_matmul_precision("highest"):
        grid = jnp.asarray(NETWORK.apply({"params": network}, images, method="layout"))
    return grid.reshape(grid.shape[0], -1)


@jax.jit
def _nearest(params: Params, points: Float[Array, "drawings 64"], images: Images) -> Int[Array, " batch"]:
    at = (layout(params["network"], images) - params["mean"][None]) @ params["basis"]
    return jnp.argmin(jnp.square(at[:, None] - points[None]).sum(axis=-1), axis=-1)


def nearest_drawing(images: Float[np.ndarray, "batch height width 3"]) -> Int[np.ndarray, " batch"]:
    """For each image in [0, 1] the number of the drawing it shows: an index into `atlas()`'s arrays."""
    known = atlas()
    padding = -len(images) % _BATCH
    padded = np.pad(np.asarray(images, np.float32), ((0, padding), (0, 0), (0, 0), (0, 0)))
    find = partial(_nearest, known.params, known.points)
    batches = [np.asarray(find(padded[i : i + _BATCH])) for i in range(0, len(padded), _BATCH)]
    return np.concatenate(batches)[: len(images)]


def concept_captions() -> list[str]:
    """One caption, with its article, for each emoji of the base model."""
    return [captions[min(1, len(captions) - 1)] for captions in atlas().captions]


class Coverage:
    """Which drawings images show, and how evenly; for prompts that are captions of the base model's drawings."""

    def __init__(self) -> None:
        self._concepts: list[list[int]] = []

    @property
    def name(self) -> str:
        return "coverage"

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raises `NotAvailable` if a prompt is no drawing's caption or the metric's network is not installed."""
        try:
            self._concepts = [atlas().captioned(prompt) for prompt in prompts]
        except UserError as error:
            raise NotAvailable(str(error)) from error

    def update(self, batch: Batch) -> Samples:
        drawing = nearest_drawing(batch.images)
        right = [c in self._concepts[p] for c, p in zip(atlas().concept[drawing], batch.prompt, strict=True)]
        return Samples(batch.prompt, {"drawing": drawing, "right": np.asarray(right, bool)})

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        """Share of images that show their prompt; entropies of vendors (mean over prompts) and of all drawings."""
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
        """The entropies of `compute`, of as few of these samples as those of a weighting of the same prompts are worth.

        Few samples miss kinds, and no correction sees all of them: only what is counted alike is compared.
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
