"""Inception-v3 as the Fréchet inception distance uses it (Szegedy et al. 2016, arXiv 1512.00567; Heusel et al. 2017).

It is the network of TensorFlow's release of 5 December 2015, whose features have been FID's since then. It differs from
the Inception-v3 of other libraries in three places: average pools do not count the padding, the last block has a
maximum pool, and the classifier, which is not used here, has 1008 classes. Parameters have the names of pytorch-fid's
file `pt_inception-2015-12-05-6726825d.pth`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.conv import convolve
from nabla_gfn_jax.models.layers import FeatureMap, StoredNorm
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.typing import Images

SIZE, FEATURES = 299, 2048


class Step(NamedTuple):
    """A convolution of a branch. With stride 1 it keeps height and width; with stride 2 it has no padding."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Branch(NamedTuple):
    """A pool or none, then steps, then the ends, which see the same input and are concatenated."""

    steps: tuple[Step, ...] = ()
    ends: tuple[Step, ...] = ()
    pool: str = ""  # "mean", "maximum", or "halving", a maximum with stride 2


def _branch(*steps: Step, ends: tuple[Step, ...] = (), pool: str = "") -> Branch:
    return Branch(steps, ends, pool)


def _block_a(pooled: int) -> tuple[Branch, ...]:
    double = [Step("branch3x3dbl_1", 64), *(Step(f"branch3x3dbl_{i}", 96, (3, 3)) for i in (2, 3))]
    return (
        _branch(Step("branch1x1", 64)),
        _branch(Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5))),
        _branch(*double),
        _branch(Step("branch_pool", pooled), pool="mean"),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    single = [("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))]
    widths, kernels = (width, width, width, 192), ((7, 1), (1, 7)) * 2
    double = [(f"branch7x7dbl_{i}", w, k) for i, w, k in zip((2, 3, 4, 5), widths, kernels, strict=True)]
    return (
        _branch(Step("branch1x1", 192)),
        _branch(Step("branch7x7_1", width), *(Step(*step) for step in single)),
        _branch(Step("branch7x7dbl_1", width), *(Step(*step) for step in double)),
        _branch(Step("branch_pool", 192), pool="mean"),
    )


def _block_e(pool: str) -> tuple[Branch, ...]:
    def ends(name: str) -> tuple[Step, Step]:
        return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))

    double = (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, (3, 3)))
    return (
        _branch(Step("branch1x1", 320)),
        _branch(Step("branch3x3_1", 384), ends=ends("branch3x3_2")),
        _branch(*double, ends=ends("branch3x3dbl_3")),
        _branch(Step("branch_pool", 192), pool=pool),
    )


_BLOCK_B = (
    _branch(Step("branch3x3", 384, (3, 3), 2)),
    _branch(Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3)), Step("branch3x3dbl_3", 96, (3, 3), 2)),
    _branch(pool="halving"),
)
_BLOCK_D = (
    _branch(Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2)),
    _branch(
        Step("branch7x7x3_1", 192),
        Step("branch7x7x3_2", 192, (1, 7)),
        Step("branch7x7x3_3", 192, (7, 1)),
        Step("branch7x7x3_4", 192, (3, 3), 2),
    ),
    _branch(pool="halving"),
)
_BLOCKS = {
    **{f"Mixed_5{i}": _block_a(pooled) for i, pooled in zip("bcd", (32, 64, 64), strict=True)},
    "Mixed_6a": _BLOCK_B,
    **{f"Mixed_6{i}": _block_c(width) for i, width in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("maximum"),
}


class _Kernel(nn.Module):
    """A convolution without bias."""

    features: int
    size: tuple[int, int]
    stride: int
    padding: tuple[int, int]

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (*self.size, x.shape[-1], self.features))
        height, width = self.padding
        return convolve(x, kernel, self.stride, ((height, height), (width, width)))


class _Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        height, width = self.kernel if self.padded and self.stride == 1 else (1, 1)
        x = _Kernel(self.features, self.kernel, self.stride, (height // 2, width // 2), name="conv")(x)
        return nn.relu(StoredNorm(name="bn")(x))


class _Mixed(nn.Module):
    """The concatenated results of several branches."""

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        return jnp.concatenate([result for branch in self.branches for result in self._results(branch, x)], axis=-1)

    def _results(self, branch: Branch, x: FeatureMap) -> list[FeatureMap]:
        if branch.pool:
            x = _pool(x, branch.pool)
        for step in branch.steps:
            x = _Convolution(step.features, step.kernel, step.stride, name=step.name)(x)
        return [_Convolution(end.features, end.kernel, name=end.name)(x) for end in branch.ends] or [x]


def _pool(x: FeatureMap, kind: str) -> FeatureMap:
    if kind == "halving":
        return nn.max_pool(x, (3, 3), (2, 2))
    around = ((1, 1), (1, 1))
    if kind == "maximum":
        return nn.max_pool(x, (3, 3), (1, 1), around)
    return nn.avg_pool(x, (3, 3), (1, 1), around, count_include_pad=False)


def stretched(images: Images) -> Float[Array, "batch 299 299 3"]:
    """Images resized to the network's square, bilinearly and without antialiasing."""
    return jax.image.resize(images, (len(images), SIZE, SIZE, 3), "linear", antialias=False)


class InceptionV3(nn.Module):
    """Images in [0, 1] (B, height, width, 3) → the features after the last average pool (B, 2048)."""

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "batch 2048"]:
        x = 2.0 * stretched(images) - 1.0
        x = _Convolution(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = _Convolution(32, (3, 3), padded=False, name="Conv2d_2a_3x3")(x)
        x = _Convolution(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _Convolution(80, (1, 1), name="Conv2d_3b_1x1")(_pool(x, "halving"))
        x = _Convolution(192, (3, 3), padded=False, name="Conv2d_4a_3x3")(x)
        x = _pool(x, "halving")
        for name, branches in _BLOCKS.items():
            x = _Mixed(branches, name=name)(x)
        return x.mean(axis=(1, 2))
