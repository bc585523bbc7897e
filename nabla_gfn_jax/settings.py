"""Everything that a run's config says: what it is, what is allowed, and what must fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import LARGEST_SEED, Checked, check_divisors, one_of, option
from nabla_gfn_jax.rewards import NAMES


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How trajectories are sampled, in training and by default afterwards."""

    sampler: Sampler = option("ddpm", "how an image is sampled")
    num_steps: int = option(50, "denoising steps of an image", minimum=1, maximum=999)
    guidance: float = option(5.0, "classifier-free guidance scale; 1: none", minimum=0, maximum=100)
    lora_until_step: int | None = option(
        None, "last step that the LoRA takes part in, the base model's after it [the last of all]", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.lora_until_step or 1) > self.num_steps:
            more = f"{self.lora_until_step} is more than sampling.num_steps = {self.num_steps}"
            raise UserError(f"sampling.lora_until_step = {more}; lower it")


@dataclass(frozen=True, kw_only=True)
class Lora(Checked):
    """What is trained of the UNet."""

    rank: int = option(8, "rank of the update of each adapted layer, if none is started from", minimum=1, maximum=1024)
    start_from: Path | None = option(None, "LoRA file that training starts from, at its own ranks", file="existing")


@dataclass(frozen=True, kw_only=True)
class Correction(Checked):
    """The UNet g_φ, which corrects the one-step guess of the reward gradient."""

    block_out_channels: tuple[int, ...] = option((64, 128, 256, 256), "width of each level", minimum=1)
    layers_per_block: int = option(1, "residual blocks of each level", minimum=1)
    attention_head_dim: int = option(8, "heads of each attention (diffusers' name for it)", minimum=1)
    norm_num_groups: int = option(32, "groups of each group normalisation", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisors("correction", self, "block_out_channels", "norm_num_groups", "attention_head_dim")


@dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """Batches, the optimizer, and what memory it may take."""

    num_epochs: int = option(
        200, "length of the run", unit="epochs, after a first that only samples", minimum=0, maximum=10**6, free=True
    )
    trajectories: int = option(64, "trajectories sampled in an epoch, on all devices together", minimum=1)
    micro_batches: int = option(
        4, "parts in which a device takes its trajectories; more parts need less memory", minimum=1, free=True
    )
    updates_per_epoch: int = option(1, "optimizer steps on each epoch's trajectories", minimum=1)
    learning_rate: float = option(1e-3, "AdamW's learning rate", above=0)
    decline: Literal["constant", "cosine", "linear"] = option(
        "constant", "how the learning rate falls to 0 over the run's updates"
    )
    adam_epsilon: float = option(1e-8, "added to the root of AdamW's second moment", above=0)
    average: float = option(
        0.0, "decay of a running mean of the LoRA, which is then what is saved; 0: none", minimum=0, maximum=0.99999
    )
    weight_decay_lora: float = option(1e-4, "AdamW's weight decay of the LoRA", minimum=0)
    weight_decay_correction: float = option(1e-2, "AdamW's weight decay of g_φ", minimum=0)
    remat: bool = option(False, "recompute activations in place of keeping them: less memory", free=True)
    images_at_once: int = option(
        0, "most images decoded and scored together on a device; 0: a micro-batch", unit="images", minimum=0, free=True
    )
    clip: float = option(1.0, "largest norm of a gradient, LoRA's and g_φ's apart", above=0, infinite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectories % self.micro_batches:
            raise UserError(
                f"training.trajectories = {self.trajectories} cannot be split into training.micro_batches = "
                f"{self.micro_batches}; choose a divisor of the trajectories"
            )


@dataclass(frozen=True, kw_only=True)
class Logging(Checked):
    """What is written while a run goes on."""

    samples_every: int = option(20, "how often a grid of samples is written", unit="epochs", minimum=1, free=True)
    checkpoint_every: int = option(10, "how often the run is saved", unit="epochs", minimum=1, free=True)
    keep_loras: int = option(0, "how many of the newest LoRA files to keep; 0: all", minimum=0, free=True)
    judged_images: int = option(
        0, "images of each held-out prompt by which every saved LoRA is judged in nats; 0: none", minimum=0, free=True
    )
    tensorboard: bool = option(False, "also log to WORKDIR/tensorboard", free=True)
    wandb: bool = option(False, "also log to Weights & Biases", free=True)


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """A finetuning run."""

    RENAMED: ClassVar[dict[str, str]] = {
        "flow": "correction",
        "training.weight_decay_flow": "training.weight_decay_correction",
        "algorithm.flow_gradient_from_forward": "algorithm.correction_from_forward",
    }

    seed: int = option(0, "seed of every random number of the run", minimum=0, maximum=LARGEST_SEED)
    model: str = option(
        meaning='the base model: "emoji", a folder in diffusers\' layout, a file of weights, or OWNER/NAME on the hub'
    )
    model_dtype: Literal["float32", "bfloat16"] = option("float32", "type of the frozen UNet, VAE and text encoder")
    carry_change: bool = option(
        False, "in bfloat16, carry o_θ − o_# through the network; if not, or in float32, subtract two outputs"
    )
    reward: str = option(meaning="the reward R: a name, FILE.py:FUNCTION, a server, or a weighted sum", choices=NAMES)
    prompts: str = option(meaning="a prompt set's name, FILE[:COLUMN], or hub:OWNER/NAME/FILE[:COLUMN]")
    sampling: Sampling
    algorithm: Any = one_of(ALGORITHMS, "the algorithm, whose own options are the group's other fields")
    lora: Lora
    correction: Correction
    training: Training
    logging: Logging

    def __post_init__(self) -> None:
        super().__post_init__()
        self.algorithm.validate(self.sampling.num_steps)
        until = self.sampling.lora_until_step
        if until is not None and not getattr(self.algorithm, "takes_any_steps", False):
            name = next(n for n, kind in ALGORITHMS.items() if isinstance(self.algorithm, kind))
            raise UserError(f"sampling.lora_until_step = {until}, but {name} trains every step; leave it out")
