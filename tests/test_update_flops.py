"""The cost of an update relative to the naive program, by XLA's count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_program import naive_value_and_grad
from test_nabla_db import CHAIN, first_update, sample_keys

from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.diffusion.sampler import sample

pytestmark = pytest.mark.thorough


def _conv_model(width=48):
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=(3, 3, a, b)) / a**0.5 / 3, jnp.float32) for a, b in _conv_sizes(width)]

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def predict(lora, x, level, condition):
        for i, kernel in enumerate(kernels):
            hidden = convolve(x, kernel)
            if lora is not None:
                hidden = hidden + x @ lora[i]["down"] @ lora[i]["up"]
            x = jnp.tanh(hidden) if i < len(kernels) - 1 else hidden
        return x

    lora = [
        {"down": jnp.asarray(rng.normal(size=(a, 2)), jnp.float32), "up": jnp.zeros((2, b), jnp.float32)}
        for a, b in _conv_sizes(width)
    ]
    heads = {"correction": lambda phi, x, level, prompt_id: phi * x}
    model = Model(CHAIN, predict, lambda z, c: (z**3).reshape(len(z), -1).sum(1), heads)
    return model, {"lora": lora, "correction": jnp.float32(0.5)}


def _conv_sizes(width):
    return [(2, width), (width, width), (width, width), (width, width), (width, 2)]


def _flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_flops_of_an_update():
    """The naive program makes 8 network passes per transition; ours makes 7, and 3 at the last: 38/48."""
    model, params = _conv_model()
    shape = (8, 8, 2)
    ids, weight = jnp.arange(2), jnp.ones(2)
    trajectory = sample(model.predict, None, CHAIN, sample_keys(2), shape, ids)
    algorithm = ResidualNablaDB(beta=1.0)
    chosen = first_update(algorithm.batch(params, model, Rollout(trajectory, weight, ids, sample_keys(2)), 1))
    whole = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), flatten(chosen.ordinary), chosen.last)
    ours = _flops(lambda p, c: algorithm.value_and_grad(p, model, c, weight), params, chosen)
    naive = _flops(lambda p, c: naive_value_and_grad(algorithm, p, model, c), params, whole)
    guess = ResidualNablaDB(beta=1.0, credit="guess")
    forward_only = _flops(lambda p, c: guess.value_and_grad(p, model, c, weight), params, chosen)
    forward = _flops(lambda p, x: model.predict(p["lora"], x, None, ()), params, whole.x)
    print(
        f"passes a transition: naive {naive / forward:.2f}, lookahead {ours / forward:.2f}, "
        f"guess {forward_only / forward:.2f}; lookahead/naive {ours / naive:.3f}"
    )
    assert ours <= 0.82 * naive
    assert forward_only <= 0.62 * naive
