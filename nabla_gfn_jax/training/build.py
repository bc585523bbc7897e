"""Builds a trainer from settings: finds, checks and loads everything that the settings name."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from nabla_gfn_jax import options
from nabla_gfn_jax.base_models.base import BaseModel, Table
from nabla_gfn_jax.base_models.names import DTYPES, load_model, model_files, resolve_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.checkpoints.lora_names import TEXT_ENCODER
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import flatten
from nabla_gfn_jax.parallel import data_mesh, host_memory
from nabla_gfn_jax.rewards import Reward, load_reward
from nabla_gfn_jax.runs.manifest import Input
from nabla_gfn_jax.runs.metrics_log import check_sinks
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.loop import Plan
from nabla_gfn_jax.training.prompts import make_table, table_rows
from nabla_gfn_jax.training.state import learning_rate, make_optimizer
from nabla_gfn_jax.training.trainer import Trainer
from nabla_gfn_jax.typing import Params


def check(settings: Settings) -> None:
    """Raises `UserError` if the model, the prompts or a required extra is missing. Loads no weights."""
    loggers = settings.logging
    check_sinks(tensorboard=loggers.tensorboard, wandb=loggers.wandb, trackio=loggers.trackio)
    resolve_model(settings.model)
    prompts_of(settings)


def build(settings: Settings) -> Trainer:
    """Loads everything that the settings name. Raises `UserError` for any error in them, before any long work."""
    mesh = data_mesh(settings.training.trajectories, settings.training.micro_batches)
    found = prompt_set(settings.prompts)
    with host_memory():
        reward = load_reward(settings.reward)  # first, because its files have not been checked yet
        base = load_model(settings.model, DTYPES[settings.model_dtype])
        rows = table_rows(len(found.train), settings.training.trajectories)
        reward.check_prompts(list(found.train))
        table = make_table(base, reward, found.train[:rows])
    trainer = assemble(settings, mesh, base, reward, table, len(found.train), found.weights)
    if rows == len(found.train):
        return trainer
    return replace(trainer, encode=lambda ids: make_table(base, reward, [found.train[i] for i in ids]))


def free_fields(settings: Settings) -> frozenset[str]:
    """The fields that a resume may change, because they change no number of the run.

    A learning rate that declines depends on `num_epochs`, which is then not free. The older names of free fields, which
    the manifests of older runs have, are free too.
    """
    counted = frozenset() if settings.training.decline == "constant" else {"training.num_epochs"}
    free = options.free_names(settings) - counted
    return free | {old for old, new in settings.RENAMED.items() if new in free}


def length(settings: Settings) -> Plan:
    """The length of the run and the intervals of its outputs."""
    return Plan(
        seed=settings.seed,
        samples=settings.training.trajectories,
        epochs=settings.training.num_epochs,
        images_every=settings.logging.samples_every,
        save_every=settings.logging.checkpoint_every,
        updates=settings.training.num_epochs * settings.training.updates_per_epoch,
        keep_loras=settings.logging.keep_loras,
        skipped_updates=settings.training.skipped_updates,
    )


def learning_epochs(settings: Settings) -> int:
    """The epochs in which the policy learns: those before have fewer paths than the algorithm waits for."""
    waits = getattr(settings.algorithm, "after", 0) // settings.training.trajectories
    return max(settings.training.num_epochs - waits, 0)


def assemble(
    settings: Settings,
    mesh: Mesh,
    base: BaseModel,
    reward: Reward,
    table: dict[str, Table],
    num_prompts: int,
    weights: tuple[float, ...] | None = None,
) -> Trainer:
    """The trainer of a run for the devices of `mesh`. Arrays of model, reward and table may be shapes only."""
    c, algorithm = settings.training, settings.algorithm
    base = base.on(mesh.devices.flat[0].platform, remat=c.remat)
    check_heads(settings, base)
    return Trainer(
        base=base,
        reward=reward,
        algorithm=algorithm,
        chain=base.chain(settings.sampling.num_steps, sampler=settings.sampling.sampler),
        table=table,
        num_prompts=num_prompts,
        guidance=settings.sampling.guidance,
        lora_steps=settings.sampling.lora_until_step,
        carry_change=settings.carry_change,
        optimizer=make_optimizer(
            algorithm.heads(),
            learning_rate(c.learning_rate, c.decline, learning_epochs(settings) * c.updates_per_epoch),
            decay_lora=c.weight_decay_lora,
            decay_heads=c.weight_decay_correction,
            clip=c.clip,
            epsilon=c.adam_epsilon,
        ),
        average=c.average,
        head_options=asdict(settings.correction),
        mesh=mesh,
        micro_batches=c.micro_batches,
        updates_per_epoch=c.updates_per_epoch,
        images_at_once=c.images_at_once,
        start_from=starting_lora(settings.lora.start_from, base),
        prompt_weights=weights,
    )


def check_heads(settings: Settings, base: BaseModel) -> None:
    """Raises `UserError` if the model's latents cannot be halved as often as a head's UNet needs."""
    levels, shape = len(settings.correction.block_out_channels), base.latent_shape
    if settings.algorithm.heads() and any(side % 2 ** (levels - 1) for side in shape[:-1]):
        widths, sides = settings.correction.block_out_channels, " x ".join(map(str, shape[:-1]))
        raise UserError(
            f"correction.block_out_channels = {widths} has {levels} levels, each half the size of the previous one, "
            f"but latents of this model are {sides}; take fewer levels"
        )


def starting_lora(file: Path | None, base: BaseModel) -> Params | None:
    """The LoRA in `file`, whose layers and ranks are then trained; None for no file.

    Raises `UserError` if the LoRA adapts the text encoder too.
    """
    if file is None:
        return None
    lora = load_lora(file, base.params["unet"], base.params["text_encoder"])
    if TEXT_ENCODER in lora:
        raise UserError(
            f"lora.start_from = {file} adapts the text encoder too, which training does not change; "
            "start from a LoRA of the UNet alone"
        )
    return lora


def prompts_of(settings: Settings) -> tuple[str, ...]:
    """The training prompts."""
    return prompt_set(settings.prompts).train


def about(settings: Settings) -> dict[str, Any]:
    """The fields of `runs.manifest.Manifest` that repeat settings of the run."""
    found = {name: getattr(settings, name) for name in ("model", "prompts", "reward")}
    found |= {
        name: getattr(settings.sampling, name) for name in ("sampler", "num_steps", "guidance", "lora_until_step")
    }
    return found | {"algorithm": flatten(settings)["algorithm.name"], "beta": getattr(settings.algorithm, "beta", None)}


def inputs(settings: Settings, reward: Reward) -> dict[str, Input]:
    """The inputs of a run by name: files, and the texts of the prompts."""
    prompts = prompt_set(settings.prompts)
    named: dict[str, Input] = {"prompts": prompts.train}
    named |= {} if prompts.weights is None else {"prompt_weights": [repr(weight) for weight in prompts.weights]}
    named |= {f"model/{name}": file for name, file in model_files(settings.model).items()}
    named |= {f"reward/{file.name}": file for file in reward.files}
    if settings.lora.start_from is not None:
        named["lora.start_from"] = settings.lora.start_from
    return named
