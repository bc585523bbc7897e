"""Converts a `config.json` to a frozen dataclass and refuses values that the model does not implement."""

import types
import typing
from collections.abc import Iterable
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from nabla_gfn_jax.errors import UserError

T = TypeVar("T")
_LARGEST, _DEEPEST, _LEVELS = 2**24, 256, 16  # a larger network would take up the memory before its weights are read
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SHOWN = 80  # characters of a value in an error


def read_fields(cls: type[T], values: dict[str, Any], *, only: dict[str, tuple], source: str) -> T:
    """Fills the dataclass `cls` from `values`. Fields that it does not have are ignored, except those in `only`.

    A whole number is at least 1, or 0 if its default is 0.

    Args:
        cls: the dataclass, whose fields are numbers, texts, truth values and tuples of them.
        values: the contents of the file.
        only: the implemented values of fields of the file, the default first. A list in the file, with one value per
            level, may mix them.
        source: name of the file, for errors.

    Raises:
        UserError: a field has a value that is not implemented, or of another type than the dataclass states.
    """
    for name, allowed in only.items():
        value = values.get(name, allowed[0])
        if not all(v in allowed for v in (value if isinstance(value, list | tuple) else [value])):
            raise UserError(f"{source}: {name} = {_short(value)} is not supported; use a model with one of {allowed}")
    hints, found = typing.get_type_hints(cls), {}
    for field in (f for f in dataclass_fields(cls) if f.name in values):  # type: ignore[arg-type]
        name, value = field.name, _frozen(values[field.name])
        numbers = range(int(field.default != 0), 1 + (_DEEPEST if "layers" in name else _LARGEST))
        if not _fits(value, hints[name], numbers):
            kind = f"{_described(hints[name])}, from {numbers[0]} to {numbers[-1]} if it is a number"
            raise UserError(
                f"{source}: {name} = {_short(values[name])} is not allowed; it must be {kind}; download the model again"
            )
        found[name] = value
    return cls(**found)


def check_levels(source: str, config: Any, *names: str) -> None:
    """Raises `UserError` unless the tuples of `config` with these names have one element for each level of the network.

    A field that is no tuple holds for all levels.
    """
    sizes = {name: len(getattr(config, name)) for name in names if isinstance(getattr(config, name), tuple)}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise UserError(f"{source}: the numbers of levels differ ({said}); download the model again")


def check_divides(source: str, divisor: str, by: int, widths: Iterable[int], of: str) -> None:
    """Raises `UserError` unless each of the `widths`, which the field `of` states, is a multiple of `by`."""
    wrong = next((width for width in widths if by == 0 or width % by), None)
    if wrong is not None:
        raise UserError(f"{source}: {divisor} = {by} does not divide {of} = {wrong}; download the model again")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any, numbers: range) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one, numbers) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple) or not 0 < len(value) <= _LEVELS:
            return False
        return (kinds[-1] is ... or len(value) == len(kinds)) and all(_fits(v, kinds[0], numbers) for v in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST
    return type(value) is hint and (hint is not int or value in numbers)


def _described(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return ", or ".join(map(_described, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list; each element is {_described(typing.get_args(hint)[0])}"
    return _KINDS[hint]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
