"""Our convolution and its hand-written gradients, compared with XLA's and PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.flops import FULL, count_flops
from nabla_gfn_jax.models.conv import convolve
from nabla_gfn_jax.models.layers import Conv

# (height, width), kernel, stride, ((top, bottom), (left, right)): each combination that the models use, then odd ones.
CASES = {
    "same": ((7, 5), 3, 1, ((1, 1), (1, 1))),
    "pointwise": ((7, 5), 1, 1, ((0, 0), (0, 0))),
    "unet-down": ((8, 6), 3, 2, ((1, 1), (1, 1))),
    "unet-down-odd": ((7, 5), 3, 2, ((1, 1), (1, 1))),
    "vae-down": ((8, 6), 3, 2, ((0, 1), (0, 1))),
    "vae-down-odd": ((7, 9), 3, 2, ((0, 1), (0, 1))),
    "valid": ((6, 4), 3, 1, ((0, 0), (0, 0))),
    "lopsided": ((5, 8), 3, 1, ((2, 0), (1, 2))),
    "stride-3": ((11, 10), 3, 3, ((0, 2), (1, 0))),
    "strided-pointwise": ((6, 7), 1, 2, ((0, 0), (0, 0))),
    "one-pixel": ((1, 1), 3, 1, ((1, 1), (1, 1))),
}


def plain(x, kernel, stride, padding):
    """The convolution without our gradients."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def values_and_gradients(functions, x, kernel, dy):
    """The value and both pull-backs of each function, compiled together, because compilation takes most of the time."""

    def run(x, kernel, dy):
        pulled = [jax.vjp(function, x, kernel) for function in functions]
        return [(y, *pull(dy)) for y, pull in pulled]

    return jax.jit(run)(x, kernel, dy)


def by_torch(x, kernel, stride, padding, dy):
    with torch.enable_grad():
        a = nchw(x).requires_grad_()
        k = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
        (top, bottom), (left, right) = padding
        y = torch.nn.functional.conv2d(torch.nn.functional.pad(a, (left, right, top, bottom)), k, stride=stride)
        y.backward(nchw(dy))
    return nhwc(y), nhwc(a.grad), k.grad.numpy().transpose(2, 3, 1, 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case):
    size, kernel_size, stride, padding = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, 3, 4)).astype(np.float32)
    y = jax.eval_shape(lambda x, k: plain(x, k, stride, padding), x, kernel)
    dy = rng.normal(size=y.shape).astype(np.float32)

    functions = [lambda x, k, f=f: f(x, k, stride, padding) for f in (convolve, plain)]
    ours, autodiff = values_and_gradients(functions, x, kernel, dy)
    for a, b, c in zip(ours, autodiff, by_torch(x, kernel, stride, padding, dy), strict=True):
        assert relative(a, b) < 2e-6
        assert relative(a, c) < 2e-6


def test_gradients_inside_a_scan_keep_their_type():
    """Gradients of bfloat16 inputs are bfloat16, as the carry of `scan` requires, and close to float32's."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 8, 8)) / 8, jnp.float32)

    def loss(x, kernel):
        def layer(h, _):
            return convolve(h, kernel, 1, ((1, 1), (1, 1))), None

        return jax.lax.scan(layer, x, length=2)[0].astype(jnp.float32).sum()

    exact = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    half = jax.jit(jax.grad(loss, argnums=(0, 1)))(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative(a.astype(jnp.float32), b) < 0.03


def test_accelerators_get_the_compilers_own_kernel_gradient():
    """On a CPU, the kernel's gradient is one product per kernel position; on a GPU it is one convolution."""
    x, kernel, dy = (jnp.zeros(shape) for shape in ((1, 4, 4, 2), (3, 3, 2, 2), (1, 4, 4, 2)))

    @jax.jit
    def kernel_gradient(x, kernel, dy):
        return jax.vjp(lambda k: convolve(x, k, 1, ((1, 1), (1, 1))), kernel)[1](dy)

    def operations(platform):
        text = kernel_gradient.trace(x, kernel, dy).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")

    assert operations("cpu")[0] == 9
    assert operations("cuda")[0] == 0
    assert operations("cuda")[1] > operations("cpu")[1]


@pytest.mark.parametrize(
    ("batch", "size", "outputs", "width"),
    [(3, (1, 1), 5, 3), (3, (2, 2), 5, 3), (3, (4, 1), 5, 3), (2, (3, 5), 31, 3), (1, (5, 6), 31, 5)],
    ids=str,
)
def test_layer_on_few_pixels(batch, size, outputs, width):
    """On a CPU it is a matrix product in both directions, with the numbers of the convolution."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, *size, 6)).astype(np.float32)
    kernel = rng.normal(size=(width, width, 6, outputs)).astype(np.float32)
    bias = rng.normal(size=(outputs,)).astype(np.float32)
    dy = rng.normal(size=(batch, *size, outputs)).astype(np.float32)

    def layer(x, kernel):
        return Conv(outputs, width, padding=width // 2).apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def expected(x, kernel):
        return plain(x, kernel, 1, ((width // 2,) * 2,) * 2) + bias.reshape(1, 1, 1, -1)

    def convolutions(platform):
        program = jax.jit(lambda x: jax.vjp(layer, x, kernel)[1](dy)).trace(x).lower(lowering_platforms=(platform,))
        return program.as_text().count("stablehlo.convolution")

    assert convolutions("cpu") == 0
    assert convolutions("tpu") == 2  # both gradients
    ours, theirs = values_and_gradients((layer, expected), x, kernel, dy)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 2e-6


def test_layer_pads_as_torch_does():
    """One number as `padding` applies to both sides of both axes. Five pixels and more use the convolution."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 5, 6, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    bias = rng.normal(size=(4,)).astype(np.float32)
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    for stride, padding in ((1, 1), (2, 1), (1, 0)):
        layer = Conv(4, stride=stride, padding=padding)
        ours = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
        theirs = torch.nn.functional.conv2d(nchw(x), weight, torch.from_numpy(bias), stride, padding)
        assert relative(ours, nhwc(theirs)) < 2e-6


def test_the_precision_that_is_set_reaches_the_gradients():
    """This holds wherever the gradients are traced: all products of a full-float32 reward are full float32."""

    def score(x, kernel):
        with jax.default_matmul_precision("highest"):
            return convolve(x, kernel, 1, ((1, 1), (1, 1))).sum()

    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    for gradient in (jax.grad(score, 0), jax.grad(score, 1)):
        counted = count_flops(gradient, x, kernel)
        assert set(counted) == {FULL}
        assert counted[FULL] > 0
    plainly = count_flops(jax.grad(lambda x: convolve(x, kernel, 1, ((1, 1), (1, 1))).sum()), x)
    assert FULL not in plainly
