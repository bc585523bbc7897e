"""BLIP's image encoder and image-grounded text encoder (Li et al. 2022). Parameters have its checkpoints' names."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nabla_gfn_jax.models.attention import attend
from nabla_gfn_jax.models.clip import ACTIVATIONS, CLIPEncoderLayer, LayerNames
from nabla_gfn_jax.models.config import check_divides, read_fields
from nabla_gfn_jax.models.layers import Dense, LayerNorm, Tokens
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.models.vision_transformer import PatchEmbedding, VisionConfig
from nabla_gfn_jax.typing import Context, Images, TokenIds

Mask = Bool[Array, "batch tokens"]  # False: padding
ImageTokens = Float[Array, "batch image_tokens image_width"]

_NAMES = LayerNames(norms=("norm1", "norm2"), qkv=("attn.qkv",), out="attn.proj")
_NORMAL = nn.initializers.normal(0.02)

# BLIP-large
VIT_L_16 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=16,
    layer_norm_eps=1e-6,
)


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The text encoder's fields of `med_config.json`. The width of the image tokens is that of the image encoder."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, fields: dict[str, Any], source: str) -> "BertConfig":
        """The config from the parsed `med_config.json`. Raises `UserError` for a value that is not implemented."""
        only = {
            "hidden_act": ("gelu",),
            "add_cross_attention": (True,),
            "position_embedding_type": ("absolute",),
        }
        found = read_fields(cls, fields, only=only, source=source)
        check_divides(source, "num_attention_heads", found.num_attention_heads, [found.hidden_size], "hidden_size")
        return found


class BLIPVision(nn.Module):
    """Normalised images (B, image_size, image_size, 3) → tokens (B, 1 + patches, hidden_size)."""

    config: VisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        c = self.config
        x = PatchEmbedding(c.hidden_size, c.patch_size, dtype=self.dtype, name="patch_embed.proj")(images)
        first = parameter(self, "cls_token", _NORMAL, (1, 1, c.hidden_size)).astype(self.dtype)
        positions = parameter(self, "pos_embed", _NORMAL, (1, c.tokens, c.hidden_size)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.hidden_size)), x], axis=1) + positions
        for i in range(c.num_hidden_layers):
            x = CLIPEncoderLayer(c, self.dtype, causal=False, names=_NAMES, name=f"blocks.{i}")(x)
        return LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")(x)


class BertLayer(nn.Module):
    """Post-norm transformer layer: attention to the text, attention to the image, two dense layers."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens, mask: Mask, image: ImageTokens) -> Tokens:
        c = self.config
        x = self._attend("attention", x, x, mask)
        x = self._attend("crossattention", x, image, None)
        h = Dense(c.intermediate_size, dtype=self.dtype, name="intermediate.dense")(x)
        return self._add("output", x, ACTIVATIONS[c.hidden_act](h))

    def _attend(self, name: str, x: Tokens, context: Context, mask: Mask | None) -> Tokens:
        c = self.config

        def heads_of(part: str, tokens: Tokens) -> Array:
            y = Dense(c.hidden_size, dtype=self.dtype, name=f"{name}.self.{part}")(tokens)
            return y.reshape(*y.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)

        q, k, v = heads_of("query", x), heads_of("key", context), heads_of("value", context)
        seen = None if mask is None else mask[:, None, None, :]
        h = attend(q, k, v, mask=seen).reshape(x.shape)
        return self._add(f"{name}.output", x, h)

    def _add(self, name: str, x: Tokens, h: Float[Array, "batch tokens hidden"]) -> Tokens:
        h = Dense(self.config.hidden_size, dtype=self.dtype, name=f"{name}.dense")(h)
        norm = LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, name=f"{name}.LayerNorm")
        return norm(h + x)


class BLIPText(nn.Module):
    """Token ids (B, tokens), their mask, and image tokens → the text's last hidden state (B, tokens, hidden_size)."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: TokenIds, mask: Mask, image: ImageTokens) -> Tokens:
        c = self.config

        def embed(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, c.hidden_size, dtype=self.dtype, embedding_init=_NORMAL, name=f"embeddings.{name}")

        positions = embed(c.max_position_embeddings, "position_embeddings")(jnp.arange(ids.shape[1]))
        x = embed(c.vocab_size, "word_embeddings")(ids) + positions[None]
        x = LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="embeddings.LayerNorm")(x)
        for i in range(c.num_hidden_layers):
            x = BertLayer(c, self.dtype, name=f"encoder.layer.{i}")(x, mask, image)
        return x
