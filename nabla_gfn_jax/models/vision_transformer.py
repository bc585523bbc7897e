"""The common part of CLIP's and BLIP's vision transformers (Dosovitskiy et al. 2021): their sizes and first layer."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nabla_gfn_jax.models.layers import Tokens
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.typing import Images


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes of a vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int = 224
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """The number of tokens: the patches of an image and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class PatchEmbedding(nn.Module):
    """Embeds each square patch of an image as one token, row by row: a convolution whose stride is its kernel size."""

    features: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        batch, height, width, channels = images.shape
        p = self.patch_size
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (p, p, channels, self.features))
        patches = images.astype(self.dtype).reshape(batch, height // p, p, width // p, p, channels)
        rows = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p * channels)
        y = rows @ kernel.astype(self.dtype).reshape(-1, self.features)
        if self.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None]
        return y.reshape(batch, -1, self.features)
