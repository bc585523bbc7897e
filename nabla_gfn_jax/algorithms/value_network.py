"""The log value of a state as a small network, learned from where paths have ended.

    V − log Z = h(a, t, prompt),     h a multilayer perceptron with residual layers, 0 when it starts

of a state's features a, of the time t from 0 to 1, and of the prompt. A state of a path has the weight W/Z, whose mean
given the state is e^{V − log Z}. The loss is the gamma regression (McCullagh & Nelder 1989, chapter 8)

    mean of  ( V − log Z + (W/Z) e^{−(V − log Z)} ),

in which only the ratio of W to its mean counts: states of low value, where the policy begins, are learned as well as
those of high value. All steps and prompts share h, so each learns from the others.

A policy follows V's gradient, which may be rough where V's values are right. In every update, a is therefore moved by
noise (Bishop 1995: this is a penalty on the gradient). The running mean of the weights is used.
"""

import functools
import itertools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.typing import Params

_HIDDEN = 3  # layers
_OCTAVES = 6  # frequencies of t: π, 2π, …, 32π
_LOWEST = -5.0  # V − log Z below which e^{−(V − log Z)} goes on as a straight line, so that no batch overflows
_AVERAGE = 0.99  # decay of the running mean of the weights, once there are many updates
_MOMENTS = 0.99  # Adam's decay of squares: the loss of a batch has heavy tails
_product = functools.partial(jnp.matmul, precision="highest")  # float32 on every device


class Points(NamedTuple):
    """What h sees of states."""

    features: Float[np.ndarray, "n d"]
    time: Float[np.ndarray, " n"]
    prompt_id: Int[np.ndarray, " n"]


@flax.struct.dataclass
class Network:
    """h, its running mean, and its optimizer's moments."""

    weights: Params
    average: Params
    moments: optax.OptState
    updates: Int[np.ndarray, ""]

    @classmethod
    def new(cls, size: int, width: int, num_prompts: int, seed: int) -> "Network":
        """h before its first update, for `size` features; it is 0 everywhere."""
        random = np.random.default_rng(seed)
        sizes = [size + 1 + 2 * _OCTAVES] + [width] * _HIDDEN

        def matrix(rows: int, columns: int) -> Array:
            return (random.normal(size=(rows, columns)) / np.sqrt(rows)).astype(np.float32)

        weights = {
            "layers": [(matrix(a, b), np.zeros(b, np.float32)) for a, b in itertools.pairwise(sizes)],
            "prompts": np.zeros((num_prompts, width), np.float32),
            "out": (np.zeros(width, np.float32), np.zeros((), np.float32)),
        }
        moments = jax.tree.map(np.asarray, optax.adam(1.0, b2=_MOMENTS).init(weights))
        return cls(weights, jax.tree.map(np.copy, weights), moments, np.zeros((), np.int64))


def log_value(weights: Params, points: Points) -> Float[Array, " n"]:
    """V − log Z."""
    t = jnp.asarray(points.time)[:, None]
    waves = t * (np.pi * 2.0 ** np.arange(_OCTAVES)).astype(np.float32)[None]
    seen = [jnp.asarray(points.features), t, jnp.sin(waves), jnp.cos(waves)]
    (first, bias), *others = weights["layers"]
    h = jax.nn.silu(_product(jnp.concatenate(seen, axis=-1), first) + bias[None] + weights["prompts"][points.prompt_id])
    for matrix, bias in others:
        h = h + jax.nn.silu(_product(h, matrix) + bias[None])
    last, bias = weights["out"]
    return _product(h, last) + bias


def gamma_loss(v: Float[Array, " n"], ratio: Float[Array, " n"]) -> Float[Array, ""]:
    """The mean of v + ratio · e^{−v}, `ratio` being W/Z, with its tangent below v = −5."""
    above = jnp.maximum(v, _LOWEST)
    return (v + ratio * jnp.exp(-above) * (1 + above - v)).mean()


@functools.partial(jax.jit, static_argnames="rate")
def updated(
    network: Network,
    points: Points,
    ratio: Float[np.ndarray, " n"],
    noise: Float[np.ndarray, " d"],
    key: Array,
    *,
    rate: float,
) -> Network:
    """h after one update on states with W/Z = `ratio`. `noise` is the standard deviation of each feature's noise."""
    moved = points._replace(features=points.features + noise[None] * jax.random.normal(key, points.features.shape))
    slope = jax.grad(lambda weights: gamma_loss(log_value(weights, moved), jnp.asarray(ratio)))(network.weights)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
        change, moments = optax.adam(rate, b2=_MOMENTS).update(slope, network.moments)
        weights: Params = optax.apply_updates(network.weights, change)  # type: ignore[assignment]
        kept = jnp.minimum(_AVERAGE, network.updates / (network.updates + 10))
        average = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, network.average, weights)
    return Network(weights, average, moments, network.updates + 1)


@jax.jit
def values(network: Network, points: Points) -> Float[Array, " n"]:
    """V − log Z, by the running mean of the weights."""
    return log_value(network.average, points)


@jax.jit
def gradients(network: Network, points: Points) -> Float[Array, "n d"]:
    """∂V/∂features, by the running mean of the weights."""
    return jax.grad(lambda a: log_value(network.average, points._replace(features=a)).sum())(points.features)
