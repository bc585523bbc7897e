"""The size of an image as a JPEG file, the classic black-box reward (Black et al. 2023, arXiv 2305.13301)."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from nabla_gfn_jax.images import levels
from nabla_gfn_jax.rewards.host import host_reward
from nabla_gfn_jax.rewards.reward import Reward

_QUALITY = 95


def jpeg() -> Reward:
    """log R = minus the file's size in kilobytes at quality 95. `jpeg:-1` rewards large files. It has no gradient."""
    return host_reward(minus_kilobytes, "the reward jpeg")


def minus_kilobytes(
    images: Float[np.ndarray, "batch height width 3"], prompts: Sequence[str]
) -> Float[np.ndarray, " batch"]:
    """The score of each image in [0, 1]. A kilobyte is 1000 bytes."""

    def size(image: np.ndarray) -> int:
        file = io.BytesIO()
        Image.fromarray(levels(image)).save(file, "JPEG", quality=_QUALITY)
        return file.tell()

    return np.asarray([-size(image) / 1000 for image in images], np.float32)
