"""2-D convolution and its gradients in forms that are fast on a CPU, also inside `lax.scan`.

In a loop body, XLA's CPU compiler uses its fast kernel only for convolutions in the layout NHWC · HWIO. Autodiff makes
transposed convolutions in another layout, which become slow loops: 9 times slower for the gradient of the input, 25
times for that of the kernel (64x8x8x64, 3x3). Both gradients are therefore written here in other forms.

If there are few pixels and the kernel is large, reading the kernel from memory takes most of the time. On a CPU such a
convolution is one matrix product, which reads the kernel once. With 2x8x8 pixels and 1280 → 1280 channels, it takes 11
ms instead of 42, and the gradient of the input 19 ms instead of 84.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
_X = Float[Array, "batch height width inputs"]
_K = Float[Array, "kernel_height kernel_width inputs outputs"]


def _native(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _few_pixels(shape: tuple[int, ...], kernel: Array, stride: int, padding: Padding) -> bool:
    """Whether matrix products are faster on a CPU, for an input of `shape` (B, H, W, _).

    They are if the output has the input's height and width and the pixels are few compared with the kernel. Up to 2x2
    pixels count as few for any batch size, because XLA's convolution is ten times slower there.
    """
    size = kernel.shape[0]
    same = stride == 1 and size > 1 and padding == ((size // 2,) * 2,) * 2 and size % 2 == 1
    pixels = shape[1] * shape[2]
    return same and (pixels <= 4 or shape[0] * pixels < kernel.shape[3])


def windows(x: _X, kernel: tuple[int, ...], stride: int, padding: Padding) -> Iterator[Array]:
    """For each position of a kernel (height, width), row by row: the pixels of the padded `x` that it multiplies.

    Each window is (batch, out_height, out_width, inputs).
    """
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, *sizes, channels = padded.shape
    spans = [(n - k) // stride * stride + 1 for n, k in zip(sizes, kernel, strict=True)]
    for i, j in np.ndindex(*kernel):
        end = (batch, i + spans[0], j + spans[1], channels)
        yield jax.lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))


def _forward(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    native = partial(_native, stride=stride, padding=padding)
    if not _few_pixels(x.shape, kernel, stride, padding):
        return native(x, kernel)

    def by_product(x: Array, kernel: Array) -> Array:
        """One matrix product: the windows of all positions are concatenated as columns."""
        columns = jnp.concatenate(list(windows(x, kernel.shape[:2], stride, padding)), axis=-1)
        columns = columns.reshape(-1, columns.shape[-1])
        return (columns @ kernel.reshape(columns.shape[1], -1)).reshape(*x.shape[:3], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=by_product, default=native)


def convolve(x: _X, kernel: _K, stride: int, padding: Padding) -> Float[Array, "batch out_height out_width outputs"]:
    """Cross-correlation as in PyTorch. `padding` is ((top, bottom), (left, right)), each at most kernel size - 1.

    The gradients use the matmul precision that is set when this function is called, not when they are traced.
    """
    return _convolve(x, kernel, stride, padding, jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x: Array, kernel: Array, stride: int, padding: Padding, precision: str | None) -> Array:
    return _forward(x, kernel, stride, padding)


def _save(
    x: Array, kernel: Array, stride: int, padding: Padding, precision: str | None
) -> tuple[Array, tuple[Array, Array]]:
    return _forward(x, kernel, stride, padding), (x, kernel)


def _pull_back(
    stride: int, padding: Padding, precision: str | None, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    with jax.default_matmul_precision(precision):
        dx = _input_gradient(x.shape, kernel, stride, padding, dy)
        return dx, _kernel_gradient(x, kernel.shape, stride, padding, dy)


def _input_gradient(shape: tuple[int, ...], kernel: Array, stride: int, padding: Padding, dy: Array) -> Array:
    def by_correlation(dy: Array, kernel: Array) -> Array:
        """The full correlation of `dy`, with zeros inserted for the stride, with the mirrored kernel."""
        borders = []
        for axis in (0, 1):
            spread = (dy.shape[1 + axis] - 1) * stride + 1
            low = kernel.shape[axis] - 1 - padding[axis][0]
            borders.append((low, shape[1 + axis] + kernel.shape[axis] - 1 - spread - low, stride - 1))
        zero = jnp.zeros((), dy.dtype)
        spread_out = jax.lax.pad(dy, zero, [(0, 0, 0), *borders, (0, 0, 0)])
        return _native(spread_out, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), 1, ((0, 0), (0, 0)))

    def by_product(dy: Array, kernel: Array) -> Array:
        """The product of each pixel of `dy` with each position of the kernel, shifted and summed; mirrors no kernel."""
        batch, height, width, outputs = dy.shape
        given = dy.reshape(-1, outputs) @ kernel.reshape(-1, outputs).T
        given = given.reshape(batch, height, width, *kernel.shape[:3])
        given = jnp.pad(given, ((0, 0), *padding, (0, 0), (0, 0), (0, 0)))
        up, left = (n - 1 for n in kernel.shape[:2])
        at = [given[:, up - i :, left - j :][:, :height, :width, i, j] for i, j in np.ndindex(*kernel.shape[:2])]
        return sum(at[1:], at[0])

    if not _few_pixels(shape, kernel, stride, padding):
        return by_correlation(dy, kernel)
    return jax.lax.platform_dependent(dy, kernel, cpu=by_product, default=by_correlation)


def _kernel_gradient(x: Array, shape: tuple[int, ...], stride: int, padding: Padding, dy: Array) -> Array:
    """On a CPU, one matrix product for each position of the kernel; elsewhere the compiler's own convolution."""

    def by_position(x: Array, dy: Array) -> Array:
        flat = dy.reshape(-1, dy.shape[-1])
        seen = windows(x, shape[:2], stride, padding)
        return jnp.stack([window.reshape(-1, window.shape[-1]).T @ flat for window in seen]).reshape(shape)

    def native(x: Array, dy: Array) -> Array:
        _, pull = jax.vjp(lambda k: _native(x, k, stride, padding), jnp.zeros(shape, x.dtype))
        return pull(dy)[0]

    return jax.lax.platform_dependent(x, dy, cpu=by_position, default=native)


_convolve.defvjp(_save, _pull_back)
