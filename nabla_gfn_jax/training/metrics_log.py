"""Where a run's numbers go: always `metrics.jsonl`, and TensorBoard or Weights & Biases on request."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nabla_gfn_jax import options
from nabla_gfn_jax.checkpoints.files import write_whole
from nabla_gfn_jax.errors import UserError


class Sink(NamedTuple):
    """Another place for the rows."""

    write: Callable[[dict[str, float]], None]
    close: Callable[[], None]


class MetricsLog:
    """Appends one row an update to `metrics.jsonl`; rows of a step that is repeated after a resume are replaced."""

    def __init__(self, workdir: Path, first_epoch: int, config: Any, *, write: bool = True):
        self._file = workdir / "metrics.jsonl"
        self._sinks: list[Sink] = []
        self._writes = write
        if not write:  # another process does
            return
        self._keep_rows_before(first_epoch)
        if config.logging.tensorboard:
            self._sinks.append(_tensorboard(workdir))
        if config.logging.wandb:
            self._sinks.append(_wandb(workdir, options.plain(config)))

    def write(self, row: dict[str, float]) -> None:
        """`row` has `step`; numbers that are not finite are written as null."""
        if not self._writes:
            return
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with self._file.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Waits until everything is written."""
        for sink in self._sinks:
            sink.close()

    def _keep_rows_before(self, epoch: int) -> None:
        if self._file.exists():
            whole = [line for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            rows = [line for line in whole if json.loads(line)["epoch"] < epoch]  # without one that a crash cut short
            write_whole(self._file, "".join(rows).encode())


def _tensorboard(workdir: Path) -> Sink:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("logging.tensorboard needs tensorboardX; pip install 'nabla_gfn_jax[logging]'") from None
    writer = SummaryWriter(str(workdir / "tensorboard"), flush_secs=5)

    def write(row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, int(row["epoch"]))

    return Sink(write, writer.close)


def _wandb(workdir: Path, config: dict[str, Any]) -> Sink:
    try:
        import wandb
    except ImportError:
        raise UserError("logging.wandb needs wandb; pip install 'nabla_gfn_jax[logging]'") from None
    run = wandb.init(project="nabla_gfn_jax", dir=str(workdir), config=config, resume="allow", id=workdir.name)
    return Sink(lambda row: run.log(row, step=int(row["epoch"])), run.finish)
