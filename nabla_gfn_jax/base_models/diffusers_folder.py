"""Reads and writes Stable Diffusion as a folder in diffusers' layout."""

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints.files import read_json, write_json, write_safetensors
from nabla_gfn_jax.checkpoints.hub import WEIGHTS, no_weights, shards, weights_files
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict, to_state_dict
from nabla_gfn_jax.checkpoints.weights import read_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.tokenizer import CLIPTokenizer, load_tokenizer
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.typing import Params

_DIFFUSERS_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
# The ids are those of Stable Diffusion's own file. With the end id 2, transformers takes the highest id as the end.
# transformers computes in the dtype stated here. Without it, it would use the dtype of the weights file, which differs
# from that of diffusers' other parts.
_TEXT_ENCODER_JSON: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "dtype": "float32",
}


def load_folder(folder: Path, dtype: Any = jnp.float32) -> StableDiffusion:
    """Loads the model in a diffusers folder, with parameters and computation in `dtype`.

    Weights may be one file or several with an index. The fp16 variant or pickled weights are read if a part has nothing
    else. Tensors are read one at a time, so that the model is in memory only once.

    Raises:
        UserError: a file is missing, truncated, of another layout, or contradicts its config.json; or the parts do not
            fit together.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a model folder of diffusers: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    lacks = next((part for part in WEIGHTS if part not in index), None)
    if lacks is not None:
        kind = str(index.get("_class_name"))[:80]
        raise UserError(f"{folder} has no {lacks}: it is a {kind}; use a model of Stable Diffusion 1 or 2")
    unet, vae, text_encoder, scheduler = read_architecture(folder, dtype)
    tokenizer = load_tokenizer(folder / "tokenizer")
    check_parts_fit(folder, unet.config, vae.config, text_encoder.config, tokenizer)
    expected = abstract_params(unet, vae, text_encoder)
    params = {part: _load_params(folder, part, expected[part], dtype) for part in WEIGHTS}
    return StableDiffusion(unet, vae, text_encoder, tokenizer, scheduler, params)


def read_architecture(
    folder: Path, dtype: Any
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel, dict[str, Any]]:
    """UNet, VAE, text encoder and scheduler as the folder's JSON files describe them, without weights."""
    unet = UNet2DConditionModel(UNetConfig.from_json(read_json(folder / "unet/config.json")), dtype)
    vae = AutoencoderKL(VAEConfig.from_json(read_json(folder / "vae/config.json")), dtype)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_json(read_json(folder / "text_encoder/config.json")), dtype)
    return unet, vae, text_encoder, read_json(folder / "scheduler/scheduler_config.json")


def _load_params(folder: Path, part: str, expected: Params, dtype: Any) -> Params:
    state, source = _read_weights(folder / part, part)
    return from_state_dict(state, expected, str(source), place=lambda a: jnp.asarray(a, dtype))


def check_parts_fit(
    folder: Path, unet: UNetConfig, vae: VAEConfig, text: CLIPTextConfig, tokenizer: CLIPTokenizer
) -> None:
    """Raises `UserError` if the parts in `folder` belong to different models."""
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        found = f"{unet.in_channels} in, {unet.out_channels} out, {vae.latent_channels} in the VAE"
        raise UserError(f"{folder}: the channels of a latent differ ({found}); use a plain text-to-image model")
    if unet.cross_attention_dim != text.hidden_size:
        widths = f"cross_attention_dim {unet.cross_attention_dim} and hidden_size {text.hidden_size}"
        raise UserError(f"{folder}: unet and text_encoder belong to different models: {widths}")
    size, entries = tokenizer.max_length, tokenizer.encoder.get_vocab_size()
    if size > text.max_position_embeddings or entries > text.vocab_size:
        limits = f"{text.max_position_embeddings} positions and {text.vocab_size} entries"
        raise UserError(f"{folder}/tokenizer makes {size} tokens of {entries} kinds; text_encoder has {limits}")


def _read_weights(folder: Path, part: str) -> tuple[Mapping[str, np.ndarray], Path]:
    """The tensors of a part, and the file that lists them."""
    for file in (folder / name for name in weights_files(part)):
        if file.suffix == ".json" and file.is_file():
            return ChainMap(*(read_state_dict(folder / shard) for shard in shards(file))), file  # type: ignore[arg-type]
        if file.is_file():
            return read_state_dict(file), file
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    raise UserError(f"{folder.parent}: {no_weights(part, there)}")


def save_folder(
    folder: Path,
    configs: dict[str, dict[str, Any]],
    params: Params,
    weights_dtype: Any = np.float16,
) -> None:
    """Writes unet, vae, text_encoder and scheduler of a diffusers folder. `emoji.byte_pairs` writes the tokenizer.

    `configs` has the contents of each part's JSON file by the part's name, and `params` the parameters.
    """
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {part: ["diffusers", name] for part, name in _DIFFUSERS_CLASSES.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_json(folder / "model_index.json", index)
    for part, name in _DIFFUSERS_CLASSES.items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(folder / part / file, configs[part] | {"_class_name": name})
    write_json(folder / "text_encoder/config.json", configs["text_encoder"] | _TEXT_ENCODER_JSON)
    for part, stem in WEIGHTS.items():
        state = {key: array.astype(weights_dtype) for key, array in to_state_dict(params[part]).items()}
        if part == "text_encoder":  # the layout of transformers before version 5, which later versions read too
            state = {f"text_model.{key}": array for key, array in state.items()}
        write_safetensors(folder / part / f"{stem}.safetensors", state)


def abstract_params(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> Params:
    """The shapes of all parameters according to the configs; allocates nothing."""
    key = jax.random.key(0)
    c = unet.config
    latent = jnp.zeros((1, *c.latent_size, c.in_channels))
    context = jnp.zeros((1, 1, c.cross_attention_dim))
    image = jnp.zeros((1, 8 * vae.config.downscale, 8 * vae.config.downscale, vae.config.in_channels))
    return {
        "unet": jax.eval_shape(unet.init, key, latent, jnp.zeros(1, jnp.int32), context)["params"],
        "vae": jax.eval_shape(vae.init, key, image)["params"],
        "text_encoder": jax.eval_shape(text_encoder.init, key, jnp.zeros((1, 2), jnp.int32))["params"],
    }
