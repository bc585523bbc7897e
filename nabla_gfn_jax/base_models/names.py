"""Base models by name: a shipped model, a folder, a file, or OWNER/NAME on the hub."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_gfn_jax.base_models.diffusers_folder import abstract_params, load_folder, read_architecture
from nabla_gfn_jax.base_models.single_file import ENDINGS, architecture, files_of, load_single_file, split_choices
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints.hub import STABLE_DIFFUSION_1_5, files_read, model_folder
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig

SHIPPED_MODELS = {"emoji": Path(__file__).parents[1] / "assets" / "emoji"}
# The types of the frozen UNet, VAE and text encoder. Rewards, LoRA, heads and the optimizer are always in float32.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def resolve_model(name: str) -> Path:
    """The folder or file of a model. Raises `UserError` if there is no model of that name."""
    plain, choices = split_choices(str(name))
    path = SHIPPED_MODELS.get(plain, Path(plain).expanduser())
    kinds = f"a folder in diffusers' layout, OWNER/NAME on the hub, or a shipped model ({', '.join(SHIPPED_MODELS)})"
    if path.is_dir() and not choices:
        return path
    if path.is_file() and path.suffix in ENDINGS:
        return path
    if choices or path.suffix in ENDINGS:
        raise UserError(f"model {name!r}: there is no file {path}; give an existing file, {kinds}")
    found = model_folder(plain)
    if found is None:
        raise UserError(f"model {name!r} does not exist; give a file of weights ({', '.join(ENDINGS)}), {kinds}")
    return found


def model_files(name: str) -> dict[str, Path]:
    """The files that `load_model` reads, by name. Raises `UserError` if there is no model of that name."""
    path = resolve_model(name)
    return files_of(path) if path.is_file() else {str(file.relative_to(path)): file for file in files_read(path)}


def load_model(name: str, dtype: Any = jnp.float32) -> StableDiffusion:
    """Loads the model called `name`, with parameters and computation in `dtype`.

    Raises `UserError` as `load_folder` and `load_single_file` do.
    """
    path = resolve_model(name)
    return load_single_file(path, split_choices(name)[1], dtype) if path.is_file() else load_folder(path, dtype)


def abstract_model(name: str, dtype: Any = jnp.float32) -> StableDiffusion:
    """The model with shapes instead of weights, which can be compiled but not run.

    The pinned Stable Diffusion 1.5 need not be downloaded, because the default configs are its architecture.
    """
    if name == STABLE_DIFFUSION_1_5 and not Path(name).is_dir():
        unet, vae = UNet2DConditionModel(UNetConfig(), dtype), AutoencoderKL(VAEConfig(), dtype)
        text_encoder, scheduler = CLIPTextModel(CLIPTextConfig(), dtype), STABLE_DIFFUSION
    else:
        path = resolve_model(name)
        found = architecture(path, split_choices(name)[1], dtype) if path.is_file() else read_architecture(path, dtype)
        unet, vae, text_encoder, scheduler = found
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract_params(unet, vae, text_encoder))
    no_tokenizer: Any = None  # no prompt is encoded
    return StableDiffusion(unet, vae, text_encoder, no_tokenizer, scheduler, shapes)
