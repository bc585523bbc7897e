"""Implementations of attention: equal numbers, memory of a part, and programs for devices that are not attached."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.models import attention
from nabla_gfn_jax.models.attention import attend, implementation
from nabla_gfn_jax.models.pair import Pair, policy

RNG = np.random.default_rng(0)


def heads(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def by_definition(q, k, v):
    """softmax(q kᵀ / √width) v in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bqhw,bkhw->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhw->bqhw", weights / weights.sum(-1, keepdims=True), v)


def distance(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("platform", "chosen", "of_a_query"), [("tpu", "in_parts", 2 * 3 * 11), ("cpu", "by_head", 11)]
)
def test_in_parts_is_attention(monkeypatch, platform, chosen, of_a_query):
    """Compares values with the definition, and gradients with attention in one part, for 7 parts of 5 queries."""
    q, k, v = heads(2, 35, 3, 8), heads(2, 11, 3, 8), heads(2, 11, 3, 8)
    cotangent = heads(2, 35, 3, 8)
    split = partial(attend, platform=platform)
    assert implementation(q, k, platform=platform) == "whole"
    whole, pull_whole = jax.vjp(split, q, k, v)
    for name in ("_MAX_LENGTHS", "_CPU_LENGTHS"):
        monkeypatch.setattr(attention, name, 1)
    for name in ("_MAX_SCORES", "_CPU_SCORES"):
        monkeypatch.setattr(attention, name, 5 * of_a_query + 1)
    assert implementation(q, k, platform=platform) == chosen
    parts, pull = jax.vjp(split, q, k, v)
    assert "length=7" in str(jax.make_jaxpr(split)(q, k, v))
    assert distance(whole, by_definition(q, k, v)) < 1e-6
    assert distance(parts, by_definition(q, k, v)) < 1e-6
    for ours, theirs in zip(pull(cotangent), pull_whole(cotangent), strict=True):
        assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("parts", [1, 7])
def test_what_a_change_of_all_three_does(monkeypatch, parts):
    """Compares the base's attention and its change with two separate attentions, in one part and in 7 parts of 5
    queries.
    """
    q, k, v = (Pair(heads(2, n, 3, 8), 0.5 * heads(2, n, 3, 8)) for n in (35, 11, 11))
    if parts > 1:
        monkeypatch.setattr(attention, "_MAX_LENGTHS", 1)
        monkeypatch.setattr(attention, "_MAX_SCORES", 5 * 2 * 3 * 11 + 1)
    traced_anew = lambda *qkv: attend(*qkv)  # noqa: E731
    in_parts = "length=7" in str(jax.make_jaxpr(traced_anew)(q, k, v))
    assert in_parts == (parts == 7)
    found = traced_anew(q, k, v)
    base = by_definition(q.base, k.base, v.base)
    assert distance(found.base, base) < 1e-6
    assert distance(found.change, by_definition(*map(policy, (q, k, v))) - base) < 2e-6


@pytest.mark.parametrize(
    ("queries", "keys", "width", "dtype", "platform", "chosen"),
    [
        (4096, 4096, 40, jnp.bfloat16, "gpu", "cudnn"),  # Stable Diffusion at 512 pixels, by level
        (1024, 1024, 80, jnp.bfloat16, "gpu", "cudnn"),
        (256, 256, 160, jnp.bfloat16, "gpu", "whole"),  # too wide a head
        (4096, 77, 40, jnp.bfloat16, "gpu", "whole"),  # an odd number of keys has no gradient
        (4096, 4096, 40, jnp.float32, "gpu", "in_parts"),  # no kernel for float32
        (4096, 4096, 40, jnp.bfloat16, "tpu", "in_parts"),
        (1024, 1024, 80, jnp.bfloat16, "tpu", "whole"),
        (4096, 4096, 512, jnp.bfloat16, "gpu", "in_parts"),  # the VAE's one head
        (4096, 4096, 40, jnp.float32, "cpu", "by_head"),
        (1024, 1024, 40, jnp.float32, "cpu", "by_head"),
        (257, 257, 80, jnp.float32, "cpu", "whole"),
    ],
)
def test_the_choice_by_layer(queries, keys, width, dtype, platform, chosen):
    q, k = (jnp.zeros((1, n, 2, width), dtype) for n in (queries, keys))
    assert implementation(q, k, platform=platform) == chosen


def lowered(platform: str, width: int) -> str:
    """The lowered gradient of self-attention over 4096 pixels, for a platform that need not be attached."""
    dtype = jnp.float32 if platform == "cuda" else jnp.bfloat16  # of which cuDNN would have the scores to itself
    q = jax.ShapeDtypeStruct((16, 4096, 8, width), dtype)

    def gradient(q, k, v):
        return jax.grad(lambda q: attend(q, k, v, platform=platform).astype(jnp.float32).sum())(q)

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(gradient).trace(q, q, q).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
@pytest.mark.parametrize("width", [40, 64])
def test_no_platform_keeps_all_scores(platform, width):
    """No tensor of the program has 4096 x 4096 numbers per head; a part has at most 2^26."""
    program = lowered(platform, width)
    sizes = [
        np.prod([int(n) for n in shape.split("x")[:-1]], dtype=float)
        for shape in set(re.findall(r"tensor<([\dx]+x[a-z]+\d+)>", program))
    ]
    assert max(sizes) <= 2**26
    assert 2**22 in sizes if platform == "cpu" else max(sizes) >= 2**25  # and a part is not tiny


def test_cudnn_is_lowered_to_its_own_kernel(monkeypatch):
    """Lowers forward and backward passes without a GPU and without cuDNN, of which only the version is needed."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((2, 256, 8, 40), jnp.bfloat16)
    loss = lambda q, k, v: attend(q, k, v, platform="gpu").astype(jnp.float32).sum()  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        text = jax.jit(jax.grad(loss)).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    with jax.numpy_dtype_promotion("standard"):
        wide = jax.ShapeDtypeStruct((2, 256, 8, 160), jnp.bfloat16)
        traced = jax.jit(partial(attend, platform="gpu")).trace(wide, wide, wide)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text
