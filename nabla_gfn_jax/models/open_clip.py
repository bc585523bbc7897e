"""OpenCLIP's image and text towers (Cherti et al. 2023). Parameters have the names of its checkpoints."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.clip import CLIPEncoderLayer, CLIPTextConfig, LayerNames
from nabla_gfn_jax.models.layers import LayerNorm, Tokens
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.models.vision_transformer import PatchEmbedding, VisionConfig
from nabla_gfn_jax.typing import Images, TokenIds

Embeddings = Float[Array, "batch embedding"]

_NAMES = LayerNames(norms=("ln_1", "ln_2"), qkv=("attn.in_proj",), out="attn.out_proj", mlp=("mlp.c_fc", "mlp.c_proj"))
_NORMAL = nn.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class OpenCLIPConfig:
    """The sizes of the two towers, and the width of their common embedding space."""

    embed_dim: int
    vision: VisionConfig
    text: CLIPTextConfig


# open_clip's ViT-H-14.json
VIT_H_14 = OpenCLIPConfig(
    embed_dim=1024,
    vision=VisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    ),
    text=CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"
    ),
)


def _transformer(x: Tokens, config: VisionConfig | CLIPTextConfig, dtype: Any, causal: bool) -> Tokens:
    for i in range(config.num_hidden_layers):
        x = CLIPEncoderLayer(config, dtype, causal, _NAMES, name=f"transformer.resblocks.{i}")(x)
    return x


class OpenCLIPVision(nn.Module):
    """Normalised images (B, image_size, image_size, 3) → features (B, embed_dim), not normalised."""

    config: VisionConfig
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Embeddings:
        c = self.config

        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name=name)

        x = PatchEmbedding(c.hidden_size, c.patch_size, use_bias=False, dtype=self.dtype, name="conv1")(images)
        first = parameter(self, "class_embedding", _NORMAL, (c.hidden_size,)).astype(self.dtype)
        positions = parameter(self, "positional_embedding", _NORMAL, (c.tokens, c.hidden_size)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first[None, None], (len(x), 1, c.hidden_size)), x], axis=1)
        x = _transformer(norm("ln_pre")(x + positions[None]), c, self.dtype, causal=False)
        projection = parameter(self, "proj", _NORMAL, (c.hidden_size, self.embed_dim))
        return norm("ln_post")(x[:, 0]) @ projection.astype(self.dtype)


class OpenCLIPText(nn.Module):
    """Token ids (B, tokens) → features (B, embed_dim), not normalised: the state at the end token, the highest id."""

    config: CLIPTextConfig
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: TokenIds) -> Embeddings:
        c = self.config
        embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=_NORMAL, name="token_embedding")
        shape = (c.max_position_embeddings, c.hidden_size)
        positions = parameter(self, "positional_embedding", _NORMAL, shape).astype(self.dtype)
        x = _transformer(embed(ids) + positions[None, : ids.shape[1]], c, self.dtype, causal=True)
        x = LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="ln_final")(x)
        end = jnp.take_along_axis(x, ids.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        return end @ parameter(self, "text_projection", _NORMAL, (c.hidden_size, self.embed_dim)).astype(self.dtype)
