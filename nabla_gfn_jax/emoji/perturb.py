"""Perturbs drawings as a decoder might; the fitted heads and the coverage metric must tolerate this."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.typing import Images, PRNGKey


def perturb(key: PRNGKey, images: Images) -> Images:
    """Scales each image by .85 to 1.08, shifts it up to 4 pixels, blurs it (σ ≤ 1.3 pixels), adds noise (σ ≤ .06)."""

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
