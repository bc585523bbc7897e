"""From the command line to a checked configuration and the pieces it names."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.reward_maximiser import RewardMaximiser
from nabla_gfn_jax.algorithms.transitions import number_of_bins
from nabla_gfn_jax.checkpoints.diffusers_folder import load_folder
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.diffusion.schedule import make_schedule
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.rewards import load_reward
from nabla_gfn_jax.training.finetuner import Finetuner, make_optimizer

SHIPPED_MODELS = {"emoji": Path(__file__).parent / "assets" / "emoji"}
ALGORITHMS = {"residual_nabla_db": ResidualNablaDB, "reward_maximiser": RewardMaximiser}
# What may change between two runs on one workdir: it alters no number of the run.
_FREE = ("logging", "training.num_epochs")


def parse_flags(argv: Sequence[str], **defaults: str) -> tuple[ConfigDict, Path]:
    """`--config=FILE[:VARIANT] --workdir=DIR --config.a.b=VALUE` → configuration and workdir.

    Raises `UserError` for a file or field that does not exist or a value of the wrong type.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", defaults["config"], flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run's files go", flag_values=values)
    try:
        rest = values(list(argv))
        config = values.config
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{reason}; the config file's docstring lists its fields") from error
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; options look like --config.training.num_epochs=10")
    name = Path(values["config"].config_filename.split(":")[0]).stem
    return config, Path(values.workdir or f"runs/{name}")


def build(config: ConfigDict) -> Finetuner:
    """Loads what the configuration names. Raises `UserError` for whatever is wrong, before any long work."""
    trajectories, parts = config.training.trajectories, config.training.micro_batches
    if trajectories % parts:
        divisors = [d for d in range(1, trajectories + 1) if trajectories % d == 0]
        raise UserError(f"training.micro_batches = {parts} does not divide {trajectories} trajectories; use one of {divisors}")
    if config.algorithm.name not in ALGORITHMS:
        raise UserError(f"algorithm.name = {config.algorithm.name!r} is unknown; use one of {sorted(ALGORITHMS)}")
    options = {k: v for k, v in config.algorithm.items() if k != "name"}
    algorithm = ALGORITHMS[config.algorithm.name](**options)
    if isinstance(algorithm, ResidualNablaDB):
        number_of_bins(config.sampling.num_steps, algorithm.transition_fraction)
    base = load_folder(resolve_model(config.model))
    unet = base.unet.config
    flow = UNetConfig(
        sample_size=unet.sample_size,
        in_channels=unet.in_channels,
        out_channels=unet.in_channels,
        cross_attention_dim=unet.cross_attention_dim,
        down_block_types=("CrossAttnDownBlock2D",) * len(config.flow.block_out_channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.flow.block_out_channels),
        **config.flow.to_dict(),
    )
    c = config.training
    return Finetuner(
        base=base,
        flow=UNet2DConditionModel(flow),
        reward=load_reward(config.reward),
        algorithm=algorithm,
        schedule=make_schedule(base.scheduler, config.sampling.num_steps),
        guidance=config.sampling.guidance,
        optimizer=make_optimizer(
            c.learning_rate, decay_lora=c.weight_decay_lora, decay_flow=c.weight_decay_flow, clip=c.clip
        ),
        micro_batches=parts,
    )


def resolve_model(name: str) -> Path:
    """The folder of a shipped model's name, or of a path."""
    folder = SHIPPED_MODELS.get(name, Path(name))
    if not folder.is_dir():
        raise UserError(f"model {name!r} is neither a folder nor a shipped model ({', '.join(SHIPPED_MODELS)})")
    return folder


def prompts_of(config: ConfigDict) -> tuple[str, ...]:
    """The prompts that training draws from."""
    return prompt_set(config.prompts)


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the folder and its config.json. Raises `UserError` if it is not writable or holds another run."""
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("no permission")
        if file.exists():
            _compare(json.loads(file.read_text()), json.loads(config.to_json()), workdir)
        file.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"workdir {workdir} cannot be used ({error}); choose another --workdir") from error


def _compare(old: dict[str, Any], new: dict[str, Any], workdir: Path) -> None:
    before, now = _flat(old), _flat(new)
    changed = sorted(k for k in before | now if before.get(k) != now.get(k) and not k.startswith(_FREE))
    if changed:
        shown = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed[:5])
        raise UserError(f"workdir {workdir} holds a run of another config: {shown}; choose another --workdir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
