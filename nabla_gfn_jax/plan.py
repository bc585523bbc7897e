"""Estimates the memory and the time of a run on devices that are not attached.

    python -m nabla_gfn_jax.plan --config=hps --topology=v5e:2x4

Compiles the sampler and the update of the run for these devices, from the shapes of the weights alone. TPUs need the
extra `[tpu]` (libtpu), and NVIDIA's GPUs need the extra `[plan]`. `--fit` also searches for the largest micro-batch.
`--full_effort` compiles as a run would and adds the time estimate of the compiler's cost model; it takes hours at
Stable Diffusion's size. Without it, the memory on a TPU is accurate to a tenth. `--phases=rollout` compiles the sampler
only. Nothing is measured on a device.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import jax

from nabla_gfn_jax.command_line import parse_run
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.parallel import data_mesh
from nabla_gfn_jax.planning.chips import chip_of, devices_of
from nabla_gfn_jax.planning.phases import PHASES, Phase, Plan
from nabla_gfn_jax.planning.table import show
from nabla_gfn_jax.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The run to plan and the devices to plan for."""

    config: str = option("hps", "name of a shipped config, or a Python file; append :VARIANT to choose a variant")
    topology: str = option("v5e:2x4", "the devices: v4:2x2x1, v5e:2x4, v5p:2x2x2, v6e:2x4, a100:8, h100:1, ...")
    phases: tuple[Literal["rollout", "update"], ...] = option(PHASES, "the programs to compile")
    fit: bool = option(False, "also search for the largest micro-batch that fits")
    full_effort: bool = option(False, "compile as a run would, to get the compiler's own estimate of the time")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Compiles the phases of the run from shapes and prints a table."""
    chosen, config = parse_run(argv, Options, Settings, __doc__)
    chip, devices = chip_of(chosen.topology), devices_of(chosen.topology)
    mesh = data_mesh(config.training.trajectories, config.training.micro_batches, devices)
    # JAX cannot read a program from its cache if the program was compiled for a chip that is not attached.
    jax.config.update("jax_enable_compilation_cache", False)
    plan = Plan(config, chip, mesh, chosen.full_effort)
    phases: dict[str, Phase | str] = {name: plan.compile(name) for name in chosen.phases}
    print(show(plan, phases, f"{chosen.config} on {chosen.topology}"))
    if chosen.fit:
        largest = plan.largest_micro_batch() or "none"
        print(f"largest micro-batch of an update that fits: {largest} trajectories per device")


if __name__ == "__main__":
    main(sys.argv)
