"""The error of ε_θ − ε_# in bfloat16, which the losses multiply by up to 83; docs/performance.md has the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from jax.flatten_util import ravel_pytree

from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion, TextFeatures
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
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
    """Initial parameters without zero biases, rounded to bfloat16, so that only the computation differs."""
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


class Study:
    """ε_θ − ε_# less a target, and the LoRA's gradient of its mean square, in float32 by subtraction and in bfloat16 by
    subtraction and carried through the network."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.half = random_params(self.rng)
        shapes = (BATCH, 8, 32), (8, 32)
        self.table = TextFeatures(*(jnp.asarray(self.rng.normal(size=s), jnp.float32) for s in shapes))
        self.x = jnp.asarray(self.rng.normal(size=(BATCH, 16, 16, 4)), jnp.float32)
        self.start = init_lora(jax.random.key(3), self.half, 8)
        self.exact = self._compiled(jnp.float32, self._subtracted)
        self.ways = {
            "subtracted": self._compiled(jnp.bfloat16, self._subtracted),
            "carried": self._compiled(jnp.bfloat16, self._carried),
        }

    def lora(self, size):
        return with_ups(self.start, lambda a: jnp.asarray(size * self.rng.normal(size=a.shape), jnp.float32))

    def _subtracted(self, model, lora, *arguments):
        base = model.predict(arguments[0], None, *arguments[1:], GUIDANCE)
        return base, model.predict(arguments[0], lora, *arguments[1:], GUIDANCE) - base

    def _carried(self, model, lora, *arguments):
        return model.predict_change(arguments[0], lora, *arguments[1:], GUIDANCE)

    def _compiled(self, dtype, difference):
        params = {"unet": jax.tree.map(lambda a: a.astype(dtype), self.half)}
        model = StableDiffusion(UNet2DConditionModel(UNET, dtype), None, None, None, STABLE_DIFFUSION, {})
        level = model.chain(50)[STEP].at.each(BATCH)

        def term(lora, params, target):
            base, change = difference(model, lora, params, self.x, level, self.table, jnp.arange(BATCH))
            return jnp.square(change - target).mean(), (base, change)

        with jax.numpy_dtype_promotion("standard"):
            compiled = oracle.compile_quickly(jax.grad(term, has_aux=True), self.start, params, self.x)

        def run(lora, target=None):
            gradient, (base, change) = compiled(lora, params, jnp.zeros_like(self.x) if target is None else target)
            return np.asarray(ravel_pytree(gradient)[0], np.float64), base, change

        return run

    def errors(self, lora, before=None):
        """The relative errors of ‖ε_θ − ε_#‖² and its gradient for each way; with a LoRA `before`, of ‖ε_θ − ε_θ†‖²."""
        target = 0 if before is None else self.exact(before)[2]
        expected, base, change = self.exact(lora, None if before is None else target)
        moved = np.asarray(change - target)
        print(f"\nrms of the difference, of ε's: {rms(moved) / rms(base):.2%}")
        found = {}
        for name, run in self.ways.items():
            target = 0 if before is None else run(before)[2]
            gradient, _, rounded = run(lora, None if before is None else target)
            rounded = np.asarray(rounded - target)
            term = abs(rms(rounded) ** 2 / rms(moved) ** 2 - 1)
            found[name] = term, rms(gradient - expected) / rms(expected)
            each = rms(rounded - moved) / rms(moved)
            print(f"{name}: each element {each:.2%}, term {term:.2%}, gradient {found[name][1]:.2%}")
        return found


@pytest.fixture(scope="module")
def study():
    return Study()


@pytest.mark.parametrize("size", [0.0002, 0.002, 0.02, 0.1])
def test_what_the_lora_changes(study, size):
    """The LoRA changes .1 to 50 % of ε. If the change is carried, the errors do not depend on its size."""
    found = study.errors(study.lora(size))
    assert found["carried"][0] < 0.01
    assert found["carried"][1] < 0.02


def test_how_far_the_policy_moved(study):
    """λ's term: ε_θ − ε_θ†, from a LoRA that changes ε by a tenth to one a tenth stronger.

    Its rounding is relative to the two changes, not to their difference: the gradient's error was 5.3 %.
    """
    before = study.lora(0.02)
    found = study.errors(with_ups(before, lambda a: 1.1 * a), before)
    assert found["carried"][0] < 0.01
    assert found["carried"][1] < 0.1
