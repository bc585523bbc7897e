"""`CLIPVisionModelWithProjection`: CLIP's image tower (Radford et al. 2021), in transformers' layout."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.clip import CLIPEncoderLayer
from nabla_gfn_jax.models.layers import Dense, LayerNorm
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.models.vision_transformer import PatchEmbedding, VisionConfig
from nabla_gfn_jax.typing import Images

# openai/clip-vit-large-patch14
VIT_L_14 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="quick_gelu",
)
VIT_L_14_DIM = 768
_NORMAL = nn.initializers.normal(0.02)


class CLIPVisionModelWithProjection(nn.Module):
    """Normalised images (B, image_size, image_size, 3) → features (B, projection_dim), not normalised."""

    config: VisionConfig
    projection_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "batch features"]:
        c = self.config

        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name=f"vision_model.{name}")

        patches = PatchEmbedding(
            c.hidden_size,
            c.patch_size,
            use_bias=False,
            dtype=self.dtype,
            name="vision_model.embeddings.patch_embedding",
        )(images)
        first = parameter(self, "vision_model.embeddings.class_embedding", _NORMAL, (c.hidden_size,)).astype(self.dtype)
        positions = nn.Embed(
            c.tokens,
            c.hidden_size,
            dtype=self.dtype,
            embedding_init=_NORMAL,
            name="vision_model.embeddings.position_embedding",
        )(jnp.arange(c.tokens))
        x = jnp.concatenate([jnp.broadcast_to(first[None, None], (len(patches), 1, c.hidden_size)), patches], axis=1)
        x = norm("pre_layrnorm")(x + positions[None])  # the checkpoint's spelling
        for i in range(c.num_hidden_layers):
            x = CLIPEncoderLayer(c, self.dtype, causal=False, name=f"vision_model.encoder.layers.{i}")(x)
        pooled = norm("post_layernorm")(x[:, 0])
        return Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
