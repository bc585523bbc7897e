"""Stable Diffusion in a folder, in diffusers' layout: read it, write it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict, to_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.tokenizer import CLIPTokenizer, load_tokenizer
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.typing import Params

_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of a text-to-image model; `params` has the parts' parameters under "unet", "vae", "text_encoder"."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]  # contents of scheduler_config.json
    params: Params

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one latent."""
        c = self.unet.config
        return (c.sample_size, c.sample_size, c.in_channels)


def load_folder(folder: Path, dtype: Any = jnp.float32) -> StableDiffusion:
    """The model in a diffusers folder, parameters and computation in `dtype`.

    Raises `UserError` naming the file that is missing, truncated, of another layout, or not what config.json says.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no diffusers model folder: it has no model_index.json")
    unet = UNet2DConditionModel(UNetConfig.from_json(read_json(folder / "unet/config.json")), dtype)
    vae = AutoencoderKL(VAEConfig.from_json(read_json(folder / "vae/config.json")), dtype)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_json(read_json(folder / "text_encoder/config.json")), dtype)
    expected = abstract_params(unet, vae, text_encoder)
    params = {}
    for part, file in _WEIGHTS.items():
        state = read_safetensors(folder / part / file)
        read = from_state_dict(state, expected[part], str(folder / part / file))
        params[part] = jax.tree.map(lambda a: jnp.asarray(a, dtype), read)
    return StableDiffusion(
        unet,
        vae,
        text_encoder,
        load_tokenizer(folder / "tokenizer"),
        read_json(folder / "scheduler/scheduler_config.json"),
        params,
    )


def save_folder(
    folder: Path,
    configs: dict[str, dict[str, Any]],
    params: Params,
    weights_dtype: Any = np.float16,
) -> None:
    """Writes unet, vae, text_encoder and scheduler of a diffusers folder; the tokenizer is `train_tokenizer`'s.

    `configs` holds the contents of each part's JSON file, under the part's name; `params` those of the three networks.
    """
    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "scheduler": ("diffusers", "DDIMScheduler"),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {part: list(name) for part, name in classes.items()}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", **configs["scheduler"]})
    for part, file in _WEIGHTS.items():
        library, name = classes[part]
        own = {"_class_name": name} if library == "diffusers" else {"architectures": [name], "model_type": "clip_text_model"}
        _write_json(folder / part / "config.json", own | configs[part])
        state = {key: array.astype(weights_dtype) for key, array in to_state_dict(params[part]).items()}
        if part == "text_encoder":
            state = {f"text_model.{key}": array for key, array in state.items()}
        save_file(state, folder / part / file, metadata={"format": "pt"})


def abstract_params(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> Params:
    """Shapes of all parameters, as the configs imply them, without allocating any."""
    key = jax.random.key(0)
    c, size = unet.config, unet.config.sample_size
    latent = jnp.zeros((1, size, size, c.in_channels))
    context = jnp.zeros((1, 1, c.cross_attention_dim))
    image = jnp.zeros((1, 8 * vae.config.downscale, 8 * vae.config.downscale, vae.config.in_channels))
    return {
        "unet": jax.eval_shape(unet.init, key, latent, jnp.zeros(1, jnp.int32), context)["params"],
        "vae": jax.eval_shape(vae.init, key, image)["params"],
        "text_encoder": jax.eval_shape(text_encoder.init, key, jnp.zeros((1, 2), jnp.int32))["params"],
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object. Raises `UserError` naming a file that is missing or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; download the model again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download the model again") from error


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as numpy. Raises `UserError` naming a file that is missing or truncated."""
    if not file.is_file():
        raise UserError(f"{file} is missing; download the model again")
    try:
        with safe_open(file, framework="flax") as tensors:
            return {name: np.asarray(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is truncated or damaged ({error}); download it again") from error


def _write_json(file: Path, contents: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(contents, indent=2) + "\n")
