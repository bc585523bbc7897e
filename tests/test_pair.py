"""The change of a network's output by a LoRA, carried through it, equals the difference of two float32 evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict, unflatten_dict
from test_precision import UNET, random_params, rms, with_ups

from nabla_gfn_jax.base_models.base import change_predictor
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion, TextFeatures
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.models.pair import Pair, changed, linear, nonlinear, policy
from nabla_gfn_jax.models.unet import UNet2DConditionModel

pytestmark = pytest.mark.thorough

BATCH = 2


def random_lora(rng, params, kind):
    """A random LoRA of every attention, of self-attention only, or also of convolutions and the time embedding."""
    lora = flatten_dict(init_lora(jax.random.key(0), params, 4))
    if kind == "self-attention":
        lora = {path: leaf for path, leaf in lora.items() if "attn2" not in str(path)}
    if kind == "everything":
        for path, kernel in flatten_dict(params).items():
            if path[-1] == "kernel" and (*path[:-1], "down") not in lora:
                lora[*path[:-1], "down"] = jnp.asarray(rng.normal(size=(*kernel.shape[:-1], 4)) / 20, jnp.float32)
                lora[*path[:-1], "up"] = jnp.zeros((4, kernel.shape[-1]))
    return with_ups(unflatten_dict(lora), lambda a: 0.1 * jnp.asarray(rng.normal(size=a.shape), a.dtype))


@pytest.mark.parametrize("kind", ["attention", "self-attention", "everything"])
def test_the_change_and_its_pull_backs(kind):
    """Compares with two evaluations for a LoRA that changes the output by a fifth or more, with remat."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), random_params(rng))
    model = StableDiffusion(UNet2DConditionModel(UNET, remat=True), None, None, None, STABLE_DIFFUSION, {})
    table = TextFeatures(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 8, 32), (8, 32))))
    normal = lambda: jnp.asarray(rng.normal(size=(BATCH, 8, 8, 4)), jnp.float32)  # noqa: E731
    where = model.chain(50)[40].at.each(BATCH), table, jnp.asarray([2, 0]), 5.0
    lora = random_lora(rng, params, kind)

    def separately(params, lora, x):
        base = model.predict({"unet": params}, None, x, *where)
        return base, model.predict({"unet": params}, lora, x, *where) - base

    def together(params, lora, x):
        return model.predict_change({"unet": params}, lora, x, *where)

    x, cotangents = normal(), (normal(), normal())

    def with_pull_back(function):
        def run(params, lora, x):
            found, pull = jax.vjp(lambda lora, x: function(params, lora, x), lora, x)
            return *found, *pull(cotangents)

        with jax.numpy_dtype_promotion("standard"):
            return oracle.compile_quickly(run, params, lora, x)(params, lora, x)

    expected, found = with_pull_back(separately), with_pull_back(together)
    assert rms(expected[1]) > 0.2 * rms(expected[0])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert rms(ours - theirs) < 1e-5 * rms(theirs) + 1e-12


def test_in_float32_outputs_are_subtracted():
    unets = {dtype: UNet2DConditionModel(UNET, dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    models = {d: StableDiffusion(unet, None, None, None, STABLE_DIFFUSION, {}) for d, unet in unets.items()}
    assert change_predictor(models[jnp.float32], {}, None, 1.0) is None
    assert change_predictor(models[jnp.bfloat16], {}, None, 1.0) is not None


def test_a_small_change_of_a_large_number_is_not_lost():
    """In bfloat16, 1 + 1e-4 is 1, so tanh shows no difference.

    In a pair, the change has only its own rounding error.
    """
    x = Pair(jnp.full(4, 1.0, jnp.bfloat16), jnp.full(4, 1e-4, jnp.bfloat16))
    y = nonlinear(jnp.tanh, linear(lambda a: 3 * a, x) + jnp.full(4, -2.5, jnp.bfloat16))
    slope = 1 - np.tanh(0.5) ** 2
    np.testing.assert_allclose(np.asarray(y.change, np.float64), 3e-4 * slope, rtol=2 * 2**-8)


def test_what_the_lora_does_not_change_costs_nothing():
    x, ones = Pair(jnp.ones(3)), jnp.ones(3)
    assert linear(lambda a: 2 * a, x).change is None
    assert nonlinear(jnp.tanh, x + x + ones).change is None
    joined = linear(lambda *a: jnp.concatenate(a), x, changed(x, 0.5 * ones))
    np.testing.assert_array_equal(joined.change, [0, 0, 0, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(policy(joined), [1, 1, 1, 1.5, 1.5, 1.5])
