"""Features of the drawings and of perturbed versions, to fit heads that are also correct on decoded images."""

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from nabla_gfn_jax.emoji.perturb import perturb
from nabla_gfn_jax.rewards.emoji import features, network_params
from nabla_gfn_jax.typing import Images, Params, PRNGKey

_BATCH = 64


def features_of(
    drawings: UInt8[np.ndarray, "count 64 64 3"], copies: int
) -> Float[np.ndarray, "{copies}+1 count 1008"]:
    """Features of the unperturbed drawings (first), and of `copies` perturbed versions of each."""
    padding = -len(drawings) % _BATCH
    padded = np.concatenate([drawings, drawings[:padding]]).astype(np.float32) / np.float32(255.0)

    @jax.jit
    def perturbed(network: Params, key: PRNGKey, images: Images) -> Float[Array, "batch 1008"]:
        return features(network, perturb(key, images))

    plain, network = jax.jit(features), network_params()
    rows: list[np.ndarray] = []
    for start in tqdm(range(0, len(padded), _BATCH), desc="features", unit="batch"):
        images = padded[start : start + _BATCH]
        keys = [jax.random.fold_in(jax.random.key(copy), start) for copy in range(copies)]
        versions = [plain(network, images), *(perturbed(network, key, images) for key in keys)]
        rows.append(np.stack([np.asarray(version) for version in versions]))
    return np.concatenate(rows, axis=1)[:, : len(drawings)]
