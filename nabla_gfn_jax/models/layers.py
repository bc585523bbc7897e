"""The layers that Stable Diffusion's UNet and VAE share. Channels are last; parameters have the checkpoints' names.

Given a `Pair` instead of an array, each layer returns a pair: the base model's activation and its change by the LoRA.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.models.attention import attend
from nabla_gfn_jax.models.conv import convolve
from nabla_gfn_jax.models.pair import Paired, changed, linear, nonlinear, policy
from nabla_gfn_jax.models.parameters import parameter

FeatureMap = Float[Array, "batch _height _width _channels"]
Tokens = Float[Array, "batch tokens channels"]


class Conv(nn.Module):
    """2-D convolution with bias and PyTorch's padding. `padding` is ((top, bottom), (left, right)) or one int.

    If the `lora` collection has this layer, a convolution with down (k, k, in, r) followed by up (r, out) is added, as
    in `Dense`.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap | Paired) -> FeatureMap | Paired:
        k = self.kernel_size
        shape = (k, k, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        x = x.astype(self.dtype)
        padding = ((self.padding,) * 2,) * 2 if isinstance(self.padding, int) else self.padding
        y = linear(lambda a: convolve(a, kernel, self.stride, padding), x) + bias.reshape(1, 1, 1, -1)
        if self.has_variable("lora", "down"):
            down: Array = self.get_variable("lora", "down").astype(self.dtype)
            up: Array = self.get_variable("lora", "up").astype(self.dtype)
            y = changed(y, convolve(policy(x), down, self.stride, padding) @ up)
        return y


class Dense(nn.Module):
    """y = x W + b, plus x·down·up if the `lora` collection has this layer.

    down (in, r) and up (r, out) are never merged into W, because in bfloat16 the sum would round them away. Their scale
    alpha/r is 1; if a file has another scale, it is multiplied into `up` when the file is read. Leading axes are
    flattened first, because the gradient of W over several axes is four times slower on a CPU.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"] | Paired) -> Float[Array, "*batch features"] | Paired:
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = linear(lambda a: a @ kernel.astype(self.dtype), rows)
        if self.use_bias:
            y = y + parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None]
        if self.has_variable("lora", "down"):
            down: Array = self.get_variable("lora", "down").astype(self.dtype)
            up: Array = self.get_variable("lora", "up").astype(self.dtype)
            y = changed(y, (policy(rows) @ down) @ up)
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """Normalises each token to mean 0 and variance 1 over its channels, then applies scale and bias.

    Always in float32.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"] | Paired) -> Float[Array, "*batch channels"] | Paired:
        shape = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, shape).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, shape).astype(jnp.float32)

        def normalised(x: Array) -> Array:
            rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
            centred = rows - rows.mean(axis=-1, keepdims=True)
            normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
            return (normal * scale[None] + bias[None]).reshape(x.shape)

        return nonlinear(normalised, x).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation over channels, with statistics in float32.

    Means over pixels are computed for each channel first, and then averaged over the group. Reducing over both axes
    simultaneously is ten times slower on a CPU (8 ms instead of 0.9 for 16x64x64x16).
    """

    groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channels"] | Paired
    ) -> Float[Array, "batch *space channels"] | Paired:
        channels = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, (channels,)).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,)).astype(jnp.float32)

        def normalised(x: Array) -> Array:
            flat = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
            centred = flat - self._group_mean(flat.mean(axis=1))[:, None]
            variance = self._group_mean(jnp.square(centred).mean(axis=1))[:, None]
            normal = centred * (jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(1, 1, -1))
            return (normal + bias.reshape(1, 1, -1)).reshape(x.shape)

        return nonlinear(normalised, x).astype(self.dtype)

    def _group_mean(self, per_channel: Float[Array, "batch channels"]) -> Float[Array, "batch channels"]:
        batch, channels = per_channel.shape
        groups = per_channel.reshape(batch, self.groups, -1).mean(axis=-1, keepdims=True)
        return jnp.broadcast_to(groups, (batch, self.groups, channels // self.groups)).reshape(batch, channels)


class StoredNorm(nn.Module):
    """Batch normalisation with the stored statistics, as of networks that are not trained here."""

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        def stored(name: str) -> Array:
            return parameter(self, name, nn.initializers.ones, (x.shape[-1],))

        scale = stored("scale") * jax.lax.rsqrt(stored("running_var") + self.epsilon)
        shift = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)) - stored("running_mean") * scale
        return x * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)


class ResnetBlock(nn.Module):
    """norm → SiLU → conv, twice. The time embedding is added in between; a 1x1 shortcut is used if widths differ."""

    features: int
    groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: FeatureMap | Paired, time: Float[Array, "batch embedding"] | Paired | None = None
    ) -> FeatureMap | Paired:
        h = nonlinear(nn.silu, GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        if time is not None:
            shift = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nonlinear(nn.silu, time))
            h = h + linear(lambda a: a[:, None, None, :], shift)
        h = nonlinear(nn.silu, GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(self.dtype) + h


class Attention(nn.Module):
    """Multi-head attention of `x` over `context`, or over `x` if it is None. LoRA adapts its four dense layers."""

    heads: int
    qkv_bias: bool = False
    dtype: Any = jnp.float32
    platform: str | None = None

    @nn.compact
    def __call__(
        self, x: Tokens | Paired, context: Float[Array, "batch keys width"] | Paired | None = None
    ) -> Tokens | Paired:
        width = x.shape[-1]
        source = x if context is None else context

        def heads_of(name: str, tokens: Array | Paired) -> Any:
            y = Dense(width, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(tokens)
            return y.reshape(*y.shape[:2], self.heads, width // self.heads)

        q, k, v = heads_of("to_q", x), heads_of("to_k", source), heads_of("to_v", source)
        h = attend(q, k, v, platform=self.platform).reshape(x.shape)
        return Dense(width, dtype=self.dtype, name="to_out.0")(h)


class Downsample(nn.Module):
    """Halves height and width with a strided convolution. `asymmetric` pads only bottom and right, as in the VAE."""

    features: int
    asymmetric: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap | Paired) -> FeatureMap | Paired:
        padding = ((0, 1), (0, 1)) if self.asymmetric else 1
        return Conv(self.features, stride=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbour, then a 3x3 convolution."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap | Paired) -> FeatureMap | Paired:
        batch, height, width, channels = x.shape

        def repeated(x: Array) -> Array:
            x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
            return x.reshape(batch, 2 * height, 2 * width, channels)

        x = linear(repeated, x)
        return Conv(self.features, dtype=self.dtype, name="conv")(x)


def timestep_features(
    t: Int[Array, " batch"], width: int, flip_sin_to_cos: bool = True, shift: float = 0.0
) -> Float[Array, "batch width"]:
    """Sinusoidal features of DDPM time (Vaswani et al. 2017, section 3.5), float32. `width` must be even."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    first, second = (jnp.cos, jnp.sin) if flip_sin_to_cos else (jnp.sin, jnp.cos)
    return jnp.concatenate([first(angles), second(angles)], axis=-1)
