"""Every field of a run's config: its meaning, its range, and the checks that involve several fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.models.lora import Layers
from nabla_gfn_jax.options import LARGEST_SEED, Checked, check_divisors, one_of, option
from nabla_gfn_jax.rewards import NAMES
from nabla_gfn_jax.runs.best import Criterion


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How trajectories are sampled, in training and by default in `sample` and `evaluate`."""

    sampler: Sampler = option("ddpm", "the sampler")
    num_steps: int = option(50, "number of denoising steps", minimum=1, maximum=999)
    guidance: float = option(5.0, "classifier-free guidance scale; 1: no guidance", minimum=0, maximum=100)
    lora_until_step: int | None = option(
        None, "last step with the LoRA; later steps use the base model [the last step]", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.lora_until_step or 1) > self.num_steps:
            more = f"{self.lora_until_step} is more than sampling.num_steps = {self.num_steps}"
            raise UserError(f"sampling.lora_until_step = {more}; lower it")


@dataclass(frozen=True, kw_only=True)
class Lora(Checked):
    """The LoRA of the UNet that is trained."""

    rank: int = option(8, "rank of a new LoRA; ignored with start_from", minimum=1, maximum=1024)
    layers: Layers = option(
        "attention", "layers of a new LoRA: attention's, all (convolutions too), or all of up_blocks"
    )
    start_from: Path | None = option(None, "LoRA file to start training from, at its own ranks", file="existing")


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
    """Batches, optimizer and memory."""

    num_epochs: int = option(
        200, "length of the run", unit="epochs, after a first that only samples", minimum=0, maximum=10**6, free=True
    )
    trajectories: int = option(64, "trajectories per epoch, on all devices together", minimum=1)
    micro_batches: int = option(
        4, "parts into which a device splits its trajectories; more parts need less memory", minimum=1, free=True
    )
    updates_per_epoch: int = option(1, "optimizer steps on each epoch's trajectories", minimum=1)
    learning_rate: float = option(1e-3, "AdamW's learning rate", above=0)
    decline: Literal["constant", "cosine", "linear"] = option(
        "constant", "how the learning rate falls to 0 over the run's updates"
    )
    adam_epsilon: float = option(1e-8, "added to the square root of AdamW's second moment", above=0)
    average: float = option(
        0.0, "decay of a running mean of the LoRA, which is saved instead of it; 0: off", minimum=0, maximum=0.99999
    )
    weight_decay_lora: float = option(1e-4, "AdamW's weight decay of the LoRA", minimum=0)
    weight_decay_correction: float = option(1e-2, "AdamW's weight decay of g_φ", minimum=0)
    remat: bool = option(False, "recompute activations instead of keeping them, to save memory", free=True)
    images_at_once: int = option(
        0,
        "most images that a device decodes and scores together; 0: a whole micro-batch",
        unit="images",
        minimum=0,
        free=True,
    )
    clip: float = option(1.0, "largest norm of the gradient, for the LoRA and g_φ separately", above=0, infinite=True)

    skipped_updates: int = option(
        3,
        "most updates in a row that are left out because a number is not finite, before the run stops",
        minimum=0,
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectories % self.micro_batches:
            raise UserError(
                f"training.trajectories = {self.trajectories} cannot be split into training.micro_batches = "
                f"{self.micro_batches}; choose a divisor of the trajectories"
            )


@dataclass(frozen=True, kw_only=True)
class Logging(Checked):
    """What a run writes while it trains."""

    samples_every: int = option(20, "interval between grids of samples", unit="epochs", minimum=1, free=True)
    checkpoint_every: int = option(10, "interval between saves of the run", unit="epochs", minimum=1, free=True)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", minimum=1, free=True)
    keep_every: int = option(
        0, "interval between checkpoints that are kept for ever; 0: none", unit="epochs", minimum=0, free=True
    )
    keep_loras: int = option(0, "how many of the newest LoRA files to keep; 0: all", minimum=0, free=True)
    tensorboard: bool = option(False, "also log to WORKDIR/tensorboard", free=True)
    wandb: bool = option(False, "also log to Weights & Biases", free=True)
    trackio: bool = option(False, "also log to trackio", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_every % self.checkpoint_every:
            raise UserError(
                f"logging.keep_every = {self.keep_every} is no multiple of logging.checkpoint_every = "
                f"{self.checkpoint_every}; choose a multiple, or 0"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation(Checked):
    """How the run measures its policy while it trains."""

    images: int = option(
        0,
        "images of each held-out prompt on which the policy is measured in nats; 0: no measurement",
        minimum=0,
        free=True,
    )
    every_updates: int = option(
        0,
        "interval between measurements, each of a LoRA that is then saved; 0: every saved LoRA",
        unit="updates",
        minimum=0,
        free=True,
    )
    cross_rewards: tuple[str, ...] = option(
        (), "other rewards, which show whether the gain is the reward's alone", choices=NAMES, empty=True, free=True
    )
    metrics: tuple[str, ...] = option(
        (), "more metrics; each needs a network (docs/metrics.md)", choices=METRICS, empty=True, free=True
    )
    best: Criterion | None = option(
        None,
        "the figure by which lora/best, a copy of the best LoRA, is chosen [gap, or log_reward without a β]",
        free=True,
    )
    stop_on_alarm: bool = option(False, "end the run after an alarm", free=True)


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """The settings of a finetuning run. `RENAMED` maps fields of older configs to their present names."""

    RENAMED: ClassVar[dict[str, str]] = {
        "flow": "correction",
        "training.weight_decay_flow": "training.weight_decay_correction",
        "algorithm.flow_gradient_from_forward": "algorithm.correction_from_forward",
        "logging.judged_images": "evaluation.images",
    }

    seed: int = option(0, "seed of every random number of the run", minimum=0, maximum=LARGEST_SEED)
    model: str = option(
        meaning='the base model: "emoji", a folder in diffusers\' layout, a file of weights, or OWNER/NAME on the hub'
    )
    model_dtype: Literal["float32", "bfloat16"] = option("float32", "type of the frozen UNet, VAE and text encoder")
    carry_change: bool = option(
        False, "in bfloat16, carry o_θ − o_# through the network; otherwise, and in float32, subtract two outputs"
    )
    reward: str = option(
        meaning="the reward R: a name, FILE.py:FUNCTION, the URL of a server, or a weighted sum", choices=NAMES
    )
    prompts: str = option(meaning="name of a prompt set, FILE[:COLUMN], or hub:OWNER/NAME/FILE[:COLUMN]")
    sampling: Sampling
    algorithm: Any = one_of(ALGORITHMS, "the algorithm; the other fields of this group are its options")
    lora: Lora
    correction: Correction
    training: Training
    logging: Logging
    evaluation: Evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.algorithm.validate(self.sampling.num_steps)
        every, updates = self.evaluation.every_updates, self.training.updates_per_epoch
        if every % updates:
            raise UserError(
                f"evaluation.every_updates = {every} is no multiple of training.updates_per_epoch = {updates}; "
                "choose a multiple, or 0"
            )
        until = self.sampling.lora_until_step
        if until is not None and not getattr(self.algorithm, "takes_any_steps", False):
            name = next(n for n, kind in ALGORITHMS.items() if isinstance(self.algorithm, kind))
            raise UserError(f"sampling.lora_until_step = {until}, but {name} trains every step; leave it out")
