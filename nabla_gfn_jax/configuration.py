"""From a configuration to the pieces it names, checked before any long work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nabla_gfn_jax.algorithms.base import Algorithm
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.reward_maximiser import RewardMaximiser
from nabla_gfn_jax.checkpoints.diffusers_folder import (
    StableDiffusion,
    abstract_params,
    load_folder,
    read_architecture,
)
from nabla_gfn_jax.checkpoints.hub import STABLE_DIFFUSION_1_5, model_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, make_schedule
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.parallel import data_mesh, host_memory
from nabla_gfn_jax.rewards import Reward, load_reward
from nabla_gfn_jax.training.finetuner import Finetuner, make_optimizer
from nabla_gfn_jax.typing import Params

SHIPPED_MODELS = {"emoji": Path(__file__).parent / "assets" / "emoji"}
# Of the frozen UNet, VAE and text encoder; rewards, LoRA, g_φ and the optimizer are in float32 always.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ALGORITHMS = {"residual_nabla_db": ResidualNablaDB, "reward_maximiser": RewardMaximiser}


def build(config: ConfigDict) -> Finetuner:
    """Loads what the configuration names. Raises `UserError` for whatever is wrong, before any long work."""
    mesh = data_mesh(config.training.trajectories, config.training.micro_batches)
    check(config)
    with host_memory():
        base = load_folder(resolve_model(config.model), DTYPES[config.model_dtype])
        reward = load_reward(config.reward)
    return assemble(config, mesh, base, reward)


def check(config: ConfigDict) -> None:
    """Raises `UserError` for a field whose value cannot be, as far as the fields alone tell."""
    if config.training.updates_per_epoch < 1:
        raise UserError(f"training.updates_per_epoch = {config.training.updates_per_epoch}; make it 1 or more")
    if config.training.images_at_once < 0:
        raise UserError(f"training.images_at_once = {config.training.images_at_once}; make it 1 or more, or 0 for all")
    if config.algorithm.name not in ALGORITHMS:
        raise UserError(f"algorithm.name = {config.algorithm.name!r} is unknown; use one of {sorted(ALGORITHMS)}")
    algorithm = algorithm_of(config)
    if isinstance(algorithm, ResidualNablaDB):
        algorithm.bins(config.sampling.num_steps)
    if config.model_dtype not in DTYPES:
        raise UserError(f"model_dtype = {config.model_dtype!r} is unknown; use one of {sorted(DTYPES)}")


def algorithm_of(config: ConfigDict) -> Algorithm:
    """The algorithm with its options."""
    options = {k: v for k, v in config.algorithm.items() if k != "name"}
    algorithm: Algorithm = ALGORITHMS[config.algorithm.name](**options)
    return algorithm


def assemble(config: ConfigDict, mesh: Mesh, base: StableDiffusion, reward: Reward) -> Finetuner:
    """A run's pieces from its model and reward, whose parameters may be shapes alone, for these devices."""
    base = with_options(base, config, mesh)
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
        flow=UNet2DConditionModel(flow, remat=c.remat),
        reward=reward,
        algorithm=algorithm_of(config),
        schedule=make_schedule(base.scheduler, config.sampling.num_steps, sampler=config.sampling.sampler),
        guidance=config.sampling.guidance,
        optimizer=make_optimizer(
            c.learning_rate, decay_lora=c.weight_decay_lora, decay_flow=c.weight_decay_flow, clip=c.clip
        ),
        mesh=mesh,
        start_from=starting_lora(config.lora.start_from, base, config.lora.rank),
        micro_batches=c.micro_batches,
        updates_per_epoch=c.updates_per_epoch,
        images_at_once=c.images_at_once,
    )


def with_options(base: StableDiffusion, config: ConfigDict, mesh: Mesh) -> StableDiffusion:
    """The model as these devices are to run it; no number depends on it but by rounding."""
    options = {"remat": config.training.remat, "platform": mesh.devices.flat[0].platform}
    return replace(base, unet=base.unet.clone(**options), vae=base.vae.clone(**options))


def abstract_model(config: ConfigDict) -> StableDiffusion:
    """The configuration's model without its weights, to compile and not to run: shapes in the place of arrays.

    The pinned Stable Diffusion 1.5 need not be here: the models' own defaults are its architecture.
    """
    dtype = DTYPES[config.model_dtype]
    if config.model == STABLE_DIFFUSION_1_5 and not Path(config.model).is_dir():
        unet, vae = UNet2DConditionModel(UNetConfig(), dtype), AutoencoderKL(VAEConfig(), dtype)
        text_encoder, scheduler = CLIPTextModel(CLIPTextConfig(), dtype), STABLE_DIFFUSION
    else:
        unet, vae, text_encoder, scheduler = read_architecture(resolve_model(config.model), dtype)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract_params(unet, vae, text_encoder))
    no_tokenizer: Any = None  # nothing is encoded
    return StableDiffusion(unet, vae, text_encoder, no_tokenizer, scheduler, shapes)


def starting_lora(file: str, base: StableDiffusion, rank: int) -> Params | None:
    """The LoRA in `file`, whose layers are then those that are trained; None for "". Its rank must be `rank`."""
    if not file:
        return None
    lora = load_lora(Path(file), base.params["unet"])
    ranks = sorted({leaf.shape[1] for name, leaf in flatten_dict(lora, sep=".").items() if name.endswith(".down")})
    if ranks != [rank]:
        found = " and ".join(str(n) for n in ranks)
        raise UserError(f"lora.start_from = {file} has rank {found} and lora.rank is {rank}; make them the same")
    return lora


def resolve_model(name: str) -> Path:
    """The folder of a shipped model's name, of a path, or of a model of the hub, `OWNER/NAME[@REVISION]`."""
    folder = SHIPPED_MODELS.get(name, Path(name))
    if folder.is_dir():
        return folder
    found = model_folder(name)
    if found is None:
        shipped = ", ".join(SHIPPED_MODELS)
        raise UserError(f"model {name!r} is no folder, no model of the hub (OWNER/NAME) and no shipped one ({shipped})")
    return found


def prompts_of(config: ConfigDict) -> tuple[str, ...]:
    """The prompts that training draws from."""
    return prompt_set(config.prompts).train
