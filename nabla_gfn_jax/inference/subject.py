"""The models to sample, and how: from the options, else from the run or the LoRA file, else the defaults."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nabla_gfn_jax.base_models.names import model_files
from nabla_gfn_jax.checkpoints.lora_file import read_about
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.sampling import Sampling
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.runs import loras, manifest

_DEFAULTS: dict[str, Any] = {
    "model": "emoji",
    "model_dtype": "float32",
    "sampler": "ddpm",
    "num_steps": 50,
    "guidance": 5.0,
}


@dataclass(frozen=True, kw_only=True)
class SubjectOptions(Checked):
    """The common options of `sample` and `evaluate`.

    An option that is not given is the run's, or is read from the header of the LoRA file.
    """

    workdir: Path | None = option(None, "folder of a run, whose LoRAs are sampled as in training", file="existing")
    model: str | None = option(
        None,
        "a shipped model, a diffusers folder, a file of weights, or OWNER/NAME on the hub [the run's, or emoji]",
    )
    model_dtype: Literal["float32", "bfloat16"] | None = option(
        None, "type of the base model's parameters [the run's, or float32]"
    )
    sampler: Sampler | None = option(None, "the sampler [the run's, or ddpm]")
    steps: int | None = option(None, "number of sampling steps [the run's, or 50]", minimum=1, maximum=999)
    guidance: float | None = option(
        None, "classifier-free guidance scale; 1: no guidance [the run's, or 5]", minimum=0, maximum=100
    )
    seed: int = option(0, "seed of the noise", minimum=0, maximum=LARGEST_SEED)
    value: Path | None = option(
        None, "a log value that the base model follows in a LoRA's place, by studies.value_guidance", file="existing"
    )
    candidates: int = option(
        1, "K: an image is one of K, chosen in proportion to R^β and its path's density", minimum=1, maximum=4096
    )
    batch: int = option(0, "most images sampled together; 0: as many as are likely to fit", minimum=0)


@dataclass(frozen=True)
class Subject:
    """A base model, LoRAs for it, and how they were trained."""

    model: str
    model_dtype: str
    how: Sampling
    loras: dict[str, Path]  # LoRA files by the names that the table shows
    prompts: str | None  # the prompt set, reward and β with which the LoRAs were trained
    reward: str | None
    beta: float | None
    model_files: dict[str, str]  # SHA-256 of the files of the base model on which the LoRAs were trained
    value: Path | None = None  # the log value that the base model follows


def find_subject(options: SubjectOptions, files: Sequence[Path] = (), eta: float = 1.0) -> Subject:
    """The subject that the options describe, with the LoRAs `files` or, without them, all LoRAs of the workdir.

    What is not said is read from the run, or else from the headers of the LoRAs and of the log value.

    Reports on stderr if an option contradicts the run.

    Raises:
        UserError: the workdir holds no run, or the headers of the files contradict each other and no option decides.
    """
    known: dict[str, Any] = {}
    found = {str(file): file for file in files}
    if options.workdir is not None:
        run = manifest.read(options.workdir)
        known = {"model_dtype": run.config.get("model_dtype")} | run.about_lora(0)
        if not files:
            found = {f"lora/{path.name}": path / loras.DIFFUSERS for path in loras.saved(options.workdir).values()}
    elif said := [*files, *([options.value] if options.value else [])]:
        known = _agreed({str(file): read_about(file) for file in said}, _given(options))
    for name, value in _given(options).items():
        if known.get(name) not in (None, value):
            print(f"{name} is {value}, as given; in training it was {known[name]}", file=sys.stderr)
    settled = _DEFAULTS | {name: value for name, value in known.items() if value is not None} | _given(options)
    inputs = settled.get("inputs", {})
    return Subject(
        model=settled["model"],
        model_dtype=settled["model_dtype"],
        how=Sampling(
            sampler=settled["sampler"],
            steps=settled["num_steps"],
            guidance=settled["guidance"],
            lora_until_step=_until(settled.get("lora_until_step"), known.get("num_steps"), settled["num_steps"]),
            eta=eta,
            seed=options.seed,
        ),
        loras=found,
        prompts=settled.get("prompts"),
        reward=settled.get("reward"),
        beta=settled.get("beta"),
        model_files={name: digest for name, digest in inputs.items() if name.startswith("model/")},
        value=options.value,
    )


def _until(step: int | None, of: int | None, steps: int) -> int | None:
    """The last step with the LoRA among `steps` steps, if it was trained with `step` of `of` steps."""
    return step if step is None or of is None else max(1, round(step * steps / of))


def hashes_of(model: str, others: Mapping[str, Iterable[Path]] | None = None) -> dict[str, str]:
    """The SHA-256 of the files of the base model `model` and of others, by their names in the manifest.

    `others` has files by the first part of their names, such as "reward".
    """
    found = manifest.describe_inputs({f"model/{name}": file for name, file in model_files(model).items()})
    return {name: described["sha256"] for name, described in found.items()} | file_hashes(others or {})


def file_hashes(files: Mapping[str, Iterable[Path]]) -> dict[str, str]:
    """The SHA-256 of files by their names in the manifest, whose first parts are the keys of `files`."""
    found = manifest.describe_inputs({f"{name}/{file.name}": file for name, its in files.items() for file in its})
    return {name: described["sha256"] for name, described in found.items()}


def warn_of_another_base(subject: Subject, files: Mapping[str, str]) -> None:
    """Reports on stderr if LoRAs or a log value are of another base model. `files` has the present one's hashes."""
    trained_on = subject.model_files
    changed = sorted(name for name, digest in trained_on.items() if files.get(name) != digest)
    if (subject.loras or subject.value) and changed:
        differ = f"{len(changed)} of its files differ, such as {changed[0]}"
        what = "LoRA" if subject.loras else "log value"
        print(f"the {what} was trained on another base model than {subject.model}: {differ}", file=sys.stderr)


def _given(options: SubjectOptions) -> dict[str, Any]:
    """The options that the user gave, under the manifest's names."""
    given = {name: getattr(options, name) for name in ("model", "model_dtype", "sampler", "guidance")}
    return {name: value for name, value in (given | {"num_steps": options.steps}).items() if value is not None}


def _agreed(headers: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values on which all headers that have them agree."""
    agreed: dict[str, Any] = {}
    for name in ("model", "sampler", "num_steps", "guidance", "lora_until_step", "prompts", "reward", "beta", "inputs"):
        said = {file: about[name] for file, about in headers.items() if name in about}
        values = list(said.values())
        if any(value != values[0] for value in values):
            if name in _DEFAULTS and name not in given:
                each = " and ".join(f"{value} in {file}" for file, value in said.items())
                raise UserError(f"the files differ in {name}: {each}; say which by --{_OPTION.get(name, name)}")
        elif values:
            agreed[name] = values[0]
    return agreed


_OPTION = {"num_steps": "steps"}
