"""Reads LoRA files in all layouts of `lora_names`, and writes them in diffusers' and kohya's layouts.

For each adapted layer a file has A or "down" (rank, in) and B or "up" (out, rank); the layer adds alpha / rank · B A x.
For a convolution, A also has the kernel's height and width, (rank, in, height, width), and B is 1x1. Our own scale is
1. In files that we write, alpha therefore equals the rank: kohya's layout states alpha, diffusers' layout assumes it.
In files that we read, alpha / rank is multiplied into "up"; PEFT stores alpha in a second file.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nabla_gfn_jax.checkpoints.files import plain, read_json, read_metadata, write_safetensors
from nabla_gfn_jax.checkpoints.lora_names import PEFT, TEXT_ENCODER, UNET, LayerNames, kohya_name, other_kind
from nabla_gfn_jax.checkpoints.torch_layout import from_torch_layout, to_torch_layout
from nabla_gfn_jax.checkpoints.weights import PICKLED, read_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Params

_ABOUT = "nabla_gfn_jax"  # the header's entry that describes a file of this package
_IN_FOLDER = ("diffusers", "pytorch_lora_weights", "adapter_model")  # the possible names of a LoRA in a folder
_ENDINGS = (".safetensors", ".bin", ".pt")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's initialisations that change the base weights
_LARGEST_ALPHA = 1e9  # a usual alpha is between 1 and 256
_SHOWN = 20  # the most problems that one message lists

AlphaOf = Callable[[str, str, int], float]  # (part, layer, rank) → alpha where scale is alpha / rank
_Found = dict[tuple[str, str], dict[str, np.ndarray]]  # by part and layer, its matrices


def save_lora(file: Path, lora: Params, about: Mapping[str, Any] | None = None) -> None:
    """Writes the UNet's `lora` collection in diffusers' layout; `pipe.load_lora_weights(file)` reads it.

    `about` is a description for the file's header, which `read_about` returns.
    """
    state = {}
    for name, down, up in _pairs(lora):
        state[f"unet.{name}.lora_A.weight"] = down
        state[f"unet.{name}.lora_B.weight"] = up
    write_safetensors(file, state, header(about))


def save_kohya(file: Path, lora: Params, about: Mapping[str, Any] | None = None) -> None:
    """Writes the UNet's `lora` collection in the layout of kohya's scripts, which ComfyUI and others read."""
    state = {}
    for name, down, up in _pairs(lora):
        layer = kohya_name(name)
        state[f"{layer}.lora_down.weight"] = down
        state[f"{layer}.lora_up.weight"] = up
        state[f"{layer}.alpha"] = np.asarray(len(down), np.float32)
    write_safetensors(file, state, header(about))


def read_about(path: Path) -> dict[str, Any]:
    """The description that `save_lora` or `save_kohya` wrote to the header; {} if another program wrote the file.

    Raises `UserError` naming a file that is missing or truncated.
    """
    file = find_file(path)
    try:
        about = json.loads(_metadata(file).get(_ABOUT, "{}"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def load_lora(path: Path, unet: Params, text_encoder: Params | None = None) -> Params:
    """Loads a LoRA from a file, or from a folder of PEFT or diffusers, as a `lora` collection, float32, at scale 1.

    The result is a tree like the UNet's. If the file adapts the text encoder too, that tree is under "text_encoder". A
    linear layer has down (in, rank) and up (rank, out), a convolution down (height, width, in, rank) and up (rank,
    out).

    Args:
        path: safetensors, or a pickle (`.bin`, `.pt`), of which only tensors are read and nothing is executed.
        unet: the UNet's parameters or their shapes. Any of its linear layers and convolutions may be adapted.
        text_encoder: the text encoder's parameters or shapes; without them a LoRA that adapts it is refused.

    Raises:
        UserError: the file is missing or truncated, is not a LoRA, is of an unsupported kind, or has tensors that do
            not fit, all of which are listed.
    """
    file = find_file(path)
    state, metadata = read_state_dict(file), _metadata(file)
    if kind := other_kind(state):
        raise UserError(f"{file} is {kind}")
    params = {UNET: unet} | ({} if text_encoder is None else {TEXT_ENCODER: text_encoder})
    shapes = {part: _kernels(tree) for part, tree in params.items()}
    found, problems = _sort(state, LayerNames(shapes), "the model" if text_encoder is not None else "the UNet")
    for (part, layer), matrices in found.items():
        problems += _fit(layer, matrices, shapes[part][layer])
    if problems or not found:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        reason = "; ".join([*problems[:_SHOWN], *more]) or "it has no tensors"
        raise UserError(f"{file} is not a LoRA for this model: {reason}")
    alpha_of = _alphas(file, metadata, is_peft=any(key.startswith(PEFT) for key in state))
    paths = {(part, ".".join(p[:-1])): p[:-1] for part, tree in params.items() for p in flatten_dict(tree)}
    lora = {}
    for (part, layer), matrices in found.items():
        rank = len(matrices["down"])
        alpha = matrices["alpha"].item() if "alpha" in matrices else alpha_of(part, layer, rank)
        place = (*((part,) if part == TEXT_ENCODER else ()), *paths[part, layer])
        down, up = (from_torch_layout("kernel", matrices[name], matrices[name].ndim) for name in ("down", "up"))
        lora[(*place, "down")] = jnp.asarray(down)
        lora[(*place, "up")] = jnp.asarray(up * (alpha / rank))
    return unflatten_dict(lora)


def find_file(path: Path) -> Path:
    """The path itself if it is a file, otherwise the LoRA file in the folder. Raises `UserError` if there is none."""
    if not path.is_dir():
        return path
    names = [stem + ending for stem in _IN_FOLDER for ending in _ENDINGS]
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} has no LoRA file called {', '.join(names)}; name the file itself")
    return file


def _metadata(file: Path) -> dict[str, str]:
    return {} if file.suffix in PICKLED else read_metadata(file)


def header(about: Mapping[str, Any] | None) -> dict[str, str] | None:
    """The metadata of a safetensors file with a description, which `read_about` returns."""
    return None if about is None else {_ABOUT: json.dumps(plain(about), sort_keys=True)}


def _pairs(lora: Params) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """For each adapted layer: dotted name, down (rank, in, …) and up (out, rank, …), float32, in PyTorch's axes."""
    leaves = {name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(lora, sep=".").items()}
    found = []
    for name in (name.removesuffix(".down") for name in leaves if name.endswith(".down")):
        down, up = to_torch_layout("kernel", leaves[f"{name}.down"]), leaves[f"{name}.up"].T
        found.append((name, down, up if down.ndim == 2 else up[:, :, None, None]))
    return found


def _kernels(params: Params) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels of all linear layers and convolutions, by the layer's name."""
    leaves = flatten_dict(params).items()
    return {".".join(path[:-1]): leaf.shape for path, leaf in leaves if path[-1] == "kernel"}


def _sort(state: Mapping[str, np.ndarray], names: LayerNames, whose: str) -> tuple[_Found, list[str]]:
    """The tensors by layer, float32, and a problem for each tensor without a layer."""
    found: _Found = defaultdict(dict)
    problems = []
    for key in state:
        place = names.place(key)
        if place is None:
            problems.append(f"{key} belongs to no layer of {whose}")
        else:
            found[place.part, place.layer][place.matrix] = np.asarray(state[key], np.float32)
    return found, problems


def _fit(layer: str, matrices: dict[str, np.ndarray], kernel: tuple[int, ...]) -> list[str]:
    """Reshapes down to (rank, in) or (rank, in, height, width) and up to (out, rank), in place. Returns problems.

    A linear layer and a 1x1 convolution are equivalent. A convolution may have a third matrix, "mid", of the kernel's
    size, with a 1x1 down (LyCORIS' Tucker form). Both are multiplied into one down.
    """
    missing = [f"{layer} has no {matrix} matrix" for matrix in ("down", "up") if matrix not in matrices]
    if missing:
        return missing
    *size, inputs, outputs = kernel
    down, up = matrices["down"], matrices["up"]
    shapes = f"down {down.shape} and up {up.shape}"
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    mid = matrices.pop("mid", None)
    if mid is not None and mid.ndim == down.ndim == 4 and mid.shape[1] == len(down) and down.shape[2:] == (1, 1):
        down = np.einsum("rshw,si->rihw", mid, down[:, :, 0, 0])
    if not size and down.ndim == 4 and down.shape[2:] == (1, 1):
        down = down[:, :, 0, 0]
    if size == [1, 1] and down.ndim == 2:
        down = down[:, :, None, None]
    rank = max(len(down), 1) if down.ndim else 1
    if down.shape != (rank, inputs, *size) or up.shape != (outputs, rank):
        return [f"{layer} has {shapes} for a layer from {inputs} to {outputs} features{_sized(size)}"]
    if "alpha" in matrices and matrices["alpha"].size != 1:
        return [f"{layer} has alpha of shape {matrices['alpha'].shape}; it is one number"]
    matrices["down"], matrices["up"] = down, up
    return []


def _sized(size: list[int]) -> str:
    return f", {size[0]}x{size[1]}" if size else ""


def _alphas(file: Path, metadata: dict[str, str], *, is_peft: bool) -> AlphaOf:
    """alpha according to PEFT's settings, which are in a file beside the LoRA or, in newer diffusers, in the header.

    With rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732) the scale is alpha / √rank.
    """
    of_part = _peft_settings(file, metadata, is_peft)

    def alpha_of(part: str, layer: str, rank: int) -> float:
        settings = of_part[part]
        # As in PEFT, the first pattern that matches the end of the layer's name, as a regular expression.
        names = (layer, f"text_model.{layer}") if part == TEXT_ENCODER else (layer,)
        patterns = settings.get("alpha_pattern") or {}
        found = (a for p, a in patterns.items() for name in names if re.match(rf"(.*\.)?({p})$", name))
        alpha: float = next(found, settings.get("lora_alpha", rank))
        return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha

    return alpha_of


def _peft_settings(file: Path, metadata: dict[str, str], is_peft: bool) -> dict[str, dict[str, Any]]:
    """PEFT's settings of each part of the model. Raises `UserError` for settings that a plain LoRA does not have."""
    if is_peft:
        beside = file.with_name("adapter_config.json")
        if not beside.is_file():
            raise UserError(f"{beside} is missing, but PEFT's LoRA needs it for alpha; put it beside the LoRA file")
        of_part = dict.fromkeys((UNET, TEXT_ENCODER), read_json(beside))
    else:
        try:
            stated = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} has invalid JSON in lora_adapter_metadata ({error})") from error
        of_part = {
            p: {k.removeprefix(f"{p}."): v for k, v in stated.items() if k.startswith(f"{p}.")}
            for p in (UNET, TEXT_ENCODER)
        }
    for settings in of_part.values():
        start = str(settings.get("init_lora_weights", ""))
        if start.startswith(_CHANGES_BASE):
            raise UserError(
                f"{file} was initialised by {start}, which changes the base weights; convert it to a plain LoRA with "
                "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
            )
        _check_alphas(file, settings)
    return of_part


def _check_alphas(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises `UserError` if an alpha in PEFT's settings is no number, or a pattern no regular expression."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{file}: alpha_pattern is not an object of JSON; save the LoRA again")
    for name, alpha in {"lora_alpha": settings.get("lora_alpha", 1), **patterns}.items():
        if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST_ALPHA:
            raise UserError(f"{file}: the alpha of {name!r} is {str(alpha)[:40]!r}, not a number; save the LoRA again")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{file}: alpha_pattern {pattern!r} is not a regular expression ({error})") from error
