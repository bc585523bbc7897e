"""The description of a run in its workdir's `manifest.json`: config, inputs, versions and devices."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from nabla_gfn_jax.checkpoints import hashes
from nabla_gfn_jax.checkpoints.files import plain, reason_of, write_json
from nabla_gfn_jax.checkpoints.hub import revision_of
from nabla_gfn_jax.errors import UserError

NAME = "manifest.json"
_PACKAGES = ("nabla_gfn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_SHOWN = 5  # the most changes that one message lists

Input = Path | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A run. The fields from `model` to `lora_until_step` repeat the parts of the config that sampling needs."""

    id: str  # a UUID, created with the workdir; it names the run on Weights & Biases
    config: dict[str, Any]  # nested; infinite numbers as text, see `files.plain`
    model: str | None = None
    prompts: str | None = None
    reward: str | None = None
    algorithm: str | None = None
    beta: float | None = None
    sampler: str | None = None
    num_steps: int | None = None
    guidance: float | None = None
    lora_until_step: int | None = None
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)  # by name: SHA-256 and origin
    starts: tuple[dict[str, Any], ...] = ()  # of each start: time, process, versions, devices

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python and the packages at the last start."""
        return dict(self.starts[-1]["versions"]) if self.starts else {}

    @property
    def devices(self) -> dict[str, Any]:
        """Kind and number of the devices, and number of processes, at the last start."""
        return dict(self.starts[-1]["devices"]) if self.starts else {}

    def about_lora(self, updates: int) -> dict[str, Any]:
        """The description in the header of a LoRA file. Runs of the same config on the same inputs write the same."""
        how = ("sampler", "num_steps", "guidance", "lora_until_step")
        names = ("model", "prompts", "reward", "algorithm", "beta", *how)
        about = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"updates": updates, **about, "inputs": {name: given["sha256"] for name, given in self.inputs.items()}}

    def write(self, workdir: Path) -> None:
        """Writes the manifest to the workdir and replaces an earlier one."""
        write_json(workdir / NAME, asdict(self))


def read(workdir: Path) -> Manifest:
    """The manifest of a workdir. Raises `UserError` if there is none or it is damaged."""
    file = workdir / NAME
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Manifest)}
        found = Manifest(**{name: value for name, value in contents.items() if name in known})
        # JSON has no infinity, see `files.plain`.
        found = Manifest(**{**vars(found), "starts": tuple(found.starts), "beta": _number(found.beta)})
        dict(found.config), found.versions, found.devices, found.about_lora(0)  # of the right types
        return found
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no run: it has no {NAME}; name the --workdir of a training run") from None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({reason_of(error)}); restore it, or choose another --workdir") from error


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a folder, not installed
            found[name] = "unknown"
    return found


def devices() -> dict[str, Any]:
    """The devices of all processes of the run."""
    return {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count()}


def describe_inputs(inputs: Mapping[str, Input]) -> dict[str, dict[str, str]]:
    """SHA-256 and origin of each file or list of texts. Raises `UserError` for a file that cannot be read."""
    return {name: _describe(given) for name, given in inputs.items()}


def _describe(given: Input) -> dict[str, str]:
    if not isinstance(given, Path):
        return {"sha256": sha256(json.dumps(list(given)).encode()).hexdigest(), "texts": str(len(given))}
    try:
        found = {"sha256": hashes.sha256(given), "file": str(given.absolute())}
    except OSError as error:
        raise UserError(f"{given} cannot be read ({error.strerror or error}); download it again") from error
    revision = revision_of(given)
    return found | {"revision": revision} if revision else found


def compare_configs(before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] | set[str]) -> list[str]:
    """The differences between two nested configs, one text each. `free` are dotted names of fields to ignore."""
    old, new = flatten(before), flatten(plain(now))
    changed = sorted(name for name in old | new if old.get(name) != new.get(name) and name not in free)
    return _shorten([f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed])


def compare_inputs(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The inputs whose contents differ, one text each. Their origin is not compared."""
    changed = []
    for name in sorted({*before, *now}):
        if name not in now:
            changed.append(f"{name} is no longer read")
        elif name not in before:
            changed.append(f"{name} was not read before")
        elif before[name]["sha256"] != now[name]["sha256"]:
            changed.append(f"{name} had SHA-256 {before[name]['sha256'][:12]}… and has {now[name]['sha256'][:12]}…")
    return _shorten(changed)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested config by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config that has the given values by dotted name."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = value
    return tree


def _shorten(changed: list[str]) -> list[str]:
    more = [f"and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
    return changed[:_SHOWN] + more
