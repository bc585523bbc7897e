"""Reads Stable Diffusion 1 or 2 from one file, the format of the original code (LDM) and of model sites.

Such a file has only tensors, with LDM's layer names. The config is derived: widths and depths from the shapes of the
tensors, the version from the text encoder, heads and activations from the version, and the noise schedule from the file
if it has one. Some files of version 2 do not say what the UNet predicts; then the user must say it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from nabla_gfn_jax.base_models.diffusers_folder import abstract_params, check_parts_fit
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.checkpoints.files import TensorFiles, read_metadata
from nabla_gfn_jax.checkpoints.ldm_names import unet_names, vae_names
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict, torch_name
from nabla_gfn_jax.checkpoints.weights import PICKLED, read_state_dict
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.tokenizer import END, READER, START, CLIPTokenizer, make_encoder, read_vocabulary
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.typing import Params

ENDINGS = (".safetensors", *PICKLED)
PREDICTIONS = ("epsilon", "v_prediction")
CHOICES = (*PREDICTIONS, "non_ema")  # the words that may follow a file's name

_UNET, _EMA, _VAE = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_WRAPPED = "text_model."  # follows `_CLIP` in most files
_HEAD_WIDTH = 64  # width of a head in both text encoders and in version 2's UNet
_V_PIXELS, _PIXELS = 768, 512  # image size of version 2's models that predict v, and of all others
_WORDS = "openai/clip-vit-large-patch14"  # has the vocabulary of both versions
_OPEN_CLIP_NAMES = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def split_choices(name: str) -> tuple[str, tuple[str, ...]]:
    """Splits `FILE:CHOICE,CHOICE` into file and choices. A name without choices is returned as it is, with ()."""
    file, _, said = name.rpartition(":")
    choices = tuple(said.split(","))
    return (file, choices) if file and set(choices) <= set(CHOICES) else (name, ())


def load_single_file(file: Path, choices: tuple[str, ...] = (), dtype: Any = jnp.float32) -> StableDiffusion:
    """Loads the model in `file`, with parameters and computation in `dtype`.

    If the file has two sets of UNet weights, the running mean (EMA) is read, which diffusers' folders contain too.

    Args:
        file: safetensors, or a pickle, of which only tensors are read and nothing is executed.
        choices: some of `CHOICES`: the prediction type, if the file does not say it; "non_ema" for the other weights.
        dtype: type of the parameters and of the computation.

    Raises:
        UserError: the file is missing, truncated, not Stable Diffusion 1 or 2, or does not say what it predicts.
    """
    state = read_state_dict(file)
    unet, vae, text, scheduler = architecture(file, choices, dtype, state)
    tokenizer = _tokenizer(version_2=_OPEN_CLIP in _prefixes(state), tokens=text.config.max_position_embeddings)
    check_parts_fit(file, unet.config, vae.config, text.config, tokenizer)
    expected = abstract_params(unet, vae, text)
    parts = {
        "unet": _unet_state(state, expected["unet"], "non_ema" in choices),
        "vae": _renamed(state, _VAE, vae_names(_names(expected["vae"]))),
        "text_encoder": _text_state(state),
    }
    params = {
        part: from_state_dict(
            tensors, expected[part], str(file), "the architecture of its shapes", place=lambda a: jnp.asarray(a, dtype)
        )
        for part, tensors in parts.items()
    }
    return StableDiffusion(unet, vae, text, tokenizer, scheduler, params)


def architecture(
    file: Path, choices: tuple[str, ...], dtype: Any, state: Mapping[str, np.ndarray] | None = None
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel, dict[str, Any]]:
    """UNet, VAE, text encoder and scheduler, without weights. Raises `UserError` as `load_single_file` does."""
    state = read_state_dict(file) if state is None else state
    found = _prefixes(state)
    if _UNET + "label_emb." in found or "conditioner." in found:
        raise UserError(f"{file} is Stable Diffusion XL, which is not supported; use a model of version 1 or 2")
    for part, prefixes in {"UNet": (_UNET,), "VAE": (_VAE,), "text encoder": (_CLIP, _OPEN_CLIP)}.items():
        if not found & set(prefixes):
            raise UserError(f"{file} has no {part} (names {prefixes[0]}…); use a complete Stable Diffusion 1 or 2")
    version_2 = _OPEN_CLIP in found
    kind = _prediction(file, choices, state, version_2)
    scheduler = STABLE_DIFFUSION | {"prediction_type": kind} | _schedule(state)
    unet, vae = _unet_config(_shapes(state, _UNET), version_2), _vae_config(_shapes(state, _VAE))
    pixels = _V_PIXELS if version_2 and kind == "v_prediction" else _PIXELS
    unet["sample_size"] = pixels // vae.downscale
    text = _open_clip_config(_shapes(state, _OPEN_CLIP)) if version_2 else _clip_config(_shapes(state, _CLIP))
    nets = UNet2DConditionModel(UNetConfig(**unet), dtype), AutoencoderKL(vae, dtype), CLIPTextModel(text, dtype)
    return (*nets, scheduler)


def files_of(file: Path) -> dict[str, Path]:
    """The files that `load_single_file` reads, by name."""
    return {file.name: file, "tokenizer.json": _words()}


class _Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names. Each is read when it is accessed."""

    def __init__(self, state: Mapping[str, np.ndarray], names: Mapping[str, str]):
        """`names` maps new names to names in `state`."""
        self._state, self._names = state, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._state[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _names(expected: Params) -> list[str]:
    return [torch_name(path) for path in flatten_dict(expected)]


def _renamed(state: Mapping[str, np.ndarray], prefix: str, old: Mapping[str, str]) -> _Renamed:
    """The tensors whose names start with `prefix`, under our names. Unknown tensors keep their names for the error."""
    ours = {prefix + name: new for new, name in old.items()}
    return _Renamed(state, {ours.get(key, key): key for key in state if key.startswith(prefix)})


def _unet_state(state: Mapping[str, np.ndarray], expected: Params, non_ema: bool) -> _Renamed:
    old = unet_names(_names(expected))
    if non_ema or not any(key.startswith(_EMA) for key in state):
        return _renamed(state, _UNET, old)
    return _renamed(state, _EMA, {new: name.replace(".", "") for new, name in old.items()})


def _text_state(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The text encoder's tensors under transformers' names.

    OpenCLIP's last block is omitted, because it is not used.
    """
    if _OPEN_CLIP not in _prefixes(state):
        keys = [key for key in state if key.startswith(_CLIP)]
        return _Renamed(state, {key.removeprefix(_CLIP).removeprefix(_WRAPPED): key for key in keys})
    last = f"transformer.resblocks.{_blocks(_shapes(state, _OPEN_CLIP)) - 1}."
    found: dict[str, np.ndarray] = {}
    for key in (key.removeprefix(_OPEN_CLIP) for key in state if key.startswith(_OPEN_CLIP)):
        if key.startswith(last) or key in ("text_projection", "logit_scale", "attn_mask"):
            continue
        if key == "positional_embedding":
            found["embeddings.position_embedding.weight"] = state[_OPEN_CLIP + key]
            continue
        name = key.replace("transformer.resblocks.", "encoder.layers.")
        for old, new in _OPEN_CLIP_NAMES.items():
            name = re.sub(rf"(?<![^.]){re.escape(old)}(?=\.)", new, name)
        joined = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if joined is None:
            found[name] = state[_OPEN_CLIP + key]
            continue
        for projection, rows in zip("qkv", np.split(state[_OPEN_CLIP + key], 3), strict=True):
            found[f"{joined[1]}.self_attn.{projection}_proj.{joined[2]}"] = rows
    return found


def _prefixes(state: Mapping[str, np.ndarray]) -> set[str]:
    known = (_UNET, _VAE, _CLIP, _OPEN_CLIP, _UNET + "label_emb.", "conditioner.")
    return {prefix for prefix in known if any(key.startswith(prefix) for key in state)}


def _shapes(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors with this prefix, by their names without it."""
    shape = state.shape if isinstance(state, TensorFiles) else lambda key: state[key].shape
    return {key.removeprefix(prefix): shape(key) for key in state if key.startswith(prefix)}


def _unet_config(shapes: Mapping[str, tuple[int, ...]], version_2: bool) -> dict[str, Any]:
    """The fields of `UNetConfig` except the size of a latent."""
    levels: list[list[tuple[int, bool]]] = [[]]  # for each level, the layers as (width, has attention)
    for block in range(1, 1 + len({key.split(".")[1] for key in shapes if key.startswith("input_blocks.")})):
        kernel = shapes.get(f"input_blocks.{block}.0.in_layers.2.weight")
        if kernel is not None:
            levels[-1].append((kernel[0], f"input_blocks.{block}.1.proj_in.weight" in shapes))
        elif f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
    attends = [any(layer[1] for layer in level) for level in levels]
    widths = tuple(level[0][0] for level in levels)
    keys = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "attention_head_dim": tuple(w // _HEAD_WIDTH for w in widths) if version_2 else 8,
        "cross_attention_dim": shapes[keys][1],
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    layers = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    found = {(int(m[1]), int(m[2])): shape for key, shape in shapes.items() if (m := layers.fullmatch(key))}
    return VAEConfig(
        block_out_channels=tuple(found[level, 0][0] for level in range(1 + max(level for level, _ in found))),
        layers_per_block=1 + max(layer for _, layer in found),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def _clip_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPTextConfig:
    shapes = {key.removeprefix(_WRAPPED): shape for key, shape in shapes.items()}
    rows, width = shapes["embeddings.token_embedding.weight"]
    return CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}),
        num_attention_heads=max(width // _HEAD_WIDTH, 1),
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
    )


def _open_clip_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPTextConfig:
    rows, width = shapes["token_embedding.weight"]
    return CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=_blocks(shapes) - 1,
        num_attention_heads=max(width // _HEAD_WIDTH, 1),
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_act="gelu",
    )


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len({key.split(".")[2] for key in shapes if key.startswith("transformer.resblocks.")})


def _prediction(file: Path, choices: tuple[str, ...], state: Mapping[str, np.ndarray], version_2: bool) -> str:
    """The prediction type, from the user, the file, its header, or the YAML file beside it, in this order."""
    said = next((choice for choice in choices if choice in PREDICTIONS), None)
    if said is not None:
        return said
    header = {} if file.suffix in PICKLED else read_metadata(file)
    stated = header.get("modelspec.prediction_type", "")
    beside = file.with_suffix(".yaml")
    text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
    if "v_pred" in state or stated.startswith("v") or re.search(r"parameterization:\s*[\"']?v\b", text):
        return "v_prediction"
    if stated or "model:" in text or not version_2:
        return "epsilon"
    raise UserError(
        f"{file} is Stable Diffusion 2 and does not say what it predicts; name it {file}:v_prediction if it is for "
        f"{_V_PIXELS} pixels, or {file}:epsilon if it is for {_PIXELS}"
    )


def _schedule(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of the file's noise schedule that differ from Stable Diffusion's."""
    if "ztsnr" in state:
        return {"rescale_betas_zero_snr": True}
    if "alphas_cumprod" not in state:
        return {}
    signal = np.asarray(state["alphas_cumprod"], np.float64)
    if signal.shape != (1000,) or np.allclose(signal, alphas_cumprod(STABLE_DIFFUSION), rtol=1e-2, atol=1e-6):
        return {}
    if signal[-1] < 1e-6:
        return {"rescale_betas_zero_snr": True}
    return {"trained_betas": (1 - signal / np.concatenate([[1.0], signal[:-1]])).tolist()}


def _words() -> Path:
    return hub.find("tokenizer", "tokenizer.json", repo=_WORDS)


def _tokenizer(*, version_2: bool, tokens: int) -> CLIPTokenizer:
    """CLIP's tokenizer. Version 2 pads with the token 0, "!", and version 1 with the end token."""
    vocabulary, merges = read_vocabulary(_words().parent)
    padding = 0 if version_2 else vocabulary[END]
    return CLIPTokenizer(make_encoder(vocabulary, merges, [START, END]), tokens, padding, reader=READER)
