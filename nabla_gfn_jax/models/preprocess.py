"""Converts images in [0, 1] to the inputs of CLIP and related models. All functions are differentiable."""

import jax.numpy as jnp
import numpy as np

from nabla_gfn_jax.models.resize import resize
from nabla_gfn_jax.typing import Images, Resized

# Mean and standard deviation of CLIP's training images (released files of Radford et al. 2021).
_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)
# The same of ImageNet.
_IMAGENET_MEAN, _IMAGENET_STD = np.asarray([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)


def clip_normalise(images: Images) -> Images:
    """(image - mean) / standard deviation for each colour, with CLIP's statistics."""
    return (images - _MEAN.reshape(1, 1, 1, 3)) / _STD.reshape(1, 1, 1, 3)


def imagenet_normalise(images: Images) -> Images:
    """(image - mean) / standard deviation for each colour, with ImageNet's statistics."""
    return (images - _IMAGENET_MEAN.reshape(1, 1, 1, 3)) / _IMAGENET_STD.reshape(1, 1, 1, 3)


def fit_longer_side(images: Images, size: int) -> Resized:
    """Resizes the longer side to `size` by antialiased bicubic interpolation, and pads to a square with black.

    If the padding is odd, the right or the bottom has one pixel more.
    """
    height, width = images.shape[1:3]
    scale = size / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    resized = resize(images, new_height, new_width, antialias=True)
    black = [(extra // 2, extra - extra // 2) for extra in (size - new_height, size - new_width)]
    return jnp.pad(resized, ((0, 0), *black, (0, 0)))


def crop_longer_side(images: Images, size: int) -> Resized:
    """Resizes the shorter side to `size` by antialiased bicubic interpolation; crops the middle of the longer one."""
    height, width = images.shape[1:3]
    shorter = min(height, width)
    resized = resize(images, size * height // shorter, size * width // shorter, antialias=True)
    top, left = (round((n - size) / 2) for n in resized.shape[1:3])
    return resized[:, top : top + size, left : left + size]
