"""LoRA files in diffusers', PEFT's and kohya's safetensors layouts, to and from the UNet's `lora` collection.

All hold, for each adapted layer, A or "down" (rank, in) and B or "up" (out, rank); the layer adds
alpha / rank · B A x. Our own scale is 1, so alpha equals the rank in what we write (kohya's layout states it,
diffusers' takes it for granted, PEFT's has it in a file beside), and alpha / rank is folded into "up" in what we read.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nabla_gfn_jax.checkpoints.files import plain, read_json, read_metadata, read_safetensors, write_safetensors
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Params

_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_ABOUT = "nabla_gfn_jax"  # the entry of the header that says what a file of ours is
_PEFT = "base_model.model."
_SHOWN = 20  # problems in one message


def save_lora(file: Path, lora: Params, about: Mapping[str, Any] | None = None) -> None:
    """Writes the UNet's `lora` collection as diffusers does; `pipe.load_lora_weights(file)` reads it.

    `about`: what it is, for the file's header, whence `read_about` has it.
    """
    state = {}
    for name, down, up in _pairs(lora):
        state[f"unet.{name}.lora_A.weight"] = down.T
        state[f"unet.{name}.lora_B.weight"] = up.T
    write_safetensors(file, state, _header(about))


def save_kohya(file: Path, lora: Params, about: Mapping[str, Any] | None = None) -> None:
    """Writes the UNet's `lora` collection in the layout of kohya's scripts, which ComfyUI and others read."""
    state = {}
    for name, down, up in _pairs(lora):
        layer = _kohya_name(name)
        state[f"{layer}.lora_down.weight"] = down.T
        state[f"{layer}.lora_up.weight"] = up.T
        state[f"{layer}.alpha"] = np.asarray(down.shape[1], np.float32)
    write_safetensors(file, state, _header(about))


def read_about(file: Path) -> dict[str, Any]:
    """What `save_lora` or `save_kohya` was told of the LoRA in `file`; empty if another program wrote it.

    Raises `UserError` naming a file that is missing or truncated.
    """
    try:
        about = json.loads(read_metadata(file).get(_ABOUT, "{}"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _header(about: Mapping[str, Any] | None) -> dict[str, str] | None:
    return None if about is None else {_ABOUT: json.dumps(plain(about), sort_keys=True)}


def load_lora(file: Path, unet: Params) -> Params:
    """The `lora` collection in `file`, in any of the three layouts, float32: down (in, rank), up (rank, out), scale 1.

    `unet` holds the UNet's parameters (or their shapes); any of its linear layers may be adapted. Raises
    `UserError` naming a file that is missing or truncated, and all its tensors that do not fit, together.
    """
    state, metadata = read_safetensors(file)
    layers = {
        ".".join(path[:-1]): leaf.shape
        for path, leaf in flatten_dict(unet).items()
        if path[-1] == "kernel" and len(leaf.shape) == 2
    }
    names = {write(name): name for name in layers for write in ("unet.{}".format, f"{_PEFT}{{}}".format, _kohya_name)}
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    problems: list[str] = []
    for key, tensor in state.items():
        suffix = next((s for s in _PARTS if key.endswith(s)), None)
        if suffix is None or key.removesuffix(suffix) not in names:
            problems.append(f"{key} belongs to no linear layer of the UNet")
        else:
            found[names[key.removesuffix(suffix)]][_PARTS[suffix]] = np.asarray(tensor, np.float32)
    for name, parts in found.items():
        problems += _misfits(name, parts, layers[name])
    if problems or not found:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        reason = "; ".join([*problems[:_SHOWN], *more]) or "it has no tensors"
        raise UserError(f"{file} is no LoRA for this UNet: {reason}")
    alpha_of = _alphas(file, metadata, is_peft=any(key.startswith(_PEFT) for key in state))
    paths = {".".join(path[:-1]): path[:-1] for path in flatten_dict(unet)}
    lora = {}
    for name, parts in found.items():
        rank = len(parts["down"])
        alpha = parts["alpha"].item() if "alpha" in parts else alpha_of(name, rank)
        lora[(*paths[name], "down")] = jnp.asarray(parts["down"].T)
        lora[(*paths[name], "up")] = jnp.asarray(parts["up"].T * (alpha / rank))
    return unflatten_dict(lora)


def _pairs(lora: Params) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """For each adapted layer its dotted name, down (in, rank) and up (rank, out), float32."""
    leaves = {name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(lora, sep=".").items()}
    names = [name.removesuffix(".down") for name in leaves if name.endswith(".down")]
    return [(name, leaves[f"{name}.down"], leaves[f"{name}.up"]) for name in names]


def _kohya_name(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def _misfits(name: str, parts: dict[str, np.ndarray], kernel: tuple[int, int]) -> list[str]:
    missing = [f"{name} has no {part} matrix" for part in ("down", "up") if part not in parts]
    if missing:
        return missing
    down, up = parts["down"].shape, parts["up"].shape
    rank = max(down[0], 1) if down else 1
    if down != (rank, kernel[0]) or up != (kernel[1], rank):
        return [f"{name} has down {down} and up {up} for a layer from {kernel[0]} to {kernel[1]} features"]
    if "alpha" in parts and parts["alpha"].size != 1:
        return [f"{name} has alpha of shape {parts['alpha'].shape}; it is one number"]
    return []


def _alphas(file: Path, metadata: dict[str, str], *, is_peft: bool) -> Any:
    """(layer, rank) → alpha, from the settings in PEFT's own file or, as newer diffusers has it, in the header."""
    if is_peft:
        settings = {f"unet.{name}": value for name, value in read_json(file.with_name("adapter_config.json")).items()}
    else:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if settings.get("unet.use_rslora"):
        raise UserError(f"{file} uses rank-stabilised scaling, which is not supported; train or export it without")

    def alpha_of(name: str, rank: int) -> float:
        for pattern, alpha in (settings.get("unet.alpha_pattern") or {}).items():
            if f".{name}".endswith(f".{pattern}"):
                return alpha
        return settings.get("unet.lora_alpha", rank)

    return alpha_of
