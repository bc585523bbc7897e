"""Declares the parameters of a layer where they are used."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.errors import ScopeParamShapeError
from jaxtyping import Array


def parameter(layer: nn.Module, name: str, initializer: Callable[..., Array], shape: tuple[int, ...]) -> Array:
    """The parameter `name` of the layer, with this shape. `initializer` creates it when the model is initialised.

    It works as `layer.param`, which however traces the initializer at each use to compare the shapes; that takes a
    third of the time to trace a UNet. Raises `ScopeParamShapeError` if the parameter has another shape.
    """
    if not layer.has_variable("params", name):
        made: Array = layer.param(name, initializer, shape)
        return made
    value: Any = layer.get_variable("params", name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, "/".join(layer.path), value.shape, shape)
    return value
