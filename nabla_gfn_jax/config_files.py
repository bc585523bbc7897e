"""Config files: Python files whose `get_config()` returns an `ml_collections.ConfigDict`. Shipped ones have names."""

import importlib.util
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import did_you_mean


def shipped_configs() -> dict[str, Path]:
    """The config files of this package by name. They are in the package if it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if (f / "emoji.py").is_file()), None)
    return {file.stem: file for file in sorted(folder.glob("[!_]*.py"))} if folder else {}


def split_variant(config: str) -> tuple[str, str]:
    """Splits `NAME:VARIANT` or `NAME` into (name, variant); without a variant, it is ""."""
    name, _, variant = config.partition(":")
    return name, variant


def load_config(config: str | Path, variant: str = "") -> ConfigDict:
    """The result of `get_config()` or `get_config(variant)` of a shipped config or a Python file.

    Raises `UserError` if there is no such config or variant, or if the file raises an exception.
    """
    file = _find(str(config))
    get_config = _run(file).get("get_config")
    if not callable(get_config):
        raise UserError(f"config {file} has no function get_config(); it must return an ml_collections.ConfigDict")
    if variant and not inspect.signature(get_config).parameters:
        raise UserError(f"config {config} has no variants; leave out :{variant}")
    with _in_one_line(file):
        found = get_config(variant) if variant else get_config()
    if not isinstance(found, ConfigDict):
        raise UserError(f"get_config() of {file} returns {type(found).__name__}; make it an ml_collections.ConfigDict")
    return found


def _find(config: str) -> Path:
    shipped = shipped_configs()
    if config in shipped:
        return shipped[config]
    file = Path(config).expanduser()
    names = ", ".join(shipped)
    if not file.is_file():
        raise UserError(
            f"config {config} does not exist{did_you_mean(file.stem, shipped)}; give a file, or one of {names}"
        )
    if file.suffix != ".py":
        raise UserError(f"config {config} is not a Python file; give a file.py, or one of {names}")
    return file


def _run(file: Path) -> dict[str, Any]:
    """Runs the file and returns the names that it defines."""
    spec = importlib.util.spec_from_file_location("config_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _in_one_line(file):
        spec.loader.exec_module(module)
    return vars(module)


@contextmanager
def _in_one_line(file: Path) -> Iterator[None]:
    """Turns an exception of a config file into a `UserError` that names the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config {file} fails{f' in line {line}' if line else ''}: {what}") from error
