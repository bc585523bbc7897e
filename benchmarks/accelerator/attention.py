"""Measures each implementation of attention at Stable Diffusion 1.5's shapes: value and gradient."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.sizes import Weights
from benchmarks.accelerator.worker import Worker, seconds
from nabla_gfn_jax.models import attention

# (images, queries, keys, heads, width): the UNet at 64, 32 and 16 latents, its cross-attention, and the VAE.
_SHAPES = (
    (8, 4096, 4096, 8, 40),
    (8, 1024, 1024, 8, 80),
    (8, 256, 256, 8, 160),
    (8, 4096, 77, 8, 40),
    (2, 4096, 4096, 1, 512),
)
_SMALL = ((2, 64, 64, 2, 8), (2, 64, 7, 2, 8))


def run(worker: Worker, stage: str) -> None:
    """Measures in bfloat16."""
    platform = jax.local_devices()[0].platform
    ways: dict[str, Callable[..., Any]] = {
        "whole": lambda q, k, v: attention._attend(q, k, v, implementation="xla"),
        "in_parts": attention._in_parts,
        "cudnn": lambda q, k, v: attention._attend(q, k, v, implementation="cudnn"),
    }
    if platform != "gpu":
        del ways["cudnn"]
    weights = Weights(length=2**22)
    cases = [(shape, name) for shape in (_SMALL if worker.small else _SHAPES) for name in ways]
    with ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda c: worker.attempt(_what(*c), lambda: _build(ways[c[1]], _inputs(c[0]))), cases))
    worker.wait("ready")
    for (shape, name), programs in zip(cases, built, strict=True):
        if programs:
            qkv = [jnp.asarray(weights.normal(a.shape), a.dtype) for a in _inputs(shape)]
            chosen = name == attention.implementation(*qkv[:2], platform=platform)
            measure = lambda n=name, s=shape, p=programs, a=qkv, c=chosen: _time(worker, _what(s, n), p, a, c)  # noqa: E731
            worker.attempt(_what(shape, name), measure)


def _what(shape: tuple[int, ...], name: str) -> str:
    images, queries, keys, heads, width = shape
    return f"{images} images, {queries} to {keys} tokens, {heads} heads of {width}: {name}"


def _inputs(shape: tuple[int, ...]) -> list[Any]:
    images, queries, keys, heads, width = shape
    return [jax.ShapeDtypeStruct((images, length, heads, width), jnp.bfloat16) for length in (queries, keys, keys)]


def _build(way: Callable[..., Any], qkv: list[Any]) -> dict[str, Any]:
    def both(*qkv: Any) -> Any:
        out, pull = jax.vjp(way, *qkv)
        return pull(out)

    functions = {"forward_ms": way, "with_gradient_ms": both}
    return {name: jax.jit(function).lower(*qkv).compile() for name, function in functions.items()}


def _time(worker: Worker, what: str, programs: dict[str, Any], qkv: list[Any], chosen: bool) -> None:
    taken = {
        name: min(seconds(lambda f=f: jax.block_until_ready(f(*qkv)), rounds=5, enough=0.5))
        for name, f in programs.items()
    }
    worker.row(what, "which is what is chosen" if chosen else "", **{name: 1e3 * t for name, t in taken.items()})
