"""softmax(q kᵀ / √width) v, by the implementation that suits the device and the layer."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.pair import Pair, Paired, filled, policy

Heads = Float[Array, "batch _ heads width"]
Implementation = Literal["cudnn", "whole", "in_parts", "by_head"]

_MAX_SCORES = 2**26  # of one part, all heads and the whole batch: 256 MiB in float32
_MAX_LENGTHS = 1024**2  # queries times keys; below, all scores of a layer are small beside its other activations
_CPU_SCORES = 2**22  # of one part of one head: 16 MiB in float32, about a cache
_CPU_LENGTHS = 2**17  # queries times keys; below, a head at a time gains nothing
_CUDNN_WIDTHS = range(8, 129, 8)  # of a head, on every GPU since Ampere; Hopper alone has wider ones


def implementation(q: Heads, k: Heads, *, platform: str) -> Implementation:
    """How `attend` computes this layer.

    cuDNN's fused kernel, where there is a GPU to run it, takes half precision and heads up to 128 wide (Stable
    Diffusion's at 16x16 and 8x8 latents have 160), and its gradient no odd number of keys (a prompt's are 77). Others
    are XLA's: all scores at once where they are few, otherwise queries in parts, on a CPU of one head after another.
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
    """Attention of each head, the softmax in float32; of three pairs a pair.

    `platform`: what runs it, "cpu", "gpu" or "tpu"; where JAX runs when None. `masked`: `mask` or `is_causal` of
    `jax.nn.dot_product_attention`; then all scores at once.
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

    Operands lie side by side where their products are added or share a factor: of products this makes four, as many as
    the two networks' own attentions have, two of them with twice the width.
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
    """One part of the queries after another, each over all keys; a gradient computes a part's scores again."""
    batch, queries, heads, width = q.shape
    size = _part(queries, batch * heads * k.shape[1], _MAX_SCORES)

    def cut(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(batch, queries // size, size, heads, width), 1, 0)

    def joined(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(batch, queries, heads, width)

    part = jax.checkpoint(partial(attend, k=k, v=v))
    return jax.tree.map(joined, jax.lax.map(part, jax.tree.map(cut, q)))


def _by_head(q: Heads, k: Heads, v: Heads) -> Heads:
    """The same, of one head of one image at a time, in matrix products that XLA's CPU compiler does well."""
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
    """The most queries at a time, a divisor of all, whose scores are at most `most`; 1 if there is none."""
    sizes = [n for n in range(1, queries + 1) if queries % n == 0 and n * scores_of_each <= most]
    return max(sizes, default=1)
