"""2-D convolution whose gradients stay fast inside `lax.scan` on a CPU.

XLA's CPU compiler lowers a convolution in a loop body to its fast kernel only in the layout NHWC · HWIO. The
transposed convolutions that autodiff makes are not in it and fall to a loop nest: 9 times slower for the input's
gradient, 25 times for the kernel's (64x8x8x64, 3x3). So both are written here in forms that are fast everywhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
_X = Float[Array, "batch height width inputs"]
_K = Float[Array, "kernel_height kernel_width inputs outputs"]


def _forward(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: _X, kernel: _K, stride: int, padding: Padding) -> Float[Array, "batch out_height out_width outputs"]:
    """Cross-correlation as in torch. `padding`: ((top, bottom), (left, right)) zeros, each at most kernel size - 1."""
    return _forward(x, kernel, stride, padding)


def _save(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _forward(x, kernel, stride, padding), (x, kernel)


def _pull_back(stride: int, padding: Padding, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return _input_gradient(x.shape, kernel, stride, padding, dy), _kernel_gradient(x, kernel.shape, stride, padding, dy)


def _input_gradient(shape: tuple[int, ...], kernel: Array, stride: int, padding: Padding, dy: Array) -> Array:
    """The full correlation of `dy`, its rows and columns spread by the stride, with the mirrored kernel."""
    borders = []
    for axis in (0, 1):
        spread = (dy.shape[1 + axis] - 1) * stride + 1
        low = kernel.shape[axis] - 1 - padding[axis][0]
        borders.append((low, shape[1 + axis] + kernel.shape[axis] - 1 - spread - low, stride - 1))
    zero = jnp.zeros((), dy.dtype)
    spread_out = jax.lax.pad(dy, zero, [(0, 0, 0), *borders, (0, 0, 0)])
    mirrored = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return _forward(spread_out, mirrored, 1, ((0, 0), (0, 0)))


def _kernel_gradient(x: Array, shape: tuple[int, ...], stride: int, padding: Padding, dy: Array) -> Array:
    """One matrix product for each of the kernel's positions on a CPU; the compiler's own convolution elsewhere."""

    def by_position(x: Array, dy: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows, columns = (stride * (n - 1) + 1 for n in dy.shape[1:3])
        flat = dy.reshape(-1, dy.shape[-1])

        def at(i: int, j: int) -> Array:
            window = padded[:, i : i + rows : stride, j : j + columns : stride]
            return window.reshape(-1, window.shape[-1]).T @ flat

        return jnp.stack([at(i, j) for i in range(shape[0]) for j in range(shape[1])]).reshape(shape)

    def native(x: Array, dy: Array) -> Array:
        _, pull = jax.vjp(lambda k: _forward(x, k, stride, padding), jnp.zeros(shape, x.dtype))
        return pull(dy)[0]

    return jax.lax.platform_dependent(x, dy, cpu=by_position, default=native)


convolve.defvjp(_save, _pull_back)
