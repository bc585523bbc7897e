"""The settings of a pretraining, and the options of the fits of the shipped heads and atlas."""

from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.options import LARGEST_SEED, Checked, check_divisors, option


@dataclass(frozen=True, kw_only=True)
class Fit(Checked):
    """How a network is trained."""

    steps: int = option(meaning="updates", minimum=1)
    batch: int = option(meaning="drawings per update", minimum=1)
    learning_rate: float = option(meaning="largest learning rate of the cosine schedule", above=0)
    decay: float = option(meaning="decay of the running mean of the parameters, which is saved", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class VAE(Fit):
    """The autoencoder."""

    block_out_channels: tuple[int, ...] = option(meaning="width of each level", minimum=1)
    layers_per_block: int = option(meaning="residual blocks of each level", minimum=1)
    latent_channels: int = option(meaning="channels of a latent", minimum=1)
    norm_num_groups: int = option(meaning="groups of each group normalisation", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisors("vae", self, "block_out_channels", "norm_num_groups")


@dataclass(frozen=True, kw_only=True)
class TextEncoder(Checked):
    """The text encoder, a transformer."""

    hidden_size: int = option(meaning="width", minimum=1)
    intermediate_size: int = option(meaning="hidden width of the MLPs", minimum=1)
    num_hidden_layers: int = option(meaning="layers", minimum=1)
    num_attention_heads: int = option(meaning="heads of each attention", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisors("text_encoder", self, "hidden_size", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class UNet(Fit):
    """The denoiser."""

    block_out_channels: tuple[int, ...] = option(meaning="width of each level", minimum=1)
    layers_per_block: int = option(meaning="residual blocks of each level", minimum=1)
    attention_head_dim: int = option(meaning="heads of each attention (diffusers' name for it)", minimum=1)
    norm_num_groups: int = option(meaning="groups of each group normalisation", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisors("unet", self, "block_out_channels", "norm_num_groups", "attention_head_dim")


@dataclass(frozen=True, kw_only=True)
class Pretraining(Checked):
    """A miniature Stable Diffusion of emoji."""

    seed: int = option(0, "seed of every random number", minimum=0, maximum=LARGEST_SEED)
    max_tokens: int = option(meaning="largest number of tokens of a prompt", minimum=3)
    vocab_size: int = option(meaning="largest size of the tokenizer's vocabulary", minimum=514)
    vae: VAE
    text_encoder: TextEncoder
    unet: UNet


@dataclass(frozen=True, kw_only=True)
class FitOptions(Checked):
    """The options of the commands that fit the shipped heads and atlas."""

    emoji: Path | None = option(None, "folder of the emoji packages [the user's cache]", file="existing")
