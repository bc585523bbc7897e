"""The Fréchet inception distance between a model's images and the base model's (Heusel et al. 2017, arXiv 1706.08500).

FID is biased upwards, the more the fewer the images are. Compare only figures of equal numbers of images, and compare
them with the base model's own figure, which is the noise floor.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nabla_gfn_jax.checkpoints import release, weights
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.metrics.base import Batch, Released, Samples
from nabla_gfn_jax.metrics.frechet import frechet_distance
from nabla_gfn_jax.metrics.on_devices import OnDevices, as_saved
from nabla_gfn_jax.metrics.tilt import Estimate, Strata
from nabla_gfn_jax.models.inception import SIZE, InceptionV3
from nabla_gfn_jax.typing import Images, Params

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
_SHA256 = "6726825d"  # its beginning, which is part of the file's name
_UNUSED = ("fc.weight", "fc.bias")
_COUNTER = ".num_batches_tracked"


class FID:
    """FID by the features of pytorch-fid's Inception-v3. A sample takes 8 KiB, so 10,000 samples take 80 MB."""

    def __init__(self, params: Params):
        self._features = OnDevices(inception_features, params)

    @property
    def name(self) -> str:
        return "fid"

    def prepare(self, prompts: Sequence[str]) -> None:
        """Accepts any prompts."""

    def update(self, batch: Batch) -> Samples:
        return Samples(batch.prompt, {"features": self._features(as_saved(batch.images))})

    def compare(self, state: Samples, base: Samples) -> dict[str, Estimate]:
        """fid_per_prompt, the mean over prompts of the FID of a prompt's images, and fid_pooled, that of all images.

        A prompt with a single image has no covariance. There is then no fid_per_prompt.
        """
        mine, theirs = state.by_prompt(), base.by_prompt()
        x, y = mine.values["features"], theirs.values["features"]
        strata, others = Strata(mine.prompt), Strata(theirs.prompt)
        found: dict[str, Estimate] = {}
        if min(strata.sizes.min(), others.sizes.min()) > 1:
            each = [frechet_distance(x[p], y[q]) for p, q in zip(strata.slices, others.slices, strict=True)]
            variances = [_squared_error(d.influence) + _squared_error(d.other_influence) for d in each]
            error = float(np.sqrt(sum(variances))) / len(each)
            found["fid_per_prompt"] = Estimate(float(np.mean([d.value for d in each])), error)
        if min(len(x), len(y)) > 1:
            pooled = frechet_distance(x, y)
            errors = strata.mean_and_error(pooled.influence)[1], others.mean_and_error(pooled.other_influence)[1]
            found["fid_pooled"] = Estimate(pooled.value, float(np.hypot(*errors)))
        return found


def fid() -> Released:
    """The metric with the released weights. Raises `UserError` that says how to get a missing file."""
    file = release.find("fid", FILE, url=URL, sha256=_SHA256)
    return Released(FID(load(file)), (file,))


def load(file: Path) -> Params:
    """Inception-v3's parameters from a file of pytorch-fid. Raises `UserError` if it does not match the network."""
    expected = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return from_state_dict(
        weights.read_state_dict(file),
        expected,
        str(file),
        "pytorch-fid's Inception-v3",
        place=lambda a: jnp.asarray(a, jnp.float32),
        ignore=lambda name: name in _UNUSED or name.endswith(_COUNTER),
    )


def inception_features(params: Params, images: Images) -> jax.Array:
    """The features (B, 2048) of images in [0, 1]."""
    with jax.default_matmul_precision("highest"):
        return jnp.asarray(InceptionV3().apply({"params": params}, images))


def _squared_error(influence: np.ndarray) -> float:
    """The squared standard error of a figure from the influence of its samples."""
    return float(np.var(influence, ddof=1)) / len(influence)
