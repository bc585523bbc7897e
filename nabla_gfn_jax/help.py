"""Prints the text of `--help`."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from nabla_gfn_jax.config_files import shipped_configs
from nabla_gfn_jax.options import Leaf

_NAMES = 26  # columns


def print_help(
    about: str,
    command: str,
    options: Mapping[str, Leaf],
    fields: Mapping[str, Leaf] | None = None,
    tree: Mapping[str, Any] | None = None,
    config: str = "",
) -> NoReturn:
    """Prints the command's description, its options, and the fields of a config with their values. Exits with code 0.

    Args:
        about: description, paragraphs separated by empty lines.
        command: argv[0].
        options: the command's options by flag, such as "--num".
        fields: the config's fields by full name; None for a command without a config.
        tree: the config's values as nested dicts.
        config: name of the config.
    """
    width = max(80, min(shutil.get_terminal_size().columns, 100))
    usage = [f"usage: {_program(command)}", *(f"[{_flag(n, o)}]" for n, o in options.items() if o.option.positional)]
    usage += ["[--OPTION=VALUE ...]", *["[--config.FIELD=VALUE ...]"] * (fields is not None)]
    lines = [" ".join(usage), "", *_paragraphs(about, width), "options:"]
    for name, leaf in options.items():
        lines += _entry(_flag(name, leaf), leaf, leaf.default, width)
    lines += _entry("--help", None, None, width, "print this and exit")
    if fields is not None:
        lines += ["", *textwrap.wrap(f"shipped configs: {', '.join(shipped_configs())}", width, subsequent_indent="  ")]
        lines += ["", f"fields of a config, set by --config.FIELD=VALUE; in [] the value in {config}:"]
        for name, leaf in fields.items():
            lines += _entry(name, leaf, _value(tree or {}, name, leaf.default), width)
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _program(command: str) -> str:
    """The command as the user types it. argv[0] is a module's file under `python -m`, otherwise the command's name."""
    file = Path(command)
    if file.suffix != ".py":
        return command
    package = [p.name for p in file.parents if (p / "__init__.py").is_file()]
    return f"python -m {'.'.join([*reversed(package), file.stem]).removesuffix('.__main__')}"


def _paragraphs(text: str, width: int) -> list[str]:
    """The lines of the text with each paragraph wrapped to the width; indented paragraphs are kept as they are."""
    lines: list[str] = []
    for paragraph in textwrap.dedent(text).strip().split("\n\n"):
        lines += paragraph.splitlines() if paragraph.startswith(" ") else textwrap.wrap(paragraph, width)
        lines.append("")
    return lines


def _flag(name: str, leaf: Leaf) -> str:
    if leaf.option.positional:
        return name.removeprefix("--").upper() + " ..."
    kind = {int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(leaf.kind)
    return f"{name}={kind}" if kind else name


def _entry(name: str, leaf: Leaf | None, value: Any, width: int, meaning: str = "") -> list[str]:
    if leaf is not None:
        meaning = leaf.option.meaning + (f" ({leaf.option.unit})" if leaf.option.unit else "")
        meaning += "; can be repeated" * leaf.option.repeated
        if leaf.choices or leaf.kind in (int, float):
            meaning += f"; {leaf.allowed}"
        if value not in (MISSING, None, "", ()) and not (value is False and name.startswith("--")):
            meaning += f" [{_shown(value)}]"
    indent = " " * (_NAMES + 4)
    body = textwrap.wrap(meaning, width, initial_indent=indent, subsequent_indent=indent)
    head = f"  {name}"
    if len(head) < len(indent) - 1:
        return [head + body[0][len(head) :], *body[1:]]
    return [head, *body]


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(tree: Mapping[str, Any], name: str, default: Any) -> Any:
    value: Any = tree
    for part in name.split("."):
        value = value.get(part, default) if isinstance(value, Mapping) else default
    return value
