"""Runs a grid of methods, seeds and configs, and writes their results: `nabla-gfn reproduce emoji --out=runs/grid`.

A grid is a TOML file or the name of a shipped one (docs/reproduce.md). The runs follow one another, in the order that
answers most first: one seed of every method, then the other learning rates, then the other seeds. The same command
resumes a grid that was stopped or killed: runs that are done are skipped, and the run that was cut off goes on. A run
that fails is reported in one line, and the grid goes on; the same command tries it again. After each run, OUT/results
has the tables and pictures that the notebooks read.

`--plan` prints what the grid costs and runs nothing. `--collect` writes such results of runs that exist already, given
by their workdirs: `nabla-gfn reproduce runs/emoji/seed0 runs/emoji/seed1 --collect --out=results`.
"""

import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nabla_gfn_jax import train
from nabla_gfn_jax.checkpoints.files import WriteError, check_can_write, plain
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.inference.sampling import CPU_BATCH
from nabla_gfn_jax.options import Checked, flatten, option
from nabla_gfn_jax.parallel import require_devices, use_cpu_cores
from nabla_gfn_jax.reproduction import cost, records, tables
from nabla_gfn_jax.reproduction.cells import Cell, in_order, planned
from nabla_gfn_jax.reproduction.collect import collect
from nabla_gfn_jax.reproduction.grid import Evaluation, Grid, read
from nabla_gfn_jax.reproduction.measuring import Measuring, how
from nabla_gfn_jax.reproduction.progress import Progress
from nabla_gfn_jax.runs import manifest
from nabla_gfn_jax.runs.workdir import Workdir, claim
from nabla_gfn_jax.stopping import Stopping, stoppable
from nabla_gfn_jax.training.build import about, check, free_fields, length
from nabla_gfn_jax.training.loop import Row
from nabla_gfn_jax.training.outputs import is_finished

_SHOWN = 500  # characters of an error


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The grid, and the folder of its runs."""

    grid: tuple[str, ...] = option(
        (), "a TOML file, or the name of a shipped grid; with collect, workdirs of runs", positional=True, empty=True
    )
    out: Path | None = option(None, "folder for the runs and the results [runs/GRID]; with collect, for the results")
    collect: bool = option(False, "write the results of runs that exist already, and run nothing")
    plan: bool = option(False, "print what the grid costs, and run nothing")
    topology: str = option("", "with plan: the devices of a run, such as v5e:2x4, for the time", empty=True)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Reads the grid, and runs what is missing, or prints its cost."""
    options = parse(argv, Options, __doc__)
    program = "python -m nabla_gfn_jax.reproduce" if argv[0].endswith(".py") else argv[0]
    command = f"{program} {shlex.join(argv[1:])}"
    if options.collect:
        if options.out is None or not options.grid:
            raise UserError("collect needs workdirs of runs and a folder for the results; give both, as in --help")
        collect([Path(workdir) for workdir in options.grid], options.out, tables.Start(command))
        print(f"done. results: {options.out}")
        return
    if len(options.grid) != 1:
        raise UserError("name one grid, as in nabla-gfn reproduce emoji; it is a TOML file or a shipped one")
    grid = read(options.grid[0])
    folder = options.out or Path("runs") / grid.name
    if options.plan:
        print(cost.show(grid, folder, options.topology))
        return
    training = [cell.settings.training for cell in planned(grid)]
    use_cpu_cores(gcd(CPU_BATCH, *(c.trajectories // c.micro_batches for c in training)))
    require_devices()
    use_compilation_cache()
    with _locked(folder), stoppable(f"this command resumes the grid: {command}") as stopping:
        failed = run(grid, folder, tables.Start(command), stopping)
    ending = f"; {failed} runs failed, the same command tries them again" if failed else ""
    print(f"done. results: {folder / tables.FOLDER}{ending}")


def run(grid: Grid, folder: Path, start: tables.Start, stopping: Stopping) -> int:
    """Runs the cells that are not done, one after the other. Returns the number of runs that failed."""
    runner, progress = Runner(grid, folder, stopping), Progress(planned(grid))
    failed = 0
    try:
        for cell in in_order(grid, lambda cell: tables.score(folder, grid, cell)):
            workdir = folder / cell.folder
            if runner.is_done(cell):
                progress.passes(cell, tables.state(workdir)["seconds"])
                continue
            failed += not runner.run(cell, progress)
            with stopping.writing:
                tables.write(folder, grid, start)
        with stopping.writing:
            tables.write(folder, grid, start)
    finally:
        progress.close()
    return failed


class Runner:
    """Trains and measures cells."""

    def __init__(self, grid: Grid, folder: Path, stopping: Stopping):
        self._evaluation: Evaluation = grid.shared.evaluation
        self._folder, self._stopping = folder, stopping
        self._measuring: tuple[object, Measuring] | None = None

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell's workdir holds a finished run of just these settings, measured as the grid says."""
        path = self._folder / cell.folder
        try:
            found = Workdir(path, manifest.read(path), writes=False)
        except UserError:
            return False
        config = plain(manifest.unflatten(flatten(cell.settings)))
        alike = not manifest.compare_configs(found.manifest.config, config, set(free_fields(cell.settings)))
        measured = tables.state(path).get("measured") == self._how_measured(cell)
        return alike and measured and is_finished(found, length(cell.settings))

    def run(self, cell: Cell, progress: Progress) -> bool:
        """Runs the cell, or resumes it, and measures its LoRAs. Returns whether it ended well.

        Any error but a full disk is noted in the cell's workdir and reported in one line.
        """
        progress.begins(cell)
        workdir, begun = self._folder / cell.folder, time.monotonic()
        seconds, epochs = float(tables.state(workdir).get("seconds", 0.0)), 0
        cpu = time.process_time()

        def on_epoch(row: Row) -> None:
            nonlocal epochs, cpu
            now = time.process_time()
            records.add_cpu_seconds(workdir, int(row["epoch"]), now - cpu)
            epochs, cpu = epochs + 1, now
            progress.epoch()

        error = ""
        try:
            self._train(cell, on_epoch)
            gc.collect()  # the trainer, before another model is loaded
            self._measure(cell, workdir)
        except WriteError:
            raise
        except Exception as reason:  # libraries raise many kinds, and one run must not stop the grid
            error = " ".join(f"{'' if isinstance(reason, UserError) else type(reason).__name__ + ': '}{reason}".split())
            error = error[:_SHOWN]
            print(f"error: {cell.name} failed: {error}; the grid goes on", file=sys.stderr)
        finally:
            self._stopping.save_first(lambda: "")  # the run has ended, and saves no more
        result = {"error": error} if error else {"measured": self._how_measured(cell)}
        tables.note(workdir, seconds=round(seconds + time.monotonic() - begun, 1), **result)
        progress.ends(cell, epochs)
        return not error

    def _train(self, cell: Cell, on_epoch: Callable[[Row], None]) -> None:
        s = cell.settings
        check(s)
        with claim(self._folder / cell.folder, flatten(s), free_fields(s), about(s)) as workdir:
            if not is_finished(workdir, length(cell.settings)):
                train.finetune(cell.settings, workdir, on_epoch=on_epoch, stopping=self._stopping)

    def _how_measured(self, cell: Cell) -> Any:
        return plain(flatten(self._evaluation) | {"beta": cell.beta})

    def _measure(self, cell: Cell, workdir: Path) -> None:
        s = cell.settings
        key = (cell.base, s.model, s.model_dtype, s.reward, s.prompts, how(s), cell.beta)
        if self._measuring is None or self._measuring[0] != key:
            self._measuring = None  # before the next, so that two models are never in memory
            base = self._folder / "bases" / cell.base
            self._measuring = key, Measuring(cell, self._evaluation, base, progress="base")
        self._measuring[1](workdir, progress=cell.name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the grid's folder. Raises `UserError` if another command works in it, or it cannot be written."""
    check_can_write(folder / ".lock")
    lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is in use by another command; wait for it to end, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    main(sys.argv)
