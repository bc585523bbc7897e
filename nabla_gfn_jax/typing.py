"""Array types by name, so that a signature says what flows through it."""

from typing import Any

from jaxtyping import Array, Float, Int, Key, PyTree

Images = Float[Array, "batch height width 3"]  # RGB in [0, 1]
Resized = Float[Array, "batch new_height new_width 3"]  # of other images
Latents = Float[Array, "batch *shape"]  # a diffusion state: (B, h, w, c) for images, (B, 2) in the plane
Timesteps = Int[Array, "batch"]  # DDPM time, 0 (clean) to 999 (noise)
Scores = Float[Array, "batch"]  # one number per sample
TokenIds = Int[Array, "batch tokens"]
Context = Float[Array, "batch context_tokens context_width"]  # what cross-attention attends to, such as text features
Params = PyTree[Any]  # nested dict of arrays
PRNGKey = Key[Array, ""]
PRNGKeys = Key[Array, "batch"]
