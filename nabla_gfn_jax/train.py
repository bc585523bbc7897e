"""Finetunes a text-to-image model with a reward: `python -m nabla_gfn_jax.train --config=emoji`.

The same command with the same workdir resumes the run. To use several machines, start the same command on each, with a
workdir that all of them share. Add `--distributed` on TPU pods, Slurm, Open MPI and Kubernetes; on other clusters add
`--coordinator=HOST:PORT --num_processes=N --process_id=I`.
"""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.command_line import default_workdir, parse_run
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import flatten, option
from nabla_gfn_jax.parallel import place, require_devices, use_cpu_cores
from nabla_gfn_jax.processes import ProcessOptions, ending_together, is_first, join
from nabla_gfn_jax.reports.page import NAME as REPORT
from nabla_gfn_jax.runs.checkpoints import Checkpoints
from nabla_gfn_jax.runs.metrics_log import MetricsLog
from nabla_gfn_jax.runs.workdir import Workdir, claim
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.stopping import Stopping, stoppable
from nabla_gfn_jax.training.build import about, build, check, free_fields, inputs, length, prompts_of
from nabla_gfn_jax.training.judge import Judge
from nabla_gfn_jax.training.loop import Programs, Row, first_progress, restored, run
from nabla_gfn_jax.training.outputs import WorkdirOutputs, is_finished
from nabla_gfn_jax.training.profiling import Clock
from nabla_gfn_jax.training.showing import Showing


@dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions):
    """The options of the command beside the run's settings."""

    config: str = option("emoji", "name of a shipped config, or a Python file; append :VARIANT to choose a variant")
    workdir: Path | None = option(None, "folder of the run [runs/CONFIG-VARIANT/seedN]")
    profile: bool = option(False, "write a trace of two epochs, for TensorBoard or XProf, to WORKDIR/profile")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Checks the settings, claims the workdir, and runs or resumes the finetuning unless it is finished."""
    options, settings = parse_run(argv, Options, Settings, __doc__)
    path = options.workdir or default_workdir(options.config, settings.seed)
    use_cpu_cores(settings.training.trajectories // settings.training.micro_batches)
    join(options)
    require_devices()
    with ending_together(), stoppable(f"this command resumes the run: {typed(argv)}") as stopping:
        check(settings)
        with claim(path, flatten(settings), free_fields(settings), about(settings), write=is_first()) as workdir:
            if not is_finished(workdir, length(settings)):
                finetune(settings, workdir, profile=options.profile, stopping=stopping)
        if is_first():
            print(
                f"done. report: {path / REPORT}   metrics: {path / 'metrics.jsonl'}   samples: {path / 'samples'}   "
                f"LoRA: {workdir.latest_lora()}   checkpoints: {path / 'checkpoints'}"
            )


def typed(argv: Sequence[str]) -> str:
    """The command as it can be typed again."""
    program = "python -m nabla_gfn_jax.train" if argv[0].endswith(".py") else argv[0]
    return f"{program} {shlex.join(argv[1:])}".rstrip()


def finetune(
    settings: Settings,
    workdir: Workdir,
    *,
    profile: bool = False,
    on_epoch: Callable[[Row], None] | None = None,
    stopping: Stopping | None = None,
) -> None:
    """Runs the settings, from the start or from the last checkpoint. Calls `on_epoch` with the log's row of each epoch.

    A KeyboardInterrupt saves first. `stopping` says how the command ends after a signal.

    Raises `UserError` if an input has changed since the run began.
    """
    use_compilation_cache()
    begun = time.monotonic()
    trainer, plan = build(settings), length(settings)
    workdir.record_inputs(inputs(settings, trainer.reward))
    state = place(trainer.first_state(settings.seed, settings.lora.rank, settings.lora.layers), trainer.mesh)
    programs = Programs(trainer, plan, state)
    kept = settings.logging
    with Checkpoints(workdir.path / "checkpoints", kept.keep_checkpoints, kept.keep_every) as checkpoints:
        progress, first, about_run = restored(programs, first_progress(trainer, state), checkpoints)
        log = MetricsLog(
            workdir.path,
            first,
            run_id=workdir.manifest.id,
            config=workdir.manifest.config,
            rows=about_run.get("rows", ()),
            tensorboard=settings.logging.tensorboard,
            wandb=settings.logging.wandb,
            trackio=settings.logging.trackio,
            write=is_first(),
        )
        outputs = WorkdirOutputs(
            workdir,
            plan,
            first,
            log,
            checkpoints,
            Clock(about_run, trainer.mesh.size, begun),
            stopping or Stopping(),
            Showing(workdir, prompts_of(settings)),
            profile=profile,
            judge=Judge(settings, trainer, workdir) if settings.evaluation.images else None,
            stop_on_alarm=settings.evaluation.stop_on_alarm,
            on_epoch=on_epoch,
        )
        with closing(outputs):
            outputs.resumes(progress)
            try:
                run(programs, plan, progress, first, outputs)
            except KeyboardInterrupt:
                outputs.save_whole()
                raise
            outputs.finished()


if __name__ == "__main__":
    main(sys.argv)
