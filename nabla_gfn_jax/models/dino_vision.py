"""Vision transformers in DINO's layout (Caron et al. 2021), in which DreamSim also keeps the image towers of CLIP."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.models.clip import CLIPEncoderLayer, LayerNames
from nabla_gfn_jax.models.layers import LayerNorm
from nabla_gfn_jax.models.parameters import parameter
from nabla_gfn_jax.models.vision_transformer import PatchEmbedding, VisionConfig
from nabla_gfn_jax.typing import Images

_NAMES = LayerNames(norms=("norm1", "norm2"), qkv=("attn.qkv",), out="attn.proj")
_NORMAL = nn.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """The sizes of a transformer. With `embed_dim` it is CLIP's: it has two more norms and a projection to this width.

    The norm before the layers is called `pos_drop` in the checkpoints, because it takes the place of a dropout.
    """

    vision: VisionConfig
    embed_dim: int | None = None

    @property
    def features(self) -> int:
        """The width of the features."""
        return self.embed_dim or self.vision.hidden_size


def vit_b_16(hidden_act: str = "gelu", layer_norm_eps: float = 1e-5) -> VisionConfig:
    """The sizes of ViT-B/16."""
    return VisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=16,
        hidden_act=hidden_act,
        layer_norm_eps=layer_norm_eps,
    )


DINO = DinoConfig(vision=vit_b_16(layer_norm_eps=1e-6))
CLIP = DinoConfig(vision=vit_b_16("quick_gelu"), embed_dim=512)
OPEN_CLIP = DinoConfig(vision=vit_b_16(), embed_dim=512)


class DinoVision(nn.Module):
    """Normalised images (B, image_size, image_size, 3) → features: the class token after the last layer.

    DINO's final norm is not applied, CLIP's is.
    """

    config: DinoConfig

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "batch features"]:
        c, is_clip = self.config.vision, self.config.embed_dim is not None

        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=c.layer_norm_eps, name=name)

        patches = PatchEmbedding(c.hidden_size, c.patch_size, name="patch_embed.proj")(images)
        first = parameter(self, "cls_token", _NORMAL, (1, 1, c.hidden_size))
        positions = parameter(self, "pos_embed", _NORMAL, (1, c.tokens, c.hidden_size))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(patches), 1, c.hidden_size)), patches], axis=1) + positions
        if is_clip:
            x = norm("pos_drop")(x)
        for i in range(c.num_hidden_layers):
            x = CLIPEncoderLayer(c, causal=False, names=_NAMES, name=f"blocks.{i}")(x)
        if not is_clip:
            return x[:, 0]
        return norm("norm")(x[:, 0]) @ parameter(self, "proj", _NORMAL, (c.hidden_size, self.config.features))
