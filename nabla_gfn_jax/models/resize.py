"""Bicubic resizing as in `torch.nn.functional.interpolate`, computed as two products with constant matrices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resize(
    images: Float[Array, "batch height width channels"], height: int, width: int, *, antialias: bool
) -> Float[Array, "batch new_height new_width channels"]:
    """Resizes as `mode="bicubic", align_corners=False`. It is linear in the images; values may exceed their range."""
    rows = jnp.asarray(_weights(images.shape[1], height, antialias), images.dtype)
    columns = jnp.asarray(_weights(images.shape[2], width, antialias), images.dtype)
    precision = jax.lax.Precision.HIGHEST
    shorter = jnp.einsum("hi,biwc->bhwc", rows, images, precision=precision)
    return jnp.einsum("wj,bhjc->bhwc", columns, shorter, precision=precision)


@cache
def _weights(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    """The weight of each old pixel in each new pixel.

    With antialiasing, it is the cubic of Keys (1981) with a = -1/2, stretched by the shrinking factor and cut off at
    the border. Without, a = -3/4, and the pixels of the border are repeated beyond it. Positions are computed in
    float32 as in PyTorch, because their rounding affects the fifth decimal.
    """
    half, scale = np.float32(0.5), np.float32(old / new)
    shrink = np.float32(1) / max(scale, np.float32(1)) if antialias else np.float32(1)
    beyond = 0 if antialias else 2
    centre = (np.arange(new, dtype=np.float32) + half) * scale
    pixel = np.arange(-beyond, old + beyond)
    distance = (pixel.astype(np.float32)[None] - centre[:, None] + half) * shrink
    weights = _cubic(distance, -0.5 if antialias else -0.75)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix.T, pixel.clip(0, old - 1), weights.T)
    return matrix


def _cubic(x: Float[np.ndarray, "new pixels"], a: float) -> Float[np.ndarray, "new pixels"]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
