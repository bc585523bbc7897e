"""softmax(q kᵀ / √width) v, by the implementation that suits the device and the layer."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "batch _ heads width"]
Implementation = Literal["cudnn", "whole", "in_parts"]

_MAX_SCORES = 2**26  # of one part, all heads and the whole batch: 256 MiB in float32
_MAX_LENGTHS = 1024**2  # queries times keys; below, all scores of a layer are small beside its other activations
_CUDNN_WIDTHS = range(8, 129, 8)  # of a head, on every GPU since Ampere; Hopper alone has wider ones


def implementation(q: Heads, k: Heads, *, cudnn: bool) -> Implementation:
    """How `attend` computes this layer.

    cuDNN's fused kernel, where there is a GPU to run it, takes half precision and heads up to 128 wide (Stable
    Diffusion's at 16x16 and 8x8 latents have 160), and its gradient no odd number of keys (a prompt's are 77). Others
    are XLA's: all scores at once where they are few, otherwise queries in parts.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if cudnn and half and q.shape[-1] in _CUDNN_WIDTHS and q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0:
        return "cudnn"
    return "in_parts" if q.shape[1] * k.shape[1] > _MAX_LENGTHS else "whole"


def attend(q: Heads, k: Heads, v: Heads, *, cudnn: bool = False, **masked: Any) -> Heads:
    """Attention of each head, the softmax in float32.

    `cudnn`: whether a GPU runs it. `masked`: `mask` or `is_causal` of `jax.nn.dot_product_attention`; then at once.
    """
    chosen = "whole" if masked else implementation(q, k, cudnn=cudnn)
    if chosen == "in_parts":
        return _in_parts(q, k, v)
    return _attend(q, k, v, **masked, implementation="cudnn" if chosen == "cudnn" else "xla")


def _attend(q: Array, k: Array, v: Array, **options: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code promotes bfloat16
        return jax.nn.dot_product_attention(q, k, v, **options)


def _in_parts(q: Heads, k: Heads, v: Heads) -> Heads:
    """One part of the queries after another, each over all keys; a gradient computes a part's scores again."""
    batch, queries, heads, width = q.shape
    per_query = batch * heads * k.shape[1]
    size = max(n for n in range(1, queries + 1) if queries % n == 0 and (n * per_query <= _MAX_SCORES or n == 1))
    parts = jnp.moveaxis(q.reshape(batch, queries // size, size, heads, width), 1, 0)
    part = jax.checkpoint(partial(_attend, k=k, v=v))
    return jnp.moveaxis(jax.lax.map(part, parts), 0, 1).reshape(q.shape)
