"""Base models by name: a shipped one's, a folder, or OWNER/NAME on the hub."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_gfn_jax.base_models.diffusers_folder import abstract_params, load_folder, read_architecture
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints.hub import STABLE_DIFFUSION_1_5, model_folder
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig

SHIPPED_MODELS = {"emoji": Path(__file__).parents[1] / "assets" / "emoji"}
_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # endings of files, not of models on the hub
# Of the frozen UNet, VAE and text encoder; rewards, LoRA, heads and the optimizer are in float32 always.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def resolve_model(name: str) -> Path:
    """The folder of a model. Raises `UserError` if there is none of that name."""
    folder = SHIPPED_MODELS.get(name, Path(name).expanduser())
    if folder.is_dir():
        return folder
    kinds = f"a folder in diffusers' layout, OWNER/NAME on the hub, or a shipped model ({', '.join(SHIPPED_MODELS)})"
    if folder.is_file() or folder.suffix in _WEIGHTS:
        raise UserError(f"model {name!r} is a file of weights, which is not read by itself; give {kinds}")
    found = model_folder(name)
    if found is None:
        raise UserError(f"model {name!r} does not exist; give {kinds}")
    return found


def load_model(name: str, dtype: Any = jnp.float32) -> StableDiffusion:
    """The model called `name`, its parameters and computation in `dtype`. Raises `UserError` as `load_folder` does."""
    return load_folder(resolve_model(name), dtype)


def abstract_model(name: str, dtype: Any = jnp.float32) -> StableDiffusion:
    """The model without its weights, to compile and not to run: shapes in the place of arrays.

    The pinned Stable Diffusion 1.5 need not be here: the models' own defaults are its architecture.
    """
    if name == STABLE_DIFFUSION_1_5 and not Path(name).is_dir():
        unet, vae = UNet2DConditionModel(UNetConfig(), dtype), AutoencoderKL(VAEConfig(), dtype)
        text_encoder, scheduler = CLIPTextModel(CLIPTextConfig(), dtype), STABLE_DIFFUSION
    else:
        unet, vae, text_encoder, scheduler = read_architecture(resolve_model(name), dtype)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), abstract_params(unet, vae, text_encoder))
    no_tokenizer: Any = None  # nothing is encoded
    return StableDiffusion(unet, vae, text_encoder, no_tokenizer, scheduler, shapes)
