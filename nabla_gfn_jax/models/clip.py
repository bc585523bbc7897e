"""`CLIPTextModel`: the prompt encoder of Stable Diffusion (Radford et al. 2021), as transformers lays it out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from nabla_gfn_jax.models.config import read_fields
from nabla_gfn_jax.models.layers import Dense, Tokens
from nabla_gfn_jax.typing import Context, TokenIds

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """What `text_encoder/config.json` says of the architecture."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "CLIPTextConfig":
        """From the parsed `text_encoder/config.json`. Raises `UserError` for a value this model does not implement."""
        only = {"hidden_act": tuple(_ACTIVATIONS), "model_type": ("clip_text_model",)}
        return read_fields(cls, fields, only=only, source="text_encoder/config.json")


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer with causal self-attention."""

    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c = self.config

        def dense(features: int, name: str) -> Dense:
            return Dense(features, dtype=self.dtype, name=name)

        h = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="layer_norm1")(x)
        per_head = (*h.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        q, k, v = (dense(c.hidden_size, f"self_attn.{n}_proj")(h).reshape(per_head) for n in "qkv")
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(c.hidden_size, "self_attn.out_proj")(h)
        h = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="layer_norm2")(x)
        h = _ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, "mlp.fc1")(h))
        return x + dense(c.hidden_size, "mlp.fc2")(h)


class CLIPTextModel(nn.Module):
    """Token ids (B, tokens) to the last hidden state after the final layer norm (B, tokens, hidden_size)."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: TokenIds) -> Context:
        c = self.config
        normal = nn.initializers.normal(0.02)

        def embed(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, c.hidden_size, dtype=self.dtype, embedding_init=normal, name=f"embeddings.{name}")

        positions = embed(c.max_position_embeddings, "position_embedding")(jnp.arange(ids.shape[1]))
        x = embed(c.vocab_size, "token_embedding")(ids) + positions[None]
        for i in range(c.num_hidden_layers):
            x = CLIPEncoderLayer(c, self.dtype, name=f"encoder.layers.{i}")(x)
        return nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
