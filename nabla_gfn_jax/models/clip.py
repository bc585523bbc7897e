"""`CLIPTextModel`: the prompt encoder of Stable Diffusion (Radford et al. 2021), in transformers' layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from nabla_gfn_jax.models.attention import attend
from nabla_gfn_jax.models.config import check_divides, read_fields
from nabla_gfn_jax.models.layers import Dense, LayerNorm, Tokens
from nabla_gfn_jax.typing import Context, TokenIds

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The fields of `text_encoder/config.json` that describe the architecture."""

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
        """The config from the parsed file. Raises `UserError` for a value that this model does not implement."""
        only = {"hidden_act": tuple(ACTIVATIONS), "model_type": ("clip_text_model",)}
        source = "text_encoder/config.json"
        found = read_fields(cls, fields, only=only, source=source)
        check_divides(source, "num_attention_heads", found.num_attention_heads, [found.hidden_size], "hidden_size")
        return found


@runtime_checkable
class EncoderConfig(Protocol):
    """The fields of a model's config that a transformer layer needs."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """The names of a layer's parts in a checkpoint. If `qkv` has one name, the three are one matrix, in this order."""

    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.out_proj"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer. If `causal`, each token attends only to itself and earlier tokens."""

    config: EncoderConfig
    dtype: Any = jnp.float32
    causal: bool = True
    names: LayerNames = LayerNames()

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        c, names = self.config, self.names

        def dense(features: int, name: str) -> Dense:
            return Dense(features, dtype=self.dtype, name=name)

        h = LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name=names.norms[0])(x)
        parts = [dense(3 * c.hidden_size // len(names.qkv), name)(h) for name in names.qkv]
        per_head = (*h.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        q, k, v = (y.reshape(per_head) for y in (parts if len(parts) == 3 else jnp.split(parts[0], 3, axis=-1)))
        h = attend(q, k, v, is_causal=self.causal).reshape(x.shape)
        x = x + dense(c.hidden_size, names.out)(h)
        h = LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name=names.norms[1])(x)
        h = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, names.mlp[0])(h))
        return x + dense(c.hidden_size, names.mlp[1])(h)


class CLIPTextModel(nn.Module):
    """Token ids (B, tokens) → the last hidden state after the final layer norm (B, tokens, hidden_size)."""

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
        return LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
