"""The table of a report's runs, from their manifests, without secrets and without the paths of the machine."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from nabla_gfn_jax.reports.source import Run
from nabla_gfn_jax.rewards import scale_of
from nabla_gfn_jax.runs.manifest import Manifest, flatten

HIDDEN = "(hidden)"
_SECRET = re.compile(r"token|secret|passw|credential|api_?key|auth", re.I)  # in the name of a field
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{8,}")
_URL = re.compile(r"(?P<scheme>\w+://)(?:[^/\s@]*@)?(?P<rest>[^\s?#;*+]*)(?P<query>[?#][^\s;*+]*)?")
_PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?[/\\](?:[^/\\:;*+]+[/\\])*[^\s/\\:;*+]*")


class Entry(NamedTuple):
    """A row of the table: the value of each run as text, "" if a run has none."""

    section: str
    name: str
    values: list[str]
    differs: bool


def table(runs: Sequence[Run]) -> list[Entry]:
    """All rows. Every value is text that `shown` has been applied to."""
    described = [_described(run.manifest) | _extent(run) for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    entries = []
    for section, name in names:
        values = [each.get((section, name), "") for each in described]
        entries.append(Entry(section, name, values, len(set(values)) > 1))
    order = list(dict.fromkeys(entry.section for entry in entries))
    return sorted(entries, key=lambda entry: order.index(entry.section))


def summary(about: Manifest) -> str:
    """One line that says what the run is."""
    beta = None if about.beta is None else f"β = {about.beta:g}"
    parts = (about.algorithm, about.reward, beta, about.model, f"seed {about.config.get('seed', '?')}")
    return " · ".join(shown("", part) for part in parts if part is not None)


def shown(name: str, value: Any) -> str:
    """The value of a field as text. Of URLs without user, password and query; of absolute paths only the last part."""
    if _SECRET.search(name.rpartition(".")[2]):
        return HIDDEN
    if isinstance(value, list | tuple):
        return ", ".join(shown(name, item) for item in value)
    text = "" if value is None else str(value)
    text = _TOKEN.sub(HIDDEN, text)
    pieces: list[str] = []
    end = 0
    for url in _URL.finditer(text):  # outside URLs only, a slash begins a path
        pieces += [_PATH.sub(_last, text[end : url.start()]), f"{url['scheme']}{url['rest']}"]
        pieces += [f"?{HIDDEN}"] * (url["query"] is not None)
        end = url.end()
    return "".join([*pieces, _PATH.sub(_last, text[end:])])


def _last(path: re.Match[str]) -> str:
    text = path[0]
    return (PureWindowsPath if "\\" in text else PurePosixPath)(text).name or text


def _described(about: Manifest) -> dict[tuple[str, str], str]:
    found = {("run", name): shown(name, getattr(about, name)) for name in ("algorithm", "reward", "prompts", "model")}
    if about.reward is not None:
        found["run", "log R"] = shown("reward", scale_of(about.reward))
    found |= {("config", name): shown(name, value) for name, value in flatten(about.config).items()}
    for name, given in about.inputs.items():
        kept = [given.get("sha256", "")[:12], *(f"{n} {given[n]}" for n in ("texts", "revision") if n in given)]
        found["inputs", shown("", name)] = shown("", " · ".join(kept))
    for name, version in about.versions.items():
        found["versions", shown("", name)] = shown("", version)
    for name, value in about.devices.items():
        found["devices", name] = shown(name, value)
    return found


def _extent(run: Run) -> dict[tuple[str, str], str]:
    times = [str(start["time"]) for start in run.manifest.starts if "time" in start]
    seconds = sum(row["seconds"] for row in run.rows if isinstance(row.get("seconds"), int | float))
    found = {"updates": str(max((row.get("updates") or 0 for row in run.rows), default=0))}
    found |= {"first start": times[0], "starts": str(len(times))} if times else {}
    found |= {"time in epochs": f"{seconds / 60:.1f} minutes"} if seconds else {}
    return {("run", name): shown("", value) for name, value in found.items()}
