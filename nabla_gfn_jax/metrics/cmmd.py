"""CMMD: the maximum mean discrepancy of CLIP features (Jayasumana et al. 2024, arXiv 2401.09603).

    1000 (E k(x, x') + E k(y, y') − 2 E k(x, y)),   k(x, y) = exp(−|x − y|²/(2σ²)),   σ = 10

x are features of a model's images and y those of the base model's, both of norm 1 and by OpenAI's CLIP ViT-L/14 at 336
pixels, as in the released program. The means are over pairs of different images: the estimate is unbiased for any
number of images, and can be negative. The released program also counts each image as a pair with itself, which adds
nearly 1000 (1 − E k(x, x'))/n to each of the first two terms.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nabla_gfn_jax.checkpoints import hub, weights
from nabla_gfn_jax.metrics.base import Batch, Released, Samples
from nabla_gfn_jax.metrics.on_devices import OnDevices, as_saved
from nabla_gfn_jax.metrics.tilt import Estimate, Strata, Values
from nabla_gfn_jax.models.clip_vision import VIT_L_14, VIT_L_14_DIM, CLIPVisionModelWithProjection
from nabla_gfn_jax.models.open_clip import Embeddings
from nabla_gfn_jax.models.preprocess import clip_normalise
from nabla_gfn_jax.models.resize import resize
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.rewards.clip_score import image_tower
from nabla_gfn_jax.rewards.prompt_features import unit
from nabla_gfn_jax.typing import Images, Params

REPO, FILE = "openai/clip-vit-large-patch14-336", "pytorch_model.bin"
VIT_L_14_336 = replace(VIT_L_14, image_size=336)
SIGMA, SCALE = 10.0, 1000.0
_ROWS = 1024  # of the kernel's matrix that are in memory simultaneously


class CMMD:
    """CMMD by an image tower of CLIP. A sample takes 3 KiB."""

    def __init__(self, params: Params, vision: VisionConfig = VIT_L_14_336, embed_dim: int = VIT_L_14_DIM):
        tower = CLIPVisionModelWithProjection(vision, embed_dim)

        def features(params: Params, images: Images) -> Embeddings:
            seen = clip_normalise(resize(images, vision.image_size, vision.image_size, antialias=True))
            with jax.default_matmul_precision("highest"):
                return unit(jnp.asarray(tower.apply({"params": params}, seen)))

        self._features = OnDevices(features, params)

    @property
    def name(self) -> str:
        return "cmmd"

    def prepare(self, prompts: Sequence[str]) -> None:
        """Accepts any prompts."""

    def update(self, batch: Batch) -> Samples:
        return Samples(batch.prompt, {"features": self._features(as_saved(batch.images))})

    def compare(self, state: Samples, base: Samples) -> dict[str, Estimate]:
        """cmmd_per_prompt, the mean over prompts, and cmmd_pooled, that of all images.

        A prompt with a single image has no pair. There is then no cmmd_per_prompt.
        """
        mine, theirs = state.by_prompt(), base.by_prompt()
        x, y = (np.asarray(of.values["features"], np.float64) for of in (mine, theirs))
        strata, others = Strata(mine.prompt), Strata(theirs.prompt)
        found: dict[str, Estimate] = {}
        if min(strata.sizes.min(), others.sizes.min()) > 1:
            each = [_estimate(x[p], y[q]) for p, q in zip(strata.slices, others.slices, strict=True)]
            error = float(np.sqrt(sum(e.error**2 for e in each))) / len(each)
            found["cmmd_per_prompt"] = Estimate(float(np.mean([e.value for e in each])), error)
        if min(len(x), len(y)) > 1:
            found["cmmd_pooled"] = _estimate(x, y, strata, others)
        return found


def cmmd() -> Released:
    """The metric with the released weights. Raises `UserError` that says how to get a missing file."""
    file = hub.find("cmmd", FILE, repo=REPO)
    return Released(CMMD(load(file)), (file,))


def load(file: Path, vision: VisionConfig = VIT_L_14_336, embed_dim: int = VIT_L_14_DIM) -> Params:
    """The image tower's parameters from transformers' CLIP. Raises `UserError` if the file is not such a CLIP."""
    tower = CLIPVisionModelWithProjection(vision, embed_dim)
    image = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]
    return image_tower(weights.read_state_dict(file), shapes, str(file))


def _estimate(
    x: Float[np.ndarray, "n features"],
    y: Float[np.ndarray, "m features"],
    strata: Strata | None = None,
    others: Strata | None = None,
) -> Estimate:
    """The unbiased estimate for two sets of at least two features each, sorted by stratum.

    The standard error is that of the linearised estimate: a sample has the influence 2 (E k(x, x') − E k(x, y)). If the
    two distributions are equal, it is too large by a factor of up to √2.
    """
    within, across = _mean_kernel(x, x, same=True), _mean_kernel(x, y)
    other_within, other_across = _mean_kernel(y, y, same=True), _mean_kernel(y, x)
    value = within.mean() + other_within.mean() - 2.0 * across.mean()
    influences = (strata, within - across), (others, other_within - other_across)
    errors = [(s or Strata(np.zeros(len(i), int))).mean_and_error(2.0 * i)[1] for s, i in influences]
    return Estimate(SCALE * float(value), SCALE * float(np.hypot(*errors)))


def _mean_kernel(
    x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"], *, same: bool = False
) -> Values:
    """For each row of x, the mean of its kernel with the rows of y. If they are the `same`, its own is left out."""
    norms = np.square(y).sum(1)
    rows = []
    for start in range(0, len(x), _ROWS):
        part = x[start : start + _ROWS]
        squared = np.square(part).sum(1)[:, None] + norms[None] - 2.0 * part @ y.T
        rows.append(np.exp(squared / (-2.0 * SIGMA**2)).sum(1))
    total = np.concatenate(rows)
    return (total - 1.0) / (len(y) - 1.0) if same else total / len(y)
