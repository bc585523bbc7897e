"""What bfloat16 leaves of ε_θ − ε_#, which the losses multiply by up to 83; docs/performance.md has the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle

from nabla_gfn_jax.base_models.base import predictor
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion, TextFeatures
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.models import layers
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig

pytestmark = pytest.mark.slow
UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=32,
    norm_num_groups=8,
    attention_head_dim=4,
)
BATCH, STEP, GUIDANCE = 4, 48, 5.0


def random_params(rng):
    """As initialised, but no bias is zero; in bfloat16's numbers, so that only the computation differs."""
    arguments = jnp.zeros((1, 16, 16, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 8, 32))
    shapes = jax.eval_shape(UNet2DConditionModel(UNET).init, jax.random.key(0), *arguments)["params"]

    def one(path, leaf):
        size = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.1
        value = size * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(value, jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(one, shapes)


def with_ups(lora, change):
    return jax.tree_util.tree_map_with_path(lambda path, a: change(a) if path[-1].key == "up" else a, lora)


def rms(a):
    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64)))))


def test_the_error_of_the_difference(monkeypatch):
    """By subtraction, and as a derivative in the LoRA's strength at one half, whose rounding is relative to itself."""
    rng = np.random.default_rng(0)
    half = random_params(rng)
    table = TextFeatures(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((BATCH, 8, 32), (8, 32))))
    x, ids = jnp.asarray(rng.normal(size=(BATCH, 16, 16, 4)), jnp.float32), jnp.arange(BATCH)
    plain = lambda x, k, stride, padding: jax.lax.conv_general_dilated(  # noqa: E731  ours has no forward mode
        x, k, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    monkeypatch.setattr(layers, "convolve", plain)

    def functions(dtype):
        params = jax.tree.map(lambda a: a.astype(dtype), half)
        model = StableDiffusion(UNet2DConditionModel(UNET, dtype), None, None, None, STABLE_DIFFUSION, {})
        level = model.chain(50)[STEP].at.each(BATCH)

        def subtracted(params, lora):
            predict = predictor(model, {"unet": params}, table, GUIDANCE)
            base = predict(None, x, level, ids)
            return predict(lora, x, level, ids) - base, base

        def derivative(params, lora):
            predict = predictor(model, {"unet": params}, table, GUIDANCE)
            strength = lambda s: predict(with_ups(lora, lambda a: s * a), x, level, ids)  # noqa: E731
            return jax.jvp(strength, (jnp.float32(0.5),), (jnp.float32(1.0),))[1]

        lora = init_lora(jax.random.key(3), half, 8)
        with jax.numpy_dtype_promotion("standard"):
            compiled = [oracle.compile_quickly(f, params, lora) for f in (subtracted, derivative)]
        return lambda lora: (*compiled[0](params, lora), compiled[1](params, lora))

    exactly, roughly = functions(jnp.float32), functions(jnp.bfloat16)
    start = init_lora(jax.random.key(3), half, 8)
    print("\nrms(ε_θ − ε_#)/rms(ε): error of the squared difference by subtraction, as a derivative")
    for size, by_subtraction, by_derivative in ((0.002, 12.0, 0.01), (0.02, 0.12, 0.01)):
        lora = with_ups(start, lambda a, size=size: jnp.asarray(size * rng.normal(size=a.shape), jnp.float32))
        change, base, _ = exactly(lora)
        found, _, derived = roughly(lora)
        errors = [abs(rms(a) ** 2 / rms(change) ** 2 - 1) for a in (found, derived)]
        print(f"{rms(change) / rms(base):.3f}: {errors[0]:.1%}, {errors[1]:.2%}")
        assert errors[0] < by_subtraction
        assert errors[1] < by_derivative
