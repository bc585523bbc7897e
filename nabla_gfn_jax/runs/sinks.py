"""The loggers beside `metrics.jsonl`: TensorBoard, Weights & Biases and trackio.

Each has a thread of its own, so that it cannot stop or slow a run.
"""

import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import reason_of

Rows = Sequence[Mapping[str, Any]]
Write = Callable[[Mapping[str, Any]], None]
Close = Callable[[], None]

_PROJECT = "nabla_gfn_jax"  # the name of all runs' project
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # the variables with which trackio logs to a server


class Sink:
    """Gives rows to `write`, one after the other, and calls `close` at the end. The first error ends it with a line."""

    def __init__(self, name: str, write: Write, close: Close):
        self._name, self._write, self._close = name, write, close
        self._rows: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Puts the row into the queue."""
        self._rows.put(dict(row))

    def close(self, patience: float) -> None:
        """Waits until all rows are written, for up to `patience` seconds."""
        self._rows.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            print(f"{self._name} has not taken all rows in {patience:g} s; they are left out", file=sys.stderr)

    def _work(self) -> None:
        try:
            while (row := self._rows.get()) is not None:
                self._write(row)
            self._close()
        except Exception as error:  # libraries raise many kinds
            print(f"{self._name} gets no more rows ({reason_of(error)}); the run goes on", file=sys.stderr)


def tensorboard(folder: Path, rows: Rows) -> tuple[Write, Close]:
    """Replaces the folder's event files and writes `rows` to the new one, so that each row is there once.

    tensorboardX's `SummaryWriter` has a thread that ends when the disk is full, after which it waits forever.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
    writer = EventsWriter(str(folder / "events"))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            summary = scalar(name, math.nan if value is None else value)
            writer.write_event(Event(wall_time=time.time(), step=int(row["epoch"]), summary=summary))
        writer.flush()

    for row in rows:
        write(row)
    return write, writer.close


def wandb(workdir: Path, run_id: str, config: Mapping[str, Any]) -> tuple[Write, Close]:
    """A run on Weights & Biases. Its server ignores repeated epochs, and a resumed run repeats the same numbers."""
    import wandb as library

    run = library.init(
        project=_PROJECT,
        dir=str(workdir),
        config=dict(config),
        id=run_id,
        name=workdir.absolute().name,
        resume="allow",
    )
    return lambda row: run.log(dict(row), step=int(row["epoch"])), run.finish


def trackio(workdir: Path, run_id: str, config: Mapping[str, Any], rows: Rows) -> tuple[Write, Close]:
    """A run of trackio, named by the workdir and the start of its id, so that two workdirs of one name are two runs.

    trackio keeps a row as often as it is logged. On this machine, the run is therefore begun anew with `rows`. A run on
    a server goes on, and has repeated epochs twice with the same numbers.
    """
    import trackio as library

    name, here = f"{workdir.absolute().name}-{run_id[:8]}", not any(map(os.environ.get, _ELSEWHERE))
    if here:
        with suppress(ValueError):  # there is no such project yet
            for run in library.Api().runs(_PROJECT):
                if run.name == name:
                    run.delete()
    logged = library.init(
        project=_PROJECT,
        name=name,
        config=dict(config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )

    def write(row: Mapping[str, Any]) -> None:
        logged.log({_renamed(key): value for key, value in row.items()}, step=int(row["epoch"]))

    for row in rows if here else ():
        write(row)
    return write, logged.finish


def _renamed(column: str) -> str:
    """The column's name in trackio, which has a use of its own for "step"."""
    return "policy_step" if column == "step" else column
