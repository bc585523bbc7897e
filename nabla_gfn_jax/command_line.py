"""The command line of a run: `--config=FILE[:VARIANT] --config.FIELD=VALUE --OPTION=VALUE`, and the workdir's claim."""

import ast
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.errors import UserError

# What may change between two runs on one workdir: it alters no number of the run.
_FREE = ("logging", "training.num_epochs")


def parse_flags(argv: Sequence[str], config: str, options: dict[str, str | bool]) -> tuple[ConfigDict, Any]:
    """The configuration that `argv[1:]` asks for, and its options as attributes.

    `config` is the file when none is named, `options` what else the command takes, with their defaults; one whose
    default is False is a switch. Raises `UserError` for a flag, file or field that does not exist or a value of
    another type than the field's.
    """
    named = dict(options)
    overrides: list[tuple[str, str]] = []
    for argument in argv[1:]:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--")
        if not equals and named.get(name) is False and flag != name:
            named[name] = True
        elif not equals or flag == name:
            raise UserError(f"{argument!r} is not understood; options look like --config.training.num_epochs=10")
        elif name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        elif name == "config":
            config = value
        elif isinstance(options.get(name), str):
            named[name] = value
        else:
            known = ", ".join(f"--{option}" for option in ("config", *options))
            raise UserError(f"{argument} is unknown; use {known} or --config.FIELD")
    file, _, variant = config.partition(":")
    fields = load_config(Path(file), variant)
    for name, text in overrides:
        override(fields, name, text)
    return fields, SimpleNamespace(config=config, **named)


def workdir_of(options: Any) -> Path:
    """The workdir that the options name, or one named as the config."""
    return Path(options.workdir or f"runs/{Path(options.config.partition(':')[0]).stem}")


def read_flags(values: flags.FlagValues, argv: Sequence[str]) -> Any:
    """The values that `argv` gives the flags. Raises `UserError` for whatever is none of them."""
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; see --help") from error
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; see --help")
    return values


def load_config(file: Path, variant: str = "") -> ConfigDict:
    """What `get_config()` of a Python file returns, or `get_config(variant)`."""
    if not file.is_file():
        raise UserError(f"config {file} does not exist; configs/ holds those that come with the project")
    spec = importlib.util.spec_from_file_location("config_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(variant) if variant else module.get_config()
    except TypeError as error:
        raise UserError(f"config {file} has no variant {variant!r} ({error})") from error


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets the field `name` ("training.num_epochs") to what `text` says, if it exists and the type is the field's."""
    *groups, field = name.split(".")
    group = config
    for part in groups:
        group = group.get(part) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or field not in group or isinstance(group[field], ConfigDict):
        known = ", ".join(sorted(_flat(config.to_dict())))
        raise UserError(f"--config.{name} is unknown; the fields are {known}")
    kind = type(group[field])
    try:
        value = text if kind is str else ast.literal_eval(text.capitalize() if kind is bool else text)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError
        group[field] = value
    except (ValueError, SyntaxError, TypeError):
        example = group[field]
        raise UserError(f"--config.{name}={text} is not of type {kind.__name__}; write it like {example!r}") from None


def claim_workdir(workdir: Path, config: ConfigDict, *, write: bool = True) -> None:
    """Makes the folder and its config.json, or, unless `write`, only looks.

    Raises `UserError` if it is not writable or holds another run.
    """
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("no permission")
        if file.exists():
            _compare(json.loads(file.read_text()), json.loads(config.to_json()), workdir)
        if write:
            write_json(file, json.loads(config.to_json()))  # other processes may be reading the one before
    except (OSError, ValueError) as error:
        raise UserError(f"workdir {workdir} cannot be used ({error}); choose another --workdir") from error


def _compare(old: dict[str, Any], new: dict[str, Any], workdir: Path) -> None:
    before, now = _flat(old), _flat(new)
    changed = sorted(k for k in before | now if before.get(k) != now.get(k) and not k.startswith(_FREE))
    if changed:
        shown = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed[:5])
        raise UserError(f"workdir {workdir} holds a run of another config: {shown}; choose another --workdir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
