"""Config files: Python files whose `get_config()` returns an `ml_collections.ConfigDict`, shipped ones by name."""

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
    """The configs of this package, by name: within it where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if (f / "emoji.py").is_file()), None)
    return {file.stem: file for file in sorted(folder.glob("[!_]*.py"))} if folder else {}


def split_variant(config: str) -> tuple[str, str]:
    """`NAME:VARIANT` or `NAME` as (name, variant), the variant "" where there is none."""
    name, _, variant = config.partition(":")
    return name, variant


def load_config(config: str | Path, variant: str = "") -> ConfigDict:
    """What `get_config()`, or `get_config(variant)`, of a shipped config or a Python file returns.

    Raises `UserError` if there is no such config or variant, or the file fails.
    """
    file = _find(str(config))
    get_config = _run(file).get("get_config")
    if not callable(get_config):
        raise UserError(f"config {file} has no function get_config(); it must return an ml_collections.ConfigDict")
    if variant and not inspect.signature(get_config).parameters:
        raise UserError(f"config {config} has no variants, so {variant!r} is none of them; leave out :{variant}")
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
        raise UserError(f"config {config} is no Python file; give a file.py, or one of {names}")
    return file


def _run(file: Path) -> dict[str, Any]:
    """The names that the file defines."""
    spec = importlib.util.spec_from_file_location("config_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _in_one_line(file):
        spec.loader.exec_module(module)
    return vars(module)


@contextmanager
def _in_one_line(file: Path) -> Iterator[None]:
    """Turns what a config file raises into a `UserError` that names the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config {file} fails{f' in line {line}' if line else ''}: {what}") from error
