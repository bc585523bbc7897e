"""`UNet2DConditionModel`: the noise predictor of Stable Diffusion (Rombach et al. 2022), in diffusers' layout."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.config import check_divides, check_levels, read_fields
from nabla_gfn_jax.models.layers import (
    Attention,
    Conv,
    Dense,
    Downsample,
    FeatureMap,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    Tokens,
    Upsample,
    timestep_features,
)
from nabla_gfn_jax.models.pair import Pair, Paired, linear, nonlinear
from nabla_gfn_jax.typing import Context, Timesteps

_SOURCE = "unet/config.json"


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of `unet/config.json` that describe the architecture.

    In diffusers, `attention_head_dim` is the *number* of heads.
    """

    sample_size: int | tuple[int, int] = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "UNetConfig":
        """The config from the parsed file. Raises `UserError` for a value that this model does not implement."""
        only = {
            "_class_name": ("UNet2DConditionModel",),
            "act_fn": ("silu",),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "downsample_padding": (1,),
            "dual_cross_attention": (False,),
            "only_cross_attention": (False,),
            "class_embed_type": (None,),
            "addition_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim": (None,),
            "resnet_time_scale_shift": ("default",),
            "resnet_skip_time_act": (False,),
            "resnet_out_scale_factor": (1,),
            "time_embedding_type": ("positional",),
            "time_embedding_act_fn": (None,),
            "timestep_post_act": (None,),
            "time_cond_proj_dim": (None,),
            "transformer_layers_per_block": (1,),
            "center_input_sample": (False,),
            "num_attention_heads": (None,),
            "mid_block_scale_factor": (1,),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "upcast_attention": (False, True),
        }
        found = read_fields(cls, fields, only=only, source=_SOURCE)
        check_levels(_SOURCE, found, "block_out_channels", "down_block_types", "up_block_types", "attention_head_dim")
        check_divides(_SOURCE, "norm_num_groups", found.norm_num_groups, found.block_out_channels, "block_out_channels")
        for level, (heads, width) in enumerate(zip(found.heads, found.block_out_channels, strict=True)):
            kinds = found.down_block_types[level], found.up_block_types[-1 - level]
            if level == len(found.heads) - 1 or any(kind.startswith("CrossAttn") for kind in kinds):
                check_divides(_SOURCE, "attention_head_dim", heads, [width], "block_out_channels")
        return found

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent."""
        s = self.sample_size
        return (s, s) if isinstance(s, int) else s

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level, highest resolution first."""
        h = self.attention_head_dim
        return (h,) * len(self.block_out_channels) if isinstance(h, int) else h


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, and gated feed-forward, each with layer norm and residual."""

    heads: int
    dtype: Any
    platform: str | None

    @nn.compact
    def __call__(self, x: Tokens | Paired, context: Context | Paired) -> Tokens | Paired:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        width = x.shape[-1]
        x = x + Attention(self.heads, dtype=self.dtype, platform=self.platform, name="attn1")(norm("norm1")(x))
        x = x + Attention(self.heads, dtype=self.dtype, platform=self.platform, name="attn2")(norm("norm2")(x), context)
        hidden = Dense(8 * width, dtype=self.dtype, name="ff.net.0.proj")(norm("norm3")(x))
        return x + Dense(width, dtype=self.dtype, name="ff.net.2")(nonlinear(_gated, hidden))


def _gated(hidden: Array) -> Array:
    value, gate = jnp.split(hidden, 2, axis=-1)
    return value * nn.gelu(gate, approximate=False)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, between two projections."""

    heads: int
    groups: int
    linear_projection: bool
    dtype: Any
    platform: str | None

    @nn.compact
    def __call__(self, x: FeatureMap | Paired, context: Context | Paired) -> FeatureMap | Paired:
        batch, height, width, channels = x.shape

        def projection(name: str, h: Any) -> Any:
            if self.linear_projection:
                return Dense(channels, dtype=self.dtype, name=name)(h)
            return Conv(channels, kernel_size=1, padding=0, dtype=self.dtype, name=name)(h)

        h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = projection("proj_in", h).reshape(batch, height * width, channels)
        h = TransformerBlock(self.heads, self.dtype, self.platform, name="transformer_blocks.0")(h, context)
        return x + projection("proj_out", h.reshape(batch, height, width, channels))


class UNet2DConditionModel(nn.Module):
    """Predicts the noise (or, for v-prediction models, the velocity) in a latent image.

    `apply({"params": base}, x, t, context)` is the base model.
    `apply({"params": base, "lora": lora}, x, t, context)` is the finetuned policy. If x and context are `Pair`s, the
    output is a pair: the base model's output and its change by the LoRA. With `remat`, only the input of each block is
    kept for the gradient, and the rest is recomputed. `platform` ("cpu", "gpu", "tpu"; None: JAX's default) determines
    the implementation of attention.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: bool = False
    platform: str | None = None

    def _resnet(self, features: int, name: str) -> Any:
        block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
        return block(features, self.config.norm_num_groups, self.config.norm_eps, self.dtype, name=name)

    def _transformer(self, level: int, name: str) -> Any:
        c = self.config
        block = nn.remat(SpatialTransformer) if self.remat else SpatialTransformer
        return block(c.heads[level], c.norm_num_groups, c.use_linear_projection, self.dtype, self.platform, name=name)

    @nn.compact
    def __call__(
        self, x: FeatureMap | Paired, t: Timesteps, context: Context | Paired
    ) -> Float[Array, "batch height width out"] | Paired:
        """The output (B, h, w, out_channels), float32.

        Args:
            x: latents (B, h, w, in_channels).
            t: DDPM time (B,), 0..999.
            context: text features (B, tokens, cross_attention_dim).
        """
        c = self.config
        levels = len(c.block_out_channels)
        context = context.astype(self.dtype)
        features = timestep_features(t, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
        time: Any = Pair(features) if isinstance(x, Pair) else features
        time = Dense(4 * c.block_out_channels[0], dtype=self.dtype, name="time_embedding.linear_1")(time)
        time = nonlinear(nn.silu, time)
        time = Dense(4 * c.block_out_channels[0], dtype=self.dtype, name="time_embedding.linear_2")(time)

        h = Conv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        skips = [h]
        for i, (kind, width) in enumerate(zip(c.down_block_types, c.block_out_channels, strict=True)):
            for j in range(c.layers_per_block):
                h = self._resnet(width, f"down_blocks.{i}.resnets.{j}")(h, time)
                if kind == "CrossAttnDownBlock2D":
                    h = self._transformer(i, f"down_blocks.{i}.attentions.{j}")(h, context)
                skips.append(h)
            if i < levels - 1:
                h = Downsample(width, dtype=self.dtype, name=f"down_blocks.{i}.downsamplers.0")(h)
                skips.append(h)

        h = self._resnet(c.block_out_channels[-1], "mid_block.resnets.0")(h, time)
        h = self._transformer(levels - 1, "mid_block.attentions.0")(h, context)
        h = self._resnet(c.block_out_channels[-1], "mid_block.resnets.1")(h, time)

        for i, (kind, width) in enumerate(zip(c.up_block_types, reversed(c.block_out_channels), strict=True)):
            for j in range(c.layers_per_block + 1):
                h = linear(lambda *maps: jnp.concatenate(maps, axis=-1), h, skips.pop())
                h = self._resnet(width, f"up_blocks.{i}.resnets.{j}")(h, time)
                if kind == "CrossAttnUpBlock2D":
                    h = self._transformer(levels - 1 - i, f"up_blocks.{i}.attentions.{j}")(h, context)
            if i < levels - 1:
                h = Upsample(width, dtype=self.dtype, name=f"up_blocks.{i}.upsamplers.0")(h)

        # Always in float32, because the losses amplify the difference of two outputs.
        h = nonlinear(nn.silu, GroupNorm(c.norm_num_groups, c.norm_eps, jnp.float32, name="conv_norm_out")(h))
        return Conv(c.out_channels, dtype=jnp.float32, name="conv_out")(h)
