"""Writes a run's results to its workdir and shows a progress bar."""

from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm

from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.processes import is_first
from nabla_gfn_jax.runs.checkpoints import Checkpoints
from nabla_gfn_jax.runs.metrics_log import MetricsLog, read
from nabla_gfn_jax.runs.workdir import Workdir
from nabla_gfn_jax.training.judge import Judge
from nabla_gfn_jax.training.loop import Plan, Progress, Row
from nabla_gfn_jax.training.profiling import Trace
from nabla_gfn_jax.training.showing import Showing

_SHOWN_PIXELS = 128  # smaller images are enlarged in the grid


def is_finished(workdir: Workdir, plan: Plan) -> bool:
    """Whether the run has written all of its results. The check loads and compiles nothing."""
    ends = any(row["epoch"] == plan.epochs + 1 for row in read(workdir.path))
    return ends and plan.updates in workdir.loras()


class WorkdirOutputs:
    """The metrics, images, LoRA files, checkpoints and trace of a run. Only process 0 writes files."""

    def __init__(
        self,
        workdir: Workdir,
        plan: Plan,
        first: int,
        log: MetricsLog,
        checkpoints: Checkpoints,
        profile: bool,
        showing: Showing,
        judge: Judge | None = None,
        on_epoch: Callable[[Row], None] | None = None,
    ):
        self._workdir, self._log, self._checkpoints, self._keep = workdir, log, checkpoints, plan.keep_loras
        self._showing, self._judge, self._on_epoch = showing, judge, on_epoch
        self._trace = Trace(workdir.path, first, plan.epochs, wanted=profile)
        total = plan.epochs + 2
        self._bar = tqdm(initial=first, total=total, unit="epoch", dynamic_ncols=True, disable=not is_first())

    def begins(self, epoch: int) -> None:
        self._trace.before(epoch)

    def ends(self, epoch: int) -> None:
        self._trace.after(epoch)
        self._showing.end_epoch()
        self._bar.update()

    def row(self, row: Row) -> None:
        self._log.write(row)
        shown = {"reward": row["reward_mean"]} | {name: row[name] for name in ("loss",) if name in row}
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        if self._on_epoch is not None:
            self._on_epoch(row)

    def images(self, updates: int, images: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        if is_first():
            zoom = max(1, _SHOWN_PIXELS // images.shape[1])
            save_grid(self._workdir.path / f"samples/update_{updates:05d}.png", images, columns=8, zoom=zoom)
            self._showing.keep(updates, images, scores)

    def save(self, epoch: int, updates: int, progress: Progress) -> None:
        """Saves the LoRA, then the checkpoint, so that each checkpoint has its LoRA. All processes must call it."""
        self._workdir.save_lora(updates, progress.state.policy, keep=self._keep)
        self._checkpoints.save(epoch, progress.tree())
        if self._judge is not None:
            self._judge(updates, progress.state.policy)

    def resumes(self, progress: Progress) -> None:
        """Is called when a run starts or resumes. Writes the LoRA of the checkpoint again if it was removed."""
        updates = int(progress.state.step)
        if updates > 0 and updates not in self._workdir.loras():
            self._workdir.save_lora(updates, progress.state.policy, keep=self._keep)

    def close(self) -> None:
        self._bar.close()
        self._log.close()
