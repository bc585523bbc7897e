"""`AutoencoderKL`: the VAE between images and latents (Rombach et al. 2022), in diffusers' layout."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nabla_gfn_jax.models.config import check_divides, read_fields
from nabla_gfn_jax.models.layers import (
    Attention,
    Conv,
    Downsample,
    FeatureMap,
    GroupNorm,
    ResnetBlock,
    Upsample,
)
from nabla_gfn_jax.typing import Images

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The fields of `vae/config.json` that describe the architecture."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "VAEConfig":
        """The config from the parsed file. Raises `UserError` for a value that this model does not implement."""
        only = {
            "_class_name": ("AutoencoderKL",),
            "act_fn": ("silu",),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
            "shift_factor": (None,),
            "latents_mean": (None,),
            "latents_std": (None,),
        }
        source = "vae/config.json"
        found = read_fields(cls, fields, only=only, source=source)
        check_divides(source, "norm_num_groups", found.norm_num_groups, found.block_out_channels, "block_out_channels")
        return found

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along one side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


class MidBlock(nn.Module):
    """ResNet, self-attention over all pixels (one head), ResNet."""

    features: int
    groups: int
    attention: bool
    dtype: Any
    platform: str | None

    @nn.compact
    def __call__(self, h: FeatureMap) -> FeatureMap:
        h = ResnetBlock(self.features, self.groups, _EPSILON, self.dtype, name="resnets.0")(h)
        if self.attention:
            normal = GroupNorm(self.groups, _EPSILON, self.dtype, name="attentions.0.group_norm")(h)
            tokens = normal.reshape(h.shape[0], -1, self.features)
            attention = Attention(1, qkv_bias=True, dtype=self.dtype, platform=self.platform, name="attentions.0")
            h = h + attention(tokens).reshape(h.shape)
        return ResnetBlock(self.features, self.groups, _EPSILON, self.dtype, name="resnets.1")(h)


class Encoder(nn.Module):
    """Image → mean and log variance of its latent (before `quant_conv`)."""

    config: VAEConfig
    dtype: Any
    platform: str | None

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        c = self.config
        h = Conv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(c.block_out_channels):
            for j in range(c.layers_per_block):
                name = f"down_blocks.{i}.resnets.{j}"
                h = ResnetBlock(width, c.norm_num_groups, _EPSILON, self.dtype, name=name)(h)
            if i < len(c.block_out_channels) - 1:
                h = Downsample(width, asymmetric=True, dtype=self.dtype, name=f"down_blocks.{i}.downsamplers.0")(h)
        h = MidBlock(width, c.norm_num_groups, c.mid_block_add_attention, self.dtype, self.platform, name="mid_block")(
            h
        )
        h = nn.silu(GroupNorm(c.norm_num_groups, _EPSILON, self.dtype, name="conv_norm_out")(h))
        return Conv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latent (after `post_quant_conv`) → image."""

    config: VAEConfig
    dtype: Any
    remat: bool
    platform: str | None

    @nn.compact
    def __call__(self, z: FeatureMap) -> FeatureMap:
        c = self.config
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        widths = tuple(reversed(c.block_out_channels))
        h = Conv(widths[0], dtype=self.dtype, name="conv_in")(z)
        h = MidBlock(
            widths[0], c.norm_num_groups, c.mid_block_add_attention, self.dtype, self.platform, name="mid_block"
        )(h)
        for i, width in enumerate(widths):
            for j in range(c.layers_per_block + 1):
                name = f"up_blocks.{i}.resnets.{j}"
                h = block(width, c.norm_num_groups, _EPSILON, self.dtype, name=name)(h)
            if i < len(widths) - 1:
                h = Upsample(width, dtype=self.dtype, name=f"up_blocks.{i}.upsamplers.0")(h)
        h = nn.silu(GroupNorm(c.norm_num_groups, _EPSILON, self.dtype, name="conv_norm_out")(h))
        return Conv(c.out_channels, dtype=self.dtype, name="conv_out")(h)


class AutoencoderKL(nn.Module):
    """Encodes images in [0, 1] (B, H, W, 3) to scaled latents (B, H/f, W/f, c), f = `config.downscale`, and decodes
    them.

    Latents are scaled for the diffusion model: the VAE's own latent times `config.scaling_factor`. With `remat`, only
    the input of each of the decoder's ResNet blocks is kept for the gradient. `platform` is as in the UNet.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    remat: bool = False
    platform: str | None = None

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.dtype, self.platform)
        self.decoder = Decoder(c, self.dtype, self.remat, self.platform)
        self.quant_conv = Conv(2 * c.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)
        self.post_quant_conv = Conv(c.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)

    def encode(self, images: Images) -> tuple[FeatureMap, FeatureMap]:
        """Mean and standard deviation of q(z | image), scaled; log variance is clamped to [-30, 20] as in diffusers."""
        moments = self.quant_conv(self.encoder(2.0 * images - 1.0))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latents: FeatureMap) -> Images:
        """The decoder's image, mapped from [-1, 1] to [0, 1] but not clamped."""
        z = self.post_quant_conv(latents / self.config.scaling_factor)
        return 0.5 * self.decoder(z) + 0.5

    def __call__(self, images: Images) -> Images:
        """Encodes to the mean and decodes. Initialisation uses this method, because it involves every parameter."""
        return self.decode(self.encode(images)[0])
