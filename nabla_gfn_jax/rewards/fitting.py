"""Features of the drawings, also perturbed as a decoder would, for fitting heads that hold on its images."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from nabla_gfn_jax.rewards.emoji import features, network_params
from nabla_gfn_jax.typing import Images, Params, PRNGKey

_BATCH = 64


def perturb(key: PRNGKey, images: Images) -> Images:
    """Each image scaled by .85 to 1.08, shifted by up to 4 pixels, blurred (σ ≤ 1.3 pixels), noisy (σ ≤ .06)."""

    def one(key: PRNGKey, image: Float[Array, "height width 3"]) -> Float[Array, "height width 3"]:
        keys = jax.random.split(key, 5)
        scale = jax.random.uniform(keys[0], (2,), minval=0.85, maxval=1.08)
        shift = jax.random.uniform(keys[1], (2,), minval=-4.0, maxval=4.0)
        centre = image.shape[0] / 2 * (1.0 - scale)
        moved = jax.image.scale_and_translate(1.0 - image, image.shape, (0, 1), scale, shift + centre, "linear")
        blurred = _blur(1.0 - moved, jax.random.uniform(keys[2], minval=0.01, maxval=1.3))
        noise = jax.random.normal(keys[3], image.shape) * jax.random.uniform(keys[4], maxval=0.06)
        return jnp.clip(blurred + noise, 0.0, 1.0)

    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def _blur(image: Float[Array, "height width 3"], sigma: Float[Array, ""]) -> Float[Array, "height width 3"]:
    offsets = jnp.arange(-3.0, 4.0)
    weights = jax.nn.softmax(-jnp.square(offsets / sigma) / 2.0)
    for axis in (0, 1):
        size = image.shape[axis]
        padded = jnp.pad(image, [(3, 3) if a == axis else (0, 0) for a in range(3)], mode="edge")
        shifted = jnp.stack([jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(7)])
        image = jnp.einsum("i,i...->...", weights, shifted)
    return image


def features_of(drawings: UInt8[np.ndarray, "count 64 64 3"], copies: int) -> Float[np.ndarray, "copies+1 count 1008"]:
    """Features of the drawings as they are (first), and of `copies` perturbed versions of each."""
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
