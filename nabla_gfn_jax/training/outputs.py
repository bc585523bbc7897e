"""Writes a run's results to its workdir and shows a progress bar."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.processes import greatest, is_first, tell
from nabla_gfn_jax.runs import alarms
from nabla_gfn_jax.runs.checkpoints import Checkpoints
from nabla_gfn_jax.runs.metrics_log import MetricsLog, read
from nabla_gfn_jax.runs.workdir import Workdir
from nabla_gfn_jax.stopping import Stopping
from nabla_gfn_jax.training.judge import Judge
from nabla_gfn_jax.training.loop import Plan, Progress, Row
from nabla_gfn_jax.training.profiling import Clock, Trace
from nabla_gfn_jax.training.showing import Showing

_PATIENCE = 5.0  # seconds that a signal waits for a logger
_GO_ON = "The same command goes on"
_SHOWN_PIXELS = 128  # smaller images are enlarged in the grid


def is_finished(workdir: Workdir, plan: Plan) -> bool:
    """Whether the run has written all of its results. The check loads and compiles nothing."""
    ends = any(row["epoch"] == plan.epochs + 1 for row in read(workdir.path))
    return ends and plan.updates in workdir.loras()


class WorkdirOutputs:
    """The metrics, images, LoRA files, checkpoints and trace of a run. Only process 0 writes files.

    A signal saves the state after the last whole epoch (`stopping`), at once. With several processes, all save together
    when the epoch ends.
    """

    def __init__(
        self,
        workdir: Workdir,
        plan: Plan,
        first: int,
        log: MetricsLog,
        checkpoints: Checkpoints,
        clock: Clock,
        stopping: Stopping,
        showing: Showing,
        *,
        profile: bool = False,
        judge: Judge | None = None,
        stop_on_alarm: bool = False,
        on_epoch: Callable[[Row], None] | None = None,
    ):
        self._workdir, self._log, self._checkpoints, self._keep = workdir, log, checkpoints, plan.keep_loras
        self._showing, self._judge, self._on_epoch = showing, judge, on_epoch
        self._clock, self._stopping = clock, stopping
        self._stop_on_alarm, self._alarmed = stop_on_alarm, False
        self._rows: list[Row] = [row for row in read(workdir.path) if row["epoch"] < first]
        self._whole: tuple[int, int, Progress] | None = None  # the last whole epoch, its updates and progress
        self._trace = Trace(workdir.path, first, plan.epochs, wanted=profile)
        self._bar = tqdm(total=plan.epochs + 2, unit="epoch", dynamic_ncols=True, disable=not is_first())
        if not self._bar.disable:  # the time of earlier starts counts in the bar's estimate
            self._bar.n, self._bar.start_t = first, self._bar.start_t - clock.seconds
            self._bar.refresh()
        stopping.together = jax.process_count() > 1
        stopping.save_first(self.save_whole)

    def begins(self, epoch: int) -> None:
        self._trace.before(epoch)

    def ends(self, epoch: int, updates: int, progress: Progress | None) -> None:
        self._trace.after(epoch)
        self._showing.end_epoch()
        self._bar.update()
        if progress is not None:
            self._whole = epoch, updates, progress
        if self._stopping.together:
            requested = greatest(self._stopping.requested)
            if requested:
                self._stopping.end(requested)
        if self._stop_on_alarm and greatest(int(self._alarmed)) and progress is not None:
            self.save_whole()
            file = self._workdir.path / alarms.NAME
            raise UserError(f"an alarm ends the run after {updates} updates, which are saved; see {file}. {_GO_ON}")

    def row(self, row: Row) -> None:
        self._checkpoints.wait()  # the run ends here if the last one could not be written
        row = row | {"device_hours": self._clock.device_hours}
        with self._stopping.writing:
            self._log.write(row)
            self._alarmed |= self._raise_alarms(row)
        shown = {"reward": row["reward_mean"]} | {name: row[name] for name in ("loss",) if name in row}
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        if self._on_epoch is not None:
            self._on_epoch(row)

    def _raise_alarms(self, row: Row) -> bool:
        """Writes the alarms of the log up to this row that are not there yet. Returns whether there is one."""
        self._rows.append(row)
        if not is_first():
            return False
        try:
            return bool(alarms.add(self._workdir.path, alarms.of_log(self._rows), tell))
        except OSError as error:
            tell(f"an alarm cannot be written ({error}); the run goes on")
            return False

    def images(self, updates: int, images: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        if is_first():
            zoom = max(1, _SHOWN_PIXELS // images.shape[1])
            file = self._workdir.path / f"samples/update_{updates:05d}.png"
            try:
                save_grid(file, images, columns=8, zoom=zoom)
            except UserError as error:  # a picture is not worth a run
                print(f"{error}; the run goes on without the picture", file=sys.stderr)
            self._showing.keep(updates, images, scores)

    def save(self, epoch: int, updates: int, progress: Progress) -> None:
        """Saves the LoRA, then the checkpoint, so that each checkpoint has its LoRA. All processes must call it."""
        with self._stopping.writing:
            self._workdir.save_lora(updates, progress.state.policy, keep=self._keep)
            self._checkpoints.save(epoch, progress.tree(), self._about(progress))
        self.measure(updates, progress, saved=True)

    def measure(self, updates: int, progress: Progress, *, saved: bool = False) -> None:
        """Saves the LoRA and measures the policy, if a measurement is due. All processes must call it."""
        if self._judge is None or not self._judge.is_due(updates):
            return
        if not saved:
            with self._stopping.writing:
                self._workdir.save_lora(updates, progress.state.policy, keep=self._keep)
        self._alarmed |= self._judge(updates, progress.state.policy)

    def save_whole(self) -> str:
        """Saves the state after the last whole epoch, unless a checkpoint has it, and returns what it did."""
        if self._whole is None:
            return ""
        epoch, updates, progress = self._whole
        if updates > 0:
            self._workdir.save_lora(updates, progress.state.policy)
        self._checkpoints.save(epoch, progress.tree(), self._about(progress))
        self._checkpoints.wait()
        self._log.close(_PATIENCE)
        return f"saved: {updates} updates, of {epoch} whole epochs, in {self._workdir.path}"

    def resumes(self, progress: Progress) -> None:
        """Is called when a run starts or resumes.

        Writes the LoRA of the checkpoint again if it was removed, and judges it if the run was killed before.
        """
        updates = int(progress.state.step)
        if updates > 0 and updates not in self._workdir.loras():
            self._workdir.save_lora(updates, progress.state.policy, keep=self._keep)
        if self._judge is not None and self._judge.is_due(updates):
            if self._judge.lacks(updates):
                self._judge(updates, progress.state.policy)
            elif self._workdir.writes:
                self._judge.conclude(updates)

    def finished(self) -> None:
        """Is called when the run has ended. Raises `UserError` if rows of the log could not be written."""
        if self._log.unwritten:
            raise UserError(
                f"{len(self._log.unwritten)} rows of {self._workdir.path / 'metrics.jsonl'} could not be written; make "
                "space or allow writing, and run the same command again"
            )

    def close(self) -> None:
        self._bar.close()
        self._log.close()

    def _about(self, progress: Progress) -> dict[str, Any]:
        """What a checkpoint says beside the state: the time so far, and rows that the log could not take."""
        return self._clock.about | {
            "skipped": progress.skipped,
            "fault": progress.fault,
            "rows": list(self._log.unwritten),
        }
