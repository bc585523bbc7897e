"""FLOPs compared with counts by hand and by XLA; loops and collectives in the text of a compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from nabla_gfn_jax import parallel
from nabla_gfn_jax.flops import FULL, count_flops
from nabla_gfn_jax.models.attention import attend
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.planning.hlo import traffic


def total(function, *arguments):
    return sum(count_flops(function, *arguments).values())


def test_products_convolutions_and_loops():
    """By hand: 2·m·k·n a product, 2·outputs·(k²·channels) a convolution; a scan repeats, a `cond` takes one branch."""
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert total(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    image, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6, 7))
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert total(convolve, image, kernel) == 2 * (2 * 4 * 4 * 7) * (9 * 6)
    square = jnp.ones((4, 4))
    repeated = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=11)[0]  # noqa: E731
    assert total(repeated, square) == 11 * 2 * 4**3
    either = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x, x)  # noqa: E731
    assert total(either, square) == 2 * 2 * 4**3
    assert total(lambda x: (x @ x, x)[1], square) == 0  # nobody uses it
    full = lambda x: jnp.matmul(x, x, precision="highest")  # noqa: E731
    assert count_flops(lambda x: full(x) @ x, square) == {FULL: 2 * 4**3, "float32": 2 * 4**3}


def test_cudnn_attention_counts_as_its_products(monkeypatch):
    """A GPU's kernel computes the products of plain attention, and the backward pass computes the scores again."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((2, n, 8, 40), jnp.bfloat16) for n in (256, 128))

    def pull(platform, q, k, v):
        return jax.vjp(partial(attend, platform=platform), q, k, v)[1](q)

    with jax.numpy_dtype_promotion("standard"):
        value = total(partial(attend, platform="gpu"), q, k, k)
        assert value == total(partial(attend, platform="tpu"), q, k, k) == 2 * 2 * (2 * 8 * 256 * 128 * 40)
        again = 2 * (2 * 8 * 256 * 128 * 40)
        assert total(partial(pull, "gpu"), q, k, k) - value == 2 * value + again


def test_a_device_part_is_counted_under_shard_map():
    mesh = parallel.all_devices()
    halves = parallel.split(lambda x, w: x @ w, mesh, (parallel.SPLIT, parallel.EVERYWHERE), parallel.SPLIT)
    assert total(halves, jnp.ones((16, 4)), jnp.ones((4, 4))) == 2 * 16 // mesh.size * 4 * 4


def sd15_forward_flops(pixels: int = 64, tokens: int = 77) -> float:
    """FLOPs of Stable Diffusion 1.5's UNet on one latent, from the sizes of its architecture."""
    widths, time, context = (320, 640, 1280, 1280), 1280, 768
    count = 2 * (320 * time + time * time)  # time embedding

    def resnet(n, before, after):
        return 2 * n * 9 * (before + after) * after + 2 * time * after + (2 * n * before * after) * (before != after)

    def attend(n, c):
        own = 2 * n * c * c * 4 + 4 * n * n * c  # q, k, v, out; scores and their product with v
        cross = 2 * n * c * c * 2 + 2 * tokens * context * c * 2 + 4 * n * tokens * c
        return own + cross + 2 * n * c * (8 * c + 4 * c) + 2 * 2 * n * c * c  # feed-forward; proj_in, proj_out

    count += 2 * pixels**2 * 9 * 4 * 320
    skips, width, size = [320], 320, pixels
    for level, after in enumerate(widths):
        for _ in range(2):
            count += resnet(size**2, width, after) + (attend(size**2, after) if level < 3 else 0)
            width = after
            skips.append(width)
        if level < 3:
            size //= 2
            count += 2 * size**2 * 9 * width * width
            skips.append(width)
    count += 2 * resnet(size**2, width, width) + attend(size**2, width)
    for level, after in enumerate(reversed(widths)):
        for _ in range(3):
            count += resnet(size**2, width + skips.pop(), after) + (attend(size**2, after) if level > 0 else 0)
            width = after
        if level < 3:
            size *= 2
            count += 2 * size**2 * 9 * width * width
    return count + 2 * pixels**2 * 9 * 320 * 4


@pytest.mark.thorough
def test_stable_diffusions_unet_at_full_size():
    model = UNet2DConditionModel(UNetConfig(), jnp.bfloat16)
    inputs = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 77, 768))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = count_flops(model.apply, params, *inputs)
    assert counted["bfloat16"] == pytest.approx(sd15_forward_flops(), rel=1e-3)
    assert sum(counted.values()) == pytest.approx(sd15_forward_flops(), rel=1e-3)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_xlas_count_of_the_same_program():
    """The counts agree within 5 %.

    XLA also counts small operations, and counts loops once, so there is no loop here.
    """
    a, b = jnp.ones((64, 256)), jnp.ones((256, 256))
    function = lambda a, b: jnp.tanh(jnp.tanh(a @ b) @ b).sum()  # noqa: E731
    gradient = jax.grad(function, (0, 1))
    assert total(gradient, a, b) == pytest.approx(compiled(gradient, a, b).cost_analysis()["flops"], rel=0.05)


def test_a_programs_traffic_multiplies_loops():
    """Checks the bytes of a nested loop of 5 x 3 products of 64 x 64, and an all-reduce in the outer loop."""
    mesh = parallel.all_devices()

    def work(x):
        def outer(x, _):
            x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)
            return jax.lax.psum(x, parallel.AXIS) / 8, None

        return jax.lax.scan(outer, x, None, length=5)[0]

    program = parallel.split(work, mesh, parallel.EVERYWHERE, parallel.EVERYWHERE)
    found = traffic(program.lower(jnp.ones((64, 64))).compile().as_text())
    matrix = 64 * 64 * 4
    assert found.collectives == {"all-reduce": (5, 5.0 * matrix)}
    assert found.unknown_loops == 0
    assert 15 * 2 * matrix <= found.bytes <= 15 * 12 * matrix


def test_a_loop_whose_trips_only_its_condition_tells():
    """As in TPU programs, there is no `known_trip_count`, but a counter is compared with a constant."""
    text = """
%cond.1 (p.1: (s32[], f32[256])) -> pred[] {
  %c.1 = s32[] constant(7), metadata={op_name="x"}
  %p.1 = (s32[], f32[256]{0:T(256)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[] compare(%i.1, %c.1), direction=LT
}

%body.1 (p.2: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p.2 = (s32[], f32[256]{0:T(256)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %x.2 = f32[256]{0:T(256)} get-tuple-element(%p.2), index=1
  %y.2 = f32[256]{0:T(256)} negate(%x.2), backend_config={"estimated_cycles":"100"}
  ROOT %t.2 = (s32[], f32[256]{0:T(256)}) tuple(%i.2, %y.2)
}

ENTRY %main.1 (a: (s32[], f32[256])) -> (s32[], f32[256]) {
  %a = (s32[], f32[256]{0:T(256)}) parameter(0)
  ROOT %w = (s32[], f32[256]{0:T(256)}) while(%a), condition=%cond.1, body=%body.1
}
"""
    found = traffic(text)
    assert found.cycles == 700
    assert found.unknown_loops == 0
    assert found.bytes == 7 * 2 * 1024 + 7 * (4 + 4 + 1)  # and the counter's comparison
    assert traffic(text.replace("direction=LT", "direction=NE")).unknown_loops == 1
