"""From a configuration to the pieces it names, checked before any long work."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

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
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.finetuner import Finetuner, make_optimizer
from nabla_gfn_jax.typing import Params

SHIPPED_MODELS = {"emoji": Path(__file__).parent / "assets" / "emoji"}
# Of the frozen UNet, VAE and text encoder; rewards, LoRA, g_φ and the optimizer are in float32 always.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check(config: Settings) -> None:
    """Raises `UserError` for a model or prompts that are not to be found; loads no weights."""
    resolve_model(config.model)
    prompts_of(config)


def build(config: Settings) -> Finetuner:
    """Loads what the configuration names. Raises `UserError` for whatever is wrong, before any long work."""
    mesh = data_mesh(config.training.trajectories, config.training.micro_batches)
    with host_memory():
        base = load_folder(resolve_model(config.model), DTYPES[config.model_dtype])
        reward = load_reward(config.reward)
    return assemble(config, mesh, base, reward)


def assemble(config: Settings, mesh: Mesh, base: StableDiffusion, reward: Reward) -> Finetuner:
    """A run's pieces from its model and reward, whose parameters may be shapes alone, for these devices."""
    base = with_options(base, config, mesh)
    unet = base.unet.config
    flow = UNetConfig(
        sample_size=unet.sample_size,
        in_channels=unet.in_channels,
        out_channels=unet.in_channels,
        cross_attention_dim=unet.cross_attention_dim,
        down_block_types=("CrossAttnDownBlock2D",) * len(config.correction.block_out_channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.correction.block_out_channels),
        **dataclasses.asdict(config.correction),
    )
    c = config.training
    return Finetuner(
        base=base,
        flow=UNet2DConditionModel(flow, remat=c.remat),
        reward=reward,
        algorithm=config.algorithm,
        schedule=make_schedule(base.scheduler, config.sampling.num_steps, sampler=config.sampling.sampler),
        guidance=config.sampling.guidance,
        optimizer=make_optimizer(
            c.learning_rate, decay_lora=c.weight_decay_lora, decay_flow=c.weight_decay_correction, clip=c.clip
        ),
        mesh=mesh,
        start_from=starting_lora(config.lora.start_from, base, config.lora.rank),
        micro_batches=c.micro_batches,
        updates_per_epoch=c.updates_per_epoch,
        images_at_once=c.images_at_once,
    )


def with_options(base: StableDiffusion, config: Settings, mesh: Mesh) -> StableDiffusion:
    """The model as these devices are to run it; no number depends on it but by rounding."""
    options = {"remat": config.training.remat, "platform": mesh.devices.flat[0].platform}
    return replace(base, unet=base.unet.clone(**options), vae=base.vae.clone(**options))


def abstract_model(config: Settings) -> StableDiffusion:
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


def starting_lora(file: Path | None, base: StableDiffusion, rank: int) -> Params | None:
    """The LoRA in `file`, whose layers are then those that are trained; None for no file. Its rank must be `rank`."""
    if file is None:
        return None
    lora = load_lora(file, base.params["unet"])
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


def prompts_of(config: Settings) -> tuple[str, ...]:
    """The prompts that training draws from."""
    return prompt_set(config.prompts).train
