"""What a pretraining's config says, and what the fits of the shipped heads and atlas are told."""

from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.options import LARGEST_SEED, Checked, check_divisors, option


@dataclass(frozen=True, kw_only=True)
class Fit(Checked):
    """How long a network is trained, and how."""

    steps: int = option(meaning="updates", minimum=1)
    batch: int = option(meaning="drawings of an update", minimum=1)
    learning_rate: float = option(meaning="largest learning rate of the cosine", above=0)
    decay: float = option(meaning="decay of the running mean of the parameters, which is kept", minimum=0, maximum=1)


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
    """The transformer that reads prompts."""

    hidden_size: int = option(meaning="width", minimum=1)
    intermediate_size: int = option(meaning="width within the MLPs", minimum=1)
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
    max_tokens: int = option(meaning="tokens of a prompt", minimum=3)
    vocab_size: int = option(meaning="tokens that the tokenizer learns", minimum=514)
    vae: VAE
    text_encoder: TextEncoder
    unet: UNet


@dataclass(frozen=True, kw_only=True)
class FitOptions(Checked):
    """Where the drawings are."""

    emoji: Path | None = option(None, "folder of the emoji packages [the user's cache]", file="existing")
