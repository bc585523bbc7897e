"""LoRA files: written in diffusers' and kohya's layouts, read in all that `lora_names` knows.

All hold, for each adapted layer, A or "down" (rank, in) and B or "up" (out, rank); the layer adds
alpha / rank · B A x. Of a convolution A has the kernel's height and width behind, B is 1x1. Our own scale is 1, so
alpha equals the rank in what we write (kohya's layout states it, diffusers' takes it for granted, PEFT's has it in a
file beside), and alpha / rank is folded into "up" in what we read.
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

_ABOUT = "nabla_gfn_jax"  # the entry of the header that says what a file of ours is
_IN_FOLDER = ("diffusers", "pytorch_lora_weights", "adapter_model")  # what a folder's LoRA may be called
_ENDINGS = (".safetensors", ".bin", ".pt")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's ways to start that change the model as well
_SHOWN = 20  # problems in one message

AlphaOf = Callable[[str, str, int], float]  # (part, layer, rank) → alpha where scale is alpha / rank
_Found = dict[tuple[str, str], dict[str, np.ndarray]]  # by part and layer, its matrices


def save_lora(file: Path, lora: Params, about: Mapping[str, Any] | None = None) -> None:
    """Writes the UNet's `lora` collection as diffusers does; `pipe.load_lora_weights(file)` reads it.

    `about`: what it is, for the file's header, whence `read_about` has it.
    """
    state = {}
    for name, down, up in _pairs(lora):
        state[f"unet.{name}.lora_A.weight"] = down
        state[f"unet.{name}.lora_B.weight"] = up
    write_safetensors(file, state, _header(about))


def save_kohya(file: Path, lora: Params, about: Mapping[str, Any] | None = None) -> None:
    """Writes the UNet's `lora` collection in the layout of kohya's scripts, which ComfyUI and others read."""
    state = {}
    for name, down, up in _pairs(lora):
        layer = kohya_name(name)
        state[f"{layer}.lora_down.weight"] = down
        state[f"{layer}.lora_up.weight"] = up
        state[f"{layer}.alpha"] = np.asarray(len(down), np.float32)
    write_safetensors(file, state, _header(about))


def read_about(path: Path) -> dict[str, Any]:
    """What `save_lora` or `save_kohya` was told of the LoRA in `path`; empty if another program wrote it.

    Raises `UserError` naming a file that is missing or truncated.
    """
    file = find_file(path)
    try:
        about = json.loads(_metadata(file).get(_ABOUT, "{}"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def load_lora(path: Path, unet: Params, text_encoder: Params | None = None) -> Params:
    """The LoRA in a file, or a folder as PEFT and diffusers write it: the `lora` collection, float32, at scale 1.

    It is the UNet's tree, and under "text_encoder" the text encoder's where the file adapts that too. A linear layer
    has down (in, rank) and up (rank, out), a convolution down (height, width, in, rank) and up (rank, out).

    Args:
        path: safetensors, or a pickle (`.bin`, `.pt`), of which only tensors are read and nothing is executed.
        unet: the UNet's parameters, or their shapes; any of its linear layers and convolutions may be adapted.
        text_encoder: the text encoder's; without them a file that adapts it is refused.

    Raises:
        UserError: names a file that is missing or truncated, what it is if it is no LoRA, a kind that is not read,
            or all its tensors that do not fit, together.
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
        raise UserError(f"{file} is no LoRA for this model: {reason}")
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
    """The LoRA file that a path is, or that is in the folder it is. Raises `UserError` for a folder without one."""
    if not path.is_dir():
        return path
    names = [stem + ending for stem in _IN_FOLDER for ending in _ENDINGS]
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} holds no LoRA file called {', '.join(names)}; name the file itself")
    return file


def _metadata(file: Path) -> dict[str, str]:
    return {} if file.suffix in PICKLED else read_metadata(file)


def _header(about: Mapping[str, Any] | None) -> dict[str, str] | None:
    return None if about is None else {_ABOUT: json.dumps(plain(about), sort_keys=True)}


def _pairs(lora: Params) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """For each adapted layer its dotted name, down (rank, in, …) and up (out, rank, …), float32, in torch's axes."""
    leaves = {name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(lora, sep=".").items()}
    found = []
    for name in (name.removesuffix(".down") for name in leaves if name.endswith(".down")):
        down, up = to_torch_layout("kernel", leaves[f"{name}.down"]), leaves[f"{name}.up"].T
        found.append((name, down, up if down.ndim == 2 else up[:, :, None, None]))
    return found


def _kernels(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels of all linear layers and convolutions, by the layer's name."""
    leaves = flatten_dict(params).items()
    return {".".join(path[:-1]): leaf.shape for path, leaf in leaves if path[-1] == "kernel"}


def _sort(state: Mapping[str, np.ndarray], names: LayerNames, whose: str) -> tuple[_Found, list[str]]:
    """The tensors by layer, float32, and what is wrong with the others."""
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
    """Brings down to (rank, in) or (rank, in, height, width) and up to (out, rank), in place; says what does not fit.

    A linear layer and a 1x1 convolution are one thing. Where a convolution has a third matrix, "mid", down is 1x1 and
    mid of the kernel's size (LyCORIS' Tucker form); the two are one convolution, which is down then.
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
    """alpha by the settings of PEFT, in its own file beside or, as newer diffusers has them, in the header.

    With rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732) the scale is alpha / √rank.
    """
    of_part = _peft_settings(file, metadata, is_peft)

    def alpha_of(part: str, layer: str, rank: int) -> float:
        settings = of_part[part]
        # As PEFT looks a layer up: the first pattern that is the end of its name, as a regular expression.
        names = (layer, f"text_model.{layer}") if part == TEXT_ENCODER else (layer,)
        patterns = settings.get("alpha_pattern") or {}
        found = (a for p, a in patterns.items() for name in names if re.match(rf"(.*\.)?({p})$", name))
        alpha: float = next(found, settings.get("lora_alpha", rank))
        return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha

    return alpha_of


def _peft_settings(file: Path, metadata: dict[str, str], is_peft: bool) -> dict[str, dict[str, Any]]:
    """The settings of each part of the model. Raises `UserError` for those that a plain LoRA does not have."""
    if is_peft:
        beside = file.with_name("adapter_config.json")
        if not beside.is_file():
            raise UserError(f"{beside} is missing, which says alpha, and PEFT's LoRA is nothing without; put it there")
        of_part = dict.fromkeys((UNET, TEXT_ENCODER), read_json(beside))
    else:
        try:
            stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except ValueError as error:
            raise UserError(f"{file} says in lora_adapter_metadata what is no JSON ({error})") from error
        of_part = {
            p: {k.removeprefix(f"{p}."): v for k, v in stated.items() if k.startswith(f"{p}.")}
            for p in (UNET, TEXT_ENCODER)
        }
    for settings in of_part.values():
        start = str(settings.get("init_lora_weights", ""))
        if start.startswith(_CHANGES_BASE):
            raise UserError(
                f"{file} was started by {start}, which changes the model itself; convert it to a plain LoRA with "
                "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
            )
        for pattern in settings.get("alpha_pattern") or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{file}: alpha_pattern {pattern!r} is no regular expression ({error})") from error
    return of_part
