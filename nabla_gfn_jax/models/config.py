"""From a `config.json` beside the weights to a frozen dataclass, refusing what the model does not implement."""

from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from nabla_gfn_jax.errors import UserError

T = TypeVar("T")


def read_fields(cls: type[T], values: dict[str, Any], *, only: dict[str, tuple], source: str) -> T:
    """Fills the dataclass `cls` from `values`; fields it does not have are ignored unless `only` limits them.

    `only` names fields of the file whose every value but the listed ones would need code that is not here;
    an absent field has its default, which is always listed. A list, one value for each level, may mix listed ones.
    Raises `UserError` naming `source` and the field.
    """
    for name, allowed in only.items():
        value = values.get(name, allowed[0])
        if not all(v in allowed for v in (value if isinstance(value, list | tuple) else [value])):
            raise UserError(f"{source}: {name} = {value!r} is not supported; use a model with one of {allowed}")
    names = {f.name for f in dataclass_fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: _frozen(value) for name, value in values.items() if name in names})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
