"""Converts PyTorch state dicts to Flax parameters and back. Our names are those of the checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Params

# The checkpoint calls each of these "weight".
_WEIGHT_LEAVES = ("kernel", "scale", "embedding")
# Names of the VAE's attention in older checkpoints.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# torch's MultiheadAttention joins its first projection's name to "weight" and "bias" by an underscore.
_UNDERSCORED = "in_proj"
# Buffers that some versions save. They hold nothing that is learned.
_BUFFERS = ("embeddings.position_ids",)
# transformers before version 5 puts the text encoder into one more module.
_OLD_PREFIX = "text_model."


def torch_name(path: Iterable[str]) -> str:
    """('down_blocks.0.resnets.0', 'conv1', 'kernel') → 'down_blocks.0.resnets.0.conv1.weight'."""
    *modules, leaf = path
    name = ".".join([*modules, "weight" if leaf in _WEIGHT_LEAVES else leaf])
    return name.replace(f".{_UNDERSCORED}.", f".{_UNDERSCORED}_")


def to_torch_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """Transposes a Flax array to PyTorch's axes: kernel (h, w, in, out) → (out, in, h, w), (in, out) → (out, in)."""
    if leaf != "kernel":
        return array
    return np.transpose(array, (3, 2, 0, 1) if array.ndim == 4 else (1, 0))


def from_torch_layout(leaf: str, array: np.ndarray, ndim: int) -> np.ndarray:
    """The inverse of `to_torch_layout`, for a kernel of `ndim` axes. A 1x1 convolution can become a linear layer.

    A kernel that is neither a linear layer's nor a convolution's is returned unchanged, so that its shape is reported.
    """
    if leaf != "kernel" or array.ndim not in (2, 4):
        return array
    if array.ndim == 4 and ndim == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    elif array.ndim == 2 and ndim == 4:
        array = array[:, :, None, None]
    return np.transpose(array, (2, 3, 1, 0) if array.ndim == 4 else (1, 0))


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """Flax parameters as a PyTorch state dict of contiguous NumPy arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [(tuple(str(k.key) for k in path), np.asarray(array)) for path, array in leaves]
    return {torch_name(path): np.ascontiguousarray(to_torch_layout(path[-1], array)) for path, array in paths}


def from_state_dict(
    state: Mapping[str, np.ndarray],
    expected: Params,
    source: str,
    config: str = "its config.json",
    *,
    place: Callable[[np.ndarray], Any] = np.asarray,
    ignore: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Converts a state dict to Flax parameters, one tensor at a time.

    Args:
        state: tensors by PyTorch's names.
        expected: parameters, or their shapes, that the result must match.
        source: name of the file, for errors.
        config: name of what determines `expected`, for errors.
        place: converts each array, which has Flax's axes and its stored type, for example to an array on a device.
        ignore: says which tensors are not read, by name.

    Raises:
        UserError: tensors are missing, unexpected or have wrong shapes; the error lists all of them.
    """
    renamed = {_current_name(name): name for name in state if not ignore(name)}
    for name in _BUFFERS:
        renamed.pop(name, None)
    problems: list[str] = []

    def take(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        names = tuple(str(k.key) for k in path)
        wanted = torch_name(names)
        if wanted not in renamed:
            problems.append(f"{wanted} is missing")
            return None
        array = from_torch_layout(names[-1], state[renamed.pop(wanted)], len(leaf.shape))
        if array.shape != leaf.shape:
            problems.append(f"{wanted} has shape {array.shape}, {config} implies {leaf.shape}")
        return None if problems else place(array)

    params = jax.tree_util.tree_map_with_path(take, expected)
    problems += [f"{name} is not part of the model" for name in renamed.values()]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{source} does not match {config}: {shown}")
    return params


def _current_name(name: str) -> str:
    parts = name.removeprefix(_OLD_PREFIX).split(".")
    if "attentions" in parts and len(parts) >= 2 and parts[-2] in _OLD_NAMES:
        parts[-2] = _OLD_NAMES[parts[-2]]
    return ".".join(parts)
