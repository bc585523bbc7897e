"""Values that a user can set: each declares its type, range or choices, unit, meaning and default in one place.

The options of a command and each group of a run's settings are a frozen dataclass of such values:

    @dataclass(frozen=True, kw_only=True)
    class Sampling(Checked):
        num_steps: int = option(50, "sampling steps", minimum=1, maximum=1000)

The type of a field is bool, int, float, str, Path or Literal, optionally with None, or a tuple of one of these. A field
is never NaN, and infinite only if it declares `infinite`. A field may also be a dataclass of options, or, declared by
`one_of`, one of several such dataclasses.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from nabla_gfn_jax.errors import UserError

T = TypeVar("T")
LARGEST_SEED = 2**32 - 1  # a random key uses 32 bits of the seed
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """The declaration of a value beside its type and default. For a tuple, bounds and choices apply to each element.

    Attributes:
        meaning: a phrase for `--help`.
        unit: the unit of a number.
        choices: the allowed values if the type is not a Literal; read again at each check.
        above, minimum, maximum: bounds; `above` itself is not allowed.
        infinite: whether inf is allowed.
        empty: whether "" or an empty tuple is allowed.
        repeated: whether the flag is repeated for each element of a tuple; otherwise commas separate the elements.
        positional: whether the elements of a tuple are given without a flag.
        free: whether the value changes no number of a run, so that a resume may change it.
        file: for a path: "existing", "output" for a file to be written, or "folder" for a folder to write into.
        endings: the allowed endings of the name of a file to be written.
    """

    meaning: str
    unit: str = ""
    choices: Collection[str] = ()
    above: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    infinite: bool = False
    empty: bool = False
    repeated: bool = False
    positional: bool = False
    free: bool = False
    file: Literal["", "existing", "output", "folder"] = ""
    endings: tuple[str, ...] = ()


def option(default: Any = MISSING, meaning: str = "", **stated: Any) -> Any:
    """A dataclass field. `stated` are attributes of `Option`. A field without a default must be given."""
    return dataclasses.field(default=default, metadata={"option": Option(meaning=meaning, **stated)})


def one_of(registry: Mapping[str, type], meaning: str) -> Any:
    """A dataclass field that holds one of the registry's dataclasses, which the group's `name` selects."""
    return dataclasses.field(metadata={"registry": registry, "meaning": meaning})


class Leaf(NamedTuple):
    """A value with its full name, such as `training.clip` or `--num`."""

    name: str
    kind: type  # bool, int, float, str or Path
    many: bool  # whether it is a tuple of `kind`
    optional: bool  # whether None is allowed
    choices: Collection[Any]
    option: Option
    default: Any  # MISSING: the value must be given

    @property
    def allowed(self) -> str:
        """The allowed values as a phrase that continues "it must be"."""
        o, show = self.option, ("{:d}" if self.kind is int else "{:g}").format
        words = _WORDS[self.kind]
        if self.choices:
            words = f"one of {', '.join(map(str, self.choices))}{', or nothing' * o.empty}"
        elif self.kind is str and not o.empty:
            words = "text that is not empty"
        elif o.endings:
            words = f"a file name that ends in {' or '.join(o.endings)}"
        if o.minimum is not None and o.maximum is not None:
            words += f" from {show(o.minimum)} to {show(o.maximum)}"
        elif o.minimum is not None:
            words += f" of {show(o.minimum)} or more"
        elif o.above is not None:
            words += f" above {show(o.above)}"
        if o.maximum is not None and o.minimum is None:
            words += f"{' and' if o.above is not None else ''} up to {show(o.maximum)}"
        words += ", or inf" * o.infinite
        return f"{words}; several with commas between" if self.many and not (o.repeated or o.positional) else words

    def check(self, value: Any) -> Any:
        """The value in the field's type. Raises `UserError` that names the field, the value and the allowed values."""
        if self.optional and value in (None, ""):
            return None
        try:
            if not self.many:
                return self._element(value)
            if not isinstance(value, tuple | list) or not (value or self.option.empty):
                raise ValueError
            return tuple(map(self._element, value))
        except (ValueError, OverflowError):
            shown = repr(value) if isinstance(value, str) else value
            hint = did_you_mean(value, map(str, self.choices)) if isinstance(value, str) else ""
            raise UserError(f"{self.name} = {shown} is not allowed; it must be {self.allowed}{hint}") from None

    def allows(self, value: Any) -> bool:
        """Whether `check` accepts the value."""
        try:
            self.check(value)
        except UserError:
            return False
        return True

    def read(self, text: str) -> Any:
        """The value of the typed text, not yet checked. For a tuple with commas it is the whole list."""
        if self.many and not (self.option.repeated or self.option.positional):
            inner = text.strip().removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]")
            return [self._typed(part.strip()) for part in inner.split(",") if part.strip()]
        return self._typed(text)

    def _typed(self, text: str) -> Any:
        """A value of the field's kind. A text that is none is returned as it is, and `check` refuses it."""
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            return self.kind(text) if self.kind in (int, float) else text
        except (ValueError, KeyError):
            return text

    def _element(self, value: Any) -> Any:
        """The value in the field's kind. Raises `ValueError` if it is not allowed."""
        if self.kind is Path and isinstance(value, str | Path) and str(value):
            return Path(value).expanduser()
        if self.kind is float and (value in ("inf", "-inf") or type(value) is int):
            value = float(value)
        allowed = type(value) is self.kind
        if value == "":
            allowed = allowed and self.option.empty and not self.many
        elif self.choices:
            allowed = allowed and value in self.choices
        if not allowed or (isinstance(value, int | float) and not self._within_bounds(value)):
            raise ValueError
        return value

    def _within_bounds(self, value: float) -> bool:
        o = self.option
        if math.isnan(value) or value == -math.inf or (value == math.inf and not o.infinite):
            return False
        low = (o.minimum is None or value >= o.minimum) and (o.above is None or value > o.above)
        return low and (o.maximum is None or value <= o.maximum)


def leaves(cls: type, tree: Mapping[str, Any] | None = None, prefix: str = "") -> dict[str, Leaf]:
    """All values of a dataclass of options by full name. `tree` selects the dataclass of each `one_of` field.

    Raises `TypeError` for a field without `option` or with a type that is not supported.
    """
    found: dict[str, Leaf] = {}
    for field, hint in _fields(cls):
        name, inside = prefix + field.name, (tree or {}).get(field.name)
        inside = inside if isinstance(inside, Mapping) else {}
        if "registry" in field.metadata:
            chosen = _name_leaf(name, field)
            found[chosen.name] = chosen
            group = field.metadata["registry"].get(inside.get("name"))
            found |= leaves(group, inside, f"{name}.") if group else {}
        elif dataclasses.is_dataclass(hint):
            found |= leaves(typing.cast(type, hint), inside, f"{name}.")
        else:
            found[name] = _leaf(name, hint, field)
    return found


def build(cls: type[T], tree: Mapping[str, Any], prefix: str = "") -> T:
    """Builds the dataclass from the tree's values and, for the other fields, the defaults.

    Infinity may be written as "inf", because JSON has no infinity. Raises `UserError` for an unknown field, a missing
    field, or a value that is not allowed.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{prefix.rstrip('.')} = {tree!r} is not allowed; it must be a group of fields")
    names = [field.name for field, _ in _fields(cls)]
    for name in tree:
        if name not in names:
            raise UserError(f"{prefix}{name} is unknown{did_you_mean(f'{prefix}{name}', [prefix + n for n in names])}")
    values: dict[str, Any] = {}
    for field, hint in _fields(cls):
        name, inside = prefix + field.name, tree.get(field.name, MISSING)
        if "registry" in field.metadata:
            group = dict(inside) if isinstance(inside, Mapping) else {}
            chosen = _name_leaf(name, field).check(group.pop("name", None))
            values[field.name] = build(field.metadata["registry"][chosen], group, f"{name}.")
        elif dataclasses.is_dataclass(hint):
            values[field.name] = build(typing.cast(type, hint), {} if inside is MISSING else inside, f"{name}.")
        else:
            leaf = _leaf(name, hint, field)
            value = leaf.default if inside is MISSING else inside
            if value is MISSING:
                raise UserError(f"{name} is missing; it must be {leaf.allowed}")
            values[field.name] = leaf.check(value)
    return cls(**values)


class Checked:
    """Base class of the dataclasses of options. Every instance is validated when it is created."""

    def __post_init__(self) -> None:
        validate(self)


def validate(instance: Any, prefix: str = "") -> None:
    """Raises `UserError` if a value is not allowed."""
    for field, hint in _fields(type(instance)):
        if "registry" not in field.metadata and not dataclasses.is_dataclass(hint):
            _leaf(prefix + field.name, hint, field).check(getattr(instance, field.name))


def check_files(instance: Any, prefix: str = "") -> None:
    """Raises `UserError` if an input file does not exist or an output file cannot be written."""
    values = flatten(instance, prefix)
    for name, leaf in leaves(type(instance), _names(instance), prefix).items():
        files = values[name] if leaf.many else [values[name]]
        for file in files if leaf.kind is Path and leaf.option.file else ():
            if file is not None:
                _check_file(leaf, file)


def flatten(instance: Any, prefix: str = "") -> dict[str, Any]:
    """The values of all fields by full name."""
    found: dict[str, Any] = {}
    for field, hint in _fields(type(instance)):
        name, value = prefix + field.name, getattr(instance, field.name)
        if "registry" in field.metadata:
            found[f"{name}.name"] = _name_in(field, value)
        nested = "registry" in field.metadata or dataclasses.is_dataclass(hint)
        found |= flatten(value, f"{name}.") if nested else {name: value}
    return found


def free_names(instance: Any) -> frozenset[str]:
    """Full names of the fields that change no number of a run."""
    return frozenset(n for n, leaf in leaves(type(instance), _names(instance)).items() if leaf.option.free)


def plain(instance: Any) -> dict[str, Any]:
    """The values as nested dicts that JSON can hold: infinities and paths as text, tuples as lists.

    `build` reads it.
    """
    tree: dict[str, Any] = {}
    for name, value in flatten(instance).items():
        *groups, last = name.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = [_plain(v) for v in value] if isinstance(value, tuple) else _plain(value)
    return tree


def check_divisors(group: str, of: Any, widths: str, *divisors: str) -> None:
    """Raises `UserError` unless each field named in `divisors` divides the field `widths` or every element of it."""
    value = getattr(of, widths)
    for name in divisors:
        divisor = getattr(of, name)
        if any(width % divisor for width in (value if isinstance(value, tuple) else (value,))):
            both = f"{group}.{name} = {divisor} does not divide {group}.{widths} = {value}"
            raise UserError(f"{both}; change one of them")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The ending of an error: " (did you mean NEAREST?)", or "". A field with the same last part counts as nearest."""
    names = list(known)
    same_end = [n for n in names if n.rpartition(".")[2].lstrip("-") == name.rpartition(".")[2].lstrip("-")]
    near = same_end or difflib.get_close_matches(name, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return ((field, hints[field.name]) for field in dataclasses.fields(cls))


def _name_leaf(group: str, field: dataclasses.Field[Any]) -> Leaf:
    stated = Option(meaning=field.metadata["meaning"])
    return Leaf(f"{group}.name", str, False, False, field.metadata["registry"], stated, MISSING)


def _name_in(field: dataclasses.Field[Any], value: Any) -> str:
    return next(name for name, cls in field.metadata["registry"].items() if cls is type(value))


def _names(instance: Any) -> dict[str, Any]:
    """A tree with the group names only; it tells `leaves` which dataclasses the instance holds."""
    found: dict[str, Any] = {}
    for field, hint in _fields(type(instance)):
        value = getattr(instance, field.name)
        if "registry" in field.metadata:
            found[field.name] = {"name": _name_in(field, value)} | _names(value)
        elif dataclasses.is_dataclass(hint):
            found[field.name] = _names(value)
    return found


def _leaf(name: str, hint: Any, field: dataclasses.Field[Any]) -> Leaf:
    if "option" not in field.metadata:
        raise TypeError(f"{name} has no option()")
    stated: Option = field.metadata["option"]
    kind, optional = hint, False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
        optional = True
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    literal = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    kind = str if literal else kind
    if kind not in _WORDS:
        raise TypeError(f"{name} has the type {hint}, which options do not support")
    return Leaf(name, kind, many, optional, literal or stated.choices, stated, field.default)


def _check_file(leaf: Leaf, file: Path) -> None:
    if leaf.option.file == "existing":
        if not file.exists():
            raise UserError(f"{leaf.name} = {file} does not exist")
        return
    if leaf.option.endings and file.suffix not in leaf.option.endings:
        raise UserError(f"{leaf.name} = {file} is not allowed; it must be {leaf.allowed}")
    into_folder = leaf.option.file == "folder"
    places = [file.absolute(), *file.absolute().parents] if into_folder else file.absolute().parents
    folder = next(p for p in places if p.exists())
    if (file.is_dir() and not into_folder) or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{leaf.name} = {file} cannot be written; name a file in a folder that can be")
