"""A grid of runs: methods × seeds × base configs, described by a TOML file (docs/reproduce.md).

    [bases.face]                  # what is asked for: reward, prompts and β
    config = "emoji"

    [methods.ddpo]                # how it is trained
    config = "ddpo:emoji"
    rates = [3e-4, 1e-4, 1e-3]

A grid is data alone, so that reading the file of a stranger runs no code of it. (A config that it names is Python.)
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.options import LARGEST_SEED, Checked, build, did_you_mean, flatten, option
from nabla_gfn_jax.runs import manifest
from nabla_gfn_jax.settings import Settings

BETA = "algorithm.beta"
_OF_BASE = ("model", "reward", "prompts")  # fields that a method takes from the base config
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # a folder's name on every system
Fields = dict[str, Any]  # values of a config by full name


@dataclass(frozen=True, kw_only=True)
class Evaluation(Checked):
    """How every saved LoRA is measured."""

    num: int = option(128, "images of each held-out prompt", minimum=2)
    base_num: int = option(0, "images of the base model for each prompt, if more than num", minimum=0)
    metrics: tuple[str, ...] = option((), "more metrics, as in evaluate --metrics", choices=METRICS, empty=True)


@dataclass(frozen=True, kw_only=True)
class Tuning(Checked):
    """How a method's learning rate is chosen among its `rates`, for each base config, with the first seed."""

    figure: str = option("gap", "the column of the results that decides, for the LoRA with the most updates")
    best: Literal["lowest", "highest"] = option("lowest", "which value of it is best")


@dataclass(frozen=True, kw_only=True)
class Shared(Checked):
    """The parts of a grid that are neither bases nor methods."""

    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the runs", minimum=0, maximum=LARGEST_SEED)
    updates: int = option(meaning="updates of each run", minimum=1)
    evaluation: Evaluation
    tuning: Tuning


@dataclass(frozen=True, kw_only=True)
class Base(Checked):
    """What the runs are asked for: the model, reward, prompts and β of a config."""

    config: str = option(meaning="name of a shipped config, or a Python file; append :VARIANT to choose a variant")
    label: str = option("", "its name in figures [the name in the file]", empty=True)


@dataclass(frozen=True, kw_only=True)
class Method(Checked):
    """How the runs are trained."""

    config: str = option("", "a config; nothing: the base config itself", empty=True)
    variant: str = option("", "without config: the variant of the base config", empty=True)
    label: str = option("", "its name in figures [the name in the file]", empty=True)
    rates: tuple[float, ...] = option((), "learning rates to choose from [the config's own]", above=0, empty=True)
    updates: int | None = option(None, "updates of its runs [those of the grid]", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config and self.variant:
            raise UserError(f"variant = {self.variant!r} is of the base config; write config = {self.config!r}:VARIANT")


@dataclass(frozen=True)
class Grid:
    """A grid as its file describes it. `fields` are values of the configs: of all runs, of a base, of a method."""

    name: str
    contents: dict[str, Any]  # of the file
    shared: Shared
    bases: dict[str, Base]
    methods: dict[str, Method]
    fields: Fields
    base_fields: dict[str, Fields]
    method_fields: dict[str, Fields]

    def config(self, base: str, method: str) -> str:
        """The config with which a run of the method begins, as `--config` names it."""
        chosen = self.methods[method]
        variant = f":{chosen.variant}" if chosen.variant else ""
        return chosen.config or self.bases[base].config + variant

    @cached_property
    def whole(self) -> dict[tuple[str, str], Settings]:
        """The settings of each base and method, with the seed 0 and the method's first learning rate."""
        found = {}
        for base in self.bases:
            asked = self._of_base(base)
            for method in self.methods:
                try:
                    found[base, method] = self._settings(base, method, asked)
                except UserError as error:
                    raise UserError(f"methods.{method} with bases.{base}: {error}") from error
        return found

    @cached_property
    def betas(self) -> dict[str, float | None]:
        """β of the target P_base · R^β by which all methods of a base are measured, by base."""
        found: dict[str, float | None] = {}
        for base, fields in self.base_fields.items():
            given = {name: value for name, value in fields.items() if name in (BETA, "algorithm.name")}
            algorithm = load_settings(Settings, self.bases[base].config, given).algorithm
            found[base] = getattr(algorithm, "beta", None)
        return found

    def settings(self, base: str, method: str, rate: float, seed: int) -> Settings:
        """The settings of a run."""
        found = self.whole[base, method]
        return replace(found, seed=seed, training=replace(found.training, learning_rate=rate))

    def rates(self, base: str, method: str) -> tuple[float, ...]:
        """The learning rates of a method; the first is that of its first run."""
        return self.methods[method].rates or (self.whole[base, method].training.learning_rate,)

    def _settings(self, base: str, method: str, asked: Fields) -> Settings:
        """The settings of the method's config, with what the base asks for, then the fields of grid, base and method.

        A field of the group `algorithm` that comes from the grid or the base, and that the method's algorithm does not
        have, is left out.
        """
        chosen, config, own = self.methods[method], self.config(base, method), self.method_fields[method]
        given = {name: value for name, value in own.items() if name == "algorithm.name"}
        known = flatten(load_settings(Settings, config, given))
        shared = (asked if chosen.config else {}) | self.fields | self.base_fields[base]
        common = {n: v for n, v in shared.items() if n in known or not n.startswith("algorithm.")}
        rate = {"training.learning_rate": chosen.rates[0]} if chosen.rates else {}
        found = load_settings(Settings, config, common | own | rate | {"seed": 0})
        updates, each = chosen.updates or self.shared.updates, found.training.updates_per_epoch
        if updates % each:
            raise UserError(
                f"training.updates_per_epoch = {each} does not divide updates = {updates}; change one of both"
            )
        return replace(found, training=replace(found.training, num_epochs=updates // each))

    def _of_base(self, base: str) -> Fields:
        asked = flatten(load_settings(Settings, self.bases[base].config))
        return {name: asked[name] for name in (*_OF_BASE, BETA) if name in asked}


def shipped_grids() -> dict[str, Path]:
    """The grid files of this package by name. They are in the package if it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "grids", package.parent / "grids") if (f / "emoji.toml").is_file()), None)
    return {file.stem: file for file in sorted(folder.glob("*.toml"))} if folder else {}


def read(grid: str) -> Grid:
    """The grid of a shipped name or a TOML file.

    Raises `UserError`, which names the file, if there is no such grid, or a run of it is not possible.
    """
    shipped = shipped_grids()
    file = shipped.get(grid, Path(grid).expanduser())
    if not file.is_file():
        near = did_you_mean(file.stem, shipped)
        raise UserError(f"grid {grid} does not exist{near}; give a TOML file, or one of {', '.join(shipped)}")
    try:
        contents = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"grid {file} is no TOML file ({error}); docs/reproduce.md describes it") from error
    try:
        found = of_contents(file.stem, contents)
        found.whole, found.betas  # noqa: B018  computed here, so that a mistake is told before any run
    except UserError as error:
        raise UserError(f"grid {file}: {error}") from error
    return found


def of_contents(name: str, contents: Mapping[str, Any]) -> Grid:
    """The grid with the contents of a file."""
    rest = {key: value for key, value in contents.items() if key not in ("bases", "methods", "fields")}
    bases, base_fields = _named(contents, "bases", Base)
    methods, method_fields = _named(contents, "methods", Method)
    return Grid(
        name=name,
        contents=dict(contents),
        shared=build(Shared, rest),
        bases=bases,
        methods=methods,
        fields=_fields(contents, ""),
        base_fields=base_fields,
        method_fields=method_fields,
    )


def _named(contents: Mapping[str, Any], group: str, kind: type[Any]) -> tuple[dict[str, Any], dict[str, Fields]]:
    """The instances of `kind` in a group of the file by name, and the fields that each gives."""
    tree = contents.get(group)
    if not isinstance(tree, Mapping) or not tree:
        raise UserError(f"there are no {group}; add at least one, as [{group}.NAME]")
    for name in tree:
        if not _NAME.fullmatch(name):
            raise UserError(f"{group}.{name} is not allowed; a name has letters, digits, - and _ only")
        if not isinstance(tree[name], Mapping):
            raise UserError(f"{group}.{name} = {tree[name]!r} is not allowed; it must be a group, as [{group}.{name}]")
    own = {name: {key: v for key, v in one.items() if key != "fields"} for name, one in tree.items()}
    instances = {name: build(kind, one, f"{group}.{name}.") for name, one in own.items()}
    return instances, {name: _fields(one, f"{group}.{name}.") for name, one in tree.items()}


def _fields(tree: Mapping[str, Any], prefix: str) -> Fields:
    given = tree.get("fields", {})
    if not isinstance(given, Mapping):
        raise UserError(f"{prefix}fields = {given!r} is not allowed; it must be a group of fields of a config")
    return manifest.flatten(given)
