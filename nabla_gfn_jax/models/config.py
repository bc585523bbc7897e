"""Converts a `config.json` to a frozen dataclass and refuses values that the model does not implement."""

from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from nabla_gfn_jax.errors import UserError

T = TypeVar("T")


def read_fields(cls: type[T], values: dict[str, Any], *, only: dict[str, tuple], source: str) -> T:
    """Fills the dataclass `cls` from `values`. Fields that it does not have are ignored, except those in `only`.

    Args:
        cls: the dataclass.
        values: the contents of the file.
        only: the implemented values of fields of the file, the default first. A list in the file, with one value per
            level, may mix them.
        source: name of the file, for errors.

    Raises:
        UserError: a field has a value that is not implemented.
    """
    for name, allowed in only.items():
        value = values.get(name, allowed[0])
        if not all(v in allowed for v in (value if isinstance(value, list | tuple) else [value])):
            raise UserError(f"{source}: {name} = {value!r} is not supported; use a model with one of {allowed}")
    names = {f.name for f in dataclass_fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: _frozen(value) for name, value in values.items() if name in names})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
