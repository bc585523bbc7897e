"""A reward from a user's Python file, `FILE.py:FUNCTION`.

The function has one of three forms:

    def bright(images): ...             in JAX, differentiable: images in [0, 1] (B, height, width, 3) to log R (B,)
    def judged(images, prompts): ...    on NumPy images and a list of texts, for algorithms that need no gradient
    def full() -> Reward: ...           a complete `Reward`: parameters, features of prompts, a score
"""

import hashlib
import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards.host import host_reward
from nabla_gfn_jax.rewards.reward import Reward

_TRIED = (2, 64, 64, 3)  # shape of the images with which a function is traced


def split(name: str) -> tuple[Path, str] | None:
    """Splits `FILE.py:FUNCTION` into file and function; None for other texts."""
    file, _, function = name.rpartition(":")
    return (Path(file).expanduser(), function) if file.endswith(".py") and function else None


def own(file: Path, name: str) -> Reward:
    """The reward in `name` of `file`. Raises `UserError` if the file fails or the function has no known form."""
    function, called = _function(file, name), f"{file}:{name}"
    try:
        count = len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise UserError(f"{called} is not a function; a reward is one of (images), (images, prompts) or ()") from None
    if count == 0:
        found = function()
        if not isinstance(found, Reward):
            raise UserError(f"{called} returns {type(found).__name__}; a function without arguments returns a Reward")
        return replace(found, files=(*found.files, file))
    if count == 2:
        return host_reward(function, called, (file,))
    if count != 1:
        raise UserError(f"{called} takes {count} arguments; a reward is one of (images), (images, prompts) or ()")
    try:
        shape = jax.eval_shape(function, jax.ShapeDtypeStruct(_TRIED, jnp.float32)).shape
    except Exception as error:  # whatever the function raises
        why = " ".join(str(error).split())[:150]
        raise UserError(
            f"{called} cannot be compiled ({type(error).__name__}: {why}); write it with jax.numpy, or take "
            "(images, prompts) to compute on NumPy arrays"
        ) from error
    if shape != _TRIED[:1]:
        raise UserError(f"{called} gives {shape} for images of shape {_TRIED}; it must give {_TRIED[:1]}")
    return Reward({}, lambda prompts: {}, lambda params, images, features: function(images).astype("float32"), (file,))


def _function(file: Path, name: str) -> Any:
    module_name = f"reward_{hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:16]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise UserError(f"reward {file}:{name}: there is no file {file}")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file raises
            why = " ".join(str(error).split())[:150]
            raise UserError(f"reward {file}:{name}: the file cannot be run ({type(error).__name__}: {why})") from error
        sys.modules[module_name] = module
    found = getattr(sys.modules[module_name], name, None)
    if found is None:
        raise UserError(f"reward {file}:{name}: {file} has nothing called {name}")
    return found
