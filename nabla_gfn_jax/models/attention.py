"""Attention, softmax(q kᵀ / √width) v, with an implementation that depends on the device and the layer."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.pair import Pair, Paired, filled, policy

Heads = Float[Array, "batch _ heads width"]
Implementation = Literal["cudnn", "whole", "in_parts", "by_head"]

_MAX_SCORES = 2**26  # the most scores of one part, over all heads and the whole batch: 256 MiB in float32
_MAX_LENGTHS = 1024**2  # queries times keys; below, the scores of a layer are small beside its other activations
_CPU_SCORES = 2**22  # the most scores of one part of one head: 16 MiB in float32, about the size of a cache
_CPU_LENGTHS = 2**17  # queries times keys; below, one head at a time is no faster
_CUDNN_WIDTHS = range(8, 129, 8)  # head widths on every GPU since Ampere; only Hopper supports wider heads


def implementation(q: Heads, k: Heads, *, platform: str) -> Implementation:
    """The implementation with which `attend` computes a layer.

    cuDNN's fused kernel on GPUs needs half precision and heads up to 128 wide (Stable Diffusion's heads at 16x16 and
    8x8 latents are 160 wide). Its gradient needs an even number of keys (a prompt has 77). All other layers use XLA:
    all scores simultaneously if they are few, otherwise the queries in parts, and on a CPU one head at a time.
    """
    lengths = q.shape[1] * k.shape[1]
    if platform == "cpu":
        return "by_head" if lengths > _CPU_LENGTHS else "whole"
    half, even = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[1] % 2 == k.shape[1] % 2 == 0
    if platform in ("gpu", "cuda") and half and even and q.shape[-1] in _CUDNN_WIDTHS:
        return "cudnn"
    return "in_parts" if lengths > _MAX_LENGTHS else "whole"


def attend(
    q: Heads | Paired, k: Heads | Paired, v: Heads | Paired, *, platform: str | None = None, **masked: Any
) -> Heads | Paired:
    """Attention of each head, (B, queries, heads, width), with the softmax in float32. Three pairs give a pair.

    `platform` is "cpu", "gpu" or "tpu"; None means JAX's default. `masked` are `mask` or `is_causal` of
    `jax.nn.dot_product_attention`; with them all scores are computed simultaneously.
    """
    if isinstance(q, Pair):
        return _in_parts(q, k, v, _attend_pair) if q.shape[1] * k.shape[1] > _MAX_LENGTHS else _attend_pair(q, k, v)
    chosen = "whole" if masked else implementation(q, k, platform=platform or jax.default_backend())
    if chosen == "in_parts":
        return _in_parts(q, k, v)
    if chosen == "by_head":
        return _by_head(q, k, v)
    return _attend(q, k, v, **masked, implementation="cudnn" if chosen == "cudnn" else "xla")


def _attend(q: Array, k: Array, v: Array, **options: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code promotes bfloat16
        return jax.nn.dot_product_attention(q, k, v, **options)


def _attend_pair(q: Paired, k: Paired, v: Paired) -> Pair:
    """With scores S and probabilities P: δS = δq (k + δk)ᵀ + q δkᵀ and δy = P δv + δP (v + δv), δP in float32.

    Operands are concatenated if their products are added or share a factor. This gives four products, two of them with
    twice the width. The attentions of two separate networks also have four.
    """
    q, k, v = filled(q), filled(k), filled(v)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    width = q.shape[-1]
    scores = product("bqhw,bkhw->bhqk", q.base, k.base) * width**-0.5
    both = (jnp.concatenate(pair, axis=-1) for pair in ((q.change, q.base), (policy(k), k.change)))
    before, after = jax.nn.softmax(scores), jax.nn.softmax(scores + product("bqhw,bkhw->bhqk", *both) * width**-0.5)
    kind = v.base.dtype
    old = product("bhqk,bkhw->bqhw", before.astype(kind), jnp.concatenate([v.base, v.change], axis=-1))
    base, change = jnp.split(old, 2, axis=-1)
    change = change + product("bhqk,bkhw->bqhw", (after - before).astype(kind), policy(v))
    return Pair(base.astype(kind), change.astype(kind))


def _in_parts(q: Any, k: Any, v: Any, attend: Callable[..., Any] = _attend) -> Any:
    """Attention for one part of the queries at a time, over all keys. The gradient recomputes the scores of a part."""
    batch, queries, heads, width = q.shape
    size = _part(queries, batch * heads * k.shape[1], _MAX_SCORES)

    def cut(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(batch, queries // size, size, heads, width), 1, 0)

    def joined(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(batch, queries, heads, width)

    part = jax.checkpoint(partial(attend, k=k, v=v))
    return jax.tree.map(joined, jax.lax.map(part, jax.tree.map(cut, q)))


def _by_head(q: Heads, k: Heads, v: Heads) -> Heads:
    """Attention for one head of one image at a time, with matrix products that are fast in XLA's CPU compiler."""
    batch, queries, heads, width = q.shape
    size = _part(queries, k.shape[1], _CPU_SCORES)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv

        @jax.checkpoint
        def part(q: Array) -> Array:
            scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * width**-0.5
            return jax.nn.softmax(scores).astype(v.dtype) @ v

        return jax.lax.map(part, q.reshape(-1, size, width)).reshape(queries, width)

    rows = tuple(jnp.moveaxis(a, 2, 1).reshape(batch * heads, -1, width) for a in (q, k, v))
    return jnp.moveaxis(jax.lax.map(head, rows).reshape(batch, heads, queries, width), 1, 2)


def _part(queries: int, scores_of_each: int, most: int) -> int:
    """The largest divisor of `queries` for which a part has at most `most` scores; 1 if there is none."""
    sizes = [n for n in range(1, queries + 1) if queries % n == 0 and n * scores_of_each <= most]
    return max(sizes, default=1)
