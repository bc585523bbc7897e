"""The log of a run: always `metrics.jsonl`, and TensorBoard, Weights & Biases or trackio on request.

There is one row per epoch, for the trajectories that the epoch sampled and the updates that it made. `COLUMNS` says
what each number describes. One more row after the last epoch has the final policy's reward and no update.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.checkpoints.files import append, reason_of, replace_contents
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.runs import sinks
from nabla_gfn_jax.runs.sinks import Close, Sink, Write

POLICY, UPDATE, EPOCH = "the policy that sampled", "the update", "the epoch"


class Column(NamedTuple):
    """A number in the log."""

    name: str
    unit: str
    of: str
    meaning: str


def _columns_of_algorithms() -> tuple[Column, ...]:
    """The columns that some algorithms declare in their class attribute `columns`."""
    found: dict[str, tuple[str, list[str]]] = {}
    for algorithm, cls in ALGORITHMS.items():
        for name, meaning in getattr(cls, "columns", {}).items():
            found.setdefault(name, (meaning, []))[1].append(algorithm)
    return tuple(Column(name, "", UPDATE, f"{text} ({', '.join(names)})") for name, (text, names) in found.items())


COLUMNS = (
    Column("epoch", "", EPOCH, "number of the epoch; one more after the last epoch only samples"),
    Column("step", "updates", POLICY, "number of updates before; at 0 the base model, or the LoRA of lora.start_from"),
    Column("updates", "updates", EPOCH, "number of updates when the epoch ends"),
    Column("reward_mean", "log R", POLICY, "mean over the epoch's samples, not multiplied by β"),
    Column("reward_std", "log R", POLICY, "standard deviation over the samples"),
    Column(
        "reward_std_prompt",
        "log R",
        POLICY,
        "root of the mean variance over the samples of a prompt, if a prompt has two or more samples",
    ),
    Column("reward_mean_PART", "log R", POLICY, "mean of each part of a reward that is a sum, without its weight"),
    Column("lost_samples", "samples", EPOCH, "samples left out because a number of theirs is not finite"),
    Column("skipped_updates", "updates", EPOCH, "updates left out because a number is not finite"),
    Column("loss", "", UPDATE, "the minimised loss, a mean over the epoch's optimizer steps that were applied"),
    *_columns_of_algorithms(),
    Column("grad_norm_lora", "", UPDATE, "norm of the LoRA's gradient before clipping"),
    Column("grad_norm_correction", "", UPDATE, "norm of g_φ's gradient before clipping, if there is a g_φ"),
    Column(
        "grad_norm_flow",
        "",
        UPDATE,
        "norm of the gradient of the scalar head, log F or V, if there is one",
    ),
    Column("seconds", "s", EPOCH, "duration"),
    Column("images_per_second", "1/s", EPOCH, "images sampled in the epoch, divided by its duration"),
    Column("flops_per_second", "FLOP/s", EPOCH, "operations of one device, divided by the epoch's duration"),
    Column(
        "device_hours",
        "h",
        EPOCH,
        "time of the run so far, in all its starts and with compiling, multiplied by the number of devices",
    ),
    Column("device_memory_gib", "GiB", EPOCH, "largest memory that a device, or a CPU's process, has used so far"),
)


def table() -> str:
    """The columns as a Markdown table."""
    rows = [("column", "unit", "of", "meaning"), ("---",) * 4, *((f"`{c[0]}`", *c[1:]) for c in COLUMNS)]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


class MetricsLog:
    """Appends one row per epoch to `metrics.jsonl`. A resumed run replaces the rows of epochs that it repeats.

    A row that cannot be written, because the disk is full, stops nothing: it is kept in `unwritten` and written with
    the next row. A resumed run gets these `rows` back from its checkpoint. `run_id` names the run on Weights & Biases
    and in trackio, so that a resumed run continues the same one. If `write` is false, as in all processes but the
    first, nothing is written.
    """

    def __init__(
        self,
        workdir: Path,
        first_epoch: int,
        *,
        run_id: str,
        config: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]] = (),
        tensorboard: bool = False,
        wandb: bool = False,
        trackio: bool = False,
        write: bool = True,
    ):
        self._file = workdir / "metrics.jsonl"
        self.unwritten: list[dict[str, Any]] = []
        self._sinks: list[Sink] = []
        self._writes = write
        if not write:
            return
        kept = {row["epoch"]: row for row in (*read(workdir, tell=True), *rows) if row["epoch"] < first_epoch}
        in_order = [kept[epoch] for epoch in sorted(kept)]
        text = "".join(map(_line, in_order)).encode()
        if self._file.exists() or text:
            replace_contents(self._file, text)
        if tensorboard:
            self._add("TensorBoard", lambda: sinks.tensorboard(workdir / "tensorboard", in_order))
        if wandb:
            self._add("Weights & Biases", lambda: sinks.wandb(workdir, run_id, config))
        if trackio:
            self._add("trackio", lambda: sinks.trackio(workdir, run_id, config, in_order))

    def _add(self, name: str, open_it: Callable[[], tuple[Write, Close]]) -> None:
        try:
            self._sinks.append(Sink(name, *open_it()))
        except Exception as error:  # libraries raise many kinds
            print(f"{name} gets no rows ({reason_of(error)}); the run goes on", file=sys.stderr)

    def write(self, row: Mapping[str, float]) -> None:
        """Appends a row, which must have an "epoch". Numbers that are not finite are written as null."""
        if not self._writes:
            return
        told = bool(self.unwritten)
        self.unwritten.append(json.loads(_line(row)))
        try:
            append(self._file, "".join(map(_line, self.unwritten)).encode())
            self.unwritten.clear()
        except OSError as error:
            if not told:
                print(f"{self._file} cannot be written ({reason_of(error)}); the run goes on", file=sys.stderr)
        for sink in self._sinks:
            sink.write(row)

    def close(self, patience: float = 30.0) -> None:
        """Closes the loggers after everything is written, or after `patience` seconds each."""
        while self._sinks:
            self._sinks.pop().close(patience)


def read(workdir: Path, *, tell: bool = False) -> list[dict[str, Any]]:
    """The rows of a workdir's log; an empty list if there is no log.

    Broken lines are skipped: the last line if the program was killed while writing it, and any damaged line. With
    `tell`, damaged lines are reported on stderr.
    """
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    rows = [_parse(line) for line in lines]
    broken = [number for number, row in enumerate(rows, 1) if row is None and number < len(rows)]
    if broken and tell:
        print(f"{file}: line {', '.join(map(str, broken))} cannot be read and is left out", file=sys.stderr)
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("epoch"), int) else None


def check_sinks(*, tensorboard: bool, wandb: bool, trackio: bool) -> None:
    """Raises `UserError` if the package of a requested logger is not installed."""
    asked = (
        ("tensorboard", tensorboard, "tensorboardX", "nabla_gfn_jax[logging]"),
        ("wandb", wandb, "wandb", "nabla_gfn_jax[logging]"),
        ("trackio", trackio, "trackio", "trackio"),
    )
    for option, wanted, package, install in asked:
        if wanted and find_spec(package) is None:
            raise UserError(f"logging.{option} needs {package}; pip install '{install}'")


def _line(row: Mapping[str, Any]) -> str:
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
