"""Finetunes a text-to-image model with a reward: `python -m nabla_gfn_jax.train --config=emoji`.

The same command on the same workdir resumes. Several processes, a machine each: the same command on each with
`--distributed` where the cluster says who they are, or `--coordinator=HOST:PORT --num_processes=N --process_id=I`, and
one workdir that all of them see.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.checkpoints.training_state import Checkpoints
from nabla_gfn_jax.command_line import default_workdir, parse_run
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import option
from nabla_gfn_jax.parallel import place, use_cpu_cores
from nabla_gfn_jax.processes import ProcessOptions, ending_together, is_first, join
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import build, check, length
from nabla_gfn_jax.training.loop import Programs, first_progress, restored, run
from nabla_gfn_jax.training.metrics_log import MetricsLog
from nabla_gfn_jax.training.outputs import WorkdirOutputs
from nabla_gfn_jax.workdir import claim_workdir


@dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions):
    """What a run is told beside its settings."""

    config: str = option("emoji", "a shipped config's name or a Python file, and :VARIANT where it has any")
    workdir: Path | None = option(None, "folder of the run [runs/CONFIG-VARIANT/seedN]")
    profile: bool = option(False, "trace two epochs, for TensorBoard or XProf, into WORKDIR/profile")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Settings → trainer → compiled programs → restored progress → for each epoch: sample, update, log, save."""
    options, settings = parse_run(argv, Options, Settings, __doc__)
    workdir = options.workdir or default_workdir(options.config, settings.seed)
    use_cpu_cores(settings.training.trajectories // settings.training.micro_batches)
    join(options)
    with ending_together():
        check(settings)
        claim_workdir(workdir, settings, write=is_first())
        use_compilation_cache()
        trainer, plan = build(settings), length(settings)
        state = place(trainer.first_state(settings.seed, settings.lora.rank), trainer.mesh)
        programs = Programs(trainer, plan, state)
        checkpoints = Checkpoints(workdir / "checkpoints")
        progress, first = restored(programs, first_progress(trainer, state), checkpoints)
        log = MetricsLog(workdir, first, settings, write=is_first())
        with closing(WorkdirOutputs(workdir, plan, first, log, checkpoints, options.profile)) as outputs:
            run(programs, plan, progress, first, outputs)
        if is_first():
            print(
                f"done. metrics: {workdir / 'metrics.jsonl'}   samples: {workdir / 'samples'}   "
                f"LoRA: {workdir / 'lora' / 'diffusers.safetensors'}   checkpoints: {workdir / 'checkpoints'}"
            )


if __name__ == "__main__":
    main(sys.argv)
