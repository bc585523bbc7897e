"""Named array types for signatures."""

from typing import Any

from jaxtyping import Array, Float, Int, Key, Num, PyTree

Images = Float[Array, "batch height width 3"]  # RGB in [0, 1]
Resized = Float[Array, "batch new_height new_width 3"]  # images after resizing
Latents = Float[Array, "batch *shape"]  # a diffusion state: (B, h, w, c) for images, (B, 2) in the plane
Timesteps = Num[Array, "batch"]  # a network's time input, such as DDPM's, 0 (clean) to 999 (noise)
PerSample = Float[Array, "batch"]  # one number per sample
PromptIds = Int[Array, "batch"]  # rows of the table of conditions
TokenIds = Int[Array, "batch tokens"]
Context = Float[Array, "batch context_tokens context_width"]  # what cross-attention attends to, such as text features
Params = PyTree[Any]  # nested dict of arrays
PRNGKey = Key[Array, ""]
PRNGKeys = Key[Array, "batch"]
