"""Will a run fit, and how long will it take, on devices that are not here.

    python -m nabla_gfn_jax.plan --config=hps --topology=v5e:2x4

The run's own sampler and update are compiled for those devices (TPUs by libtpu, extra `[tpu]`; NVIDIA's GPUs, extra
`[plan]`), from the shapes of the weights alone. `--fit` also looks for the largest micro-batch. `--full_effort`
compiles as a run would, which takes hours at Stable Diffusion's size, for the cost model's time; without it a TPU's
memory is within a tenth. `--phases=rollout` compiles that alone. Nothing here is measured on a device.
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
    """What is planned for what."""

    config: str = option("hps", "a shipped config's name or a Python file, and :VARIANT where it has any")
    topology: str = option("v5e:2x4", "the devices: v4:2x2x1, v5e:2x4, v5p:2x2x2, v6e:2x4, a100:8, h100:1, ...")
    phases: tuple[Literal["rollout", "update"], ...] = option(PHASES, "what is compiled")
    fit: bool = option(False, "also look for the largest micro-batch that fits")
    full_effort: bool = option(False, "compile as a run would, for the compiler's own estimate of the time")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Configuration → shapes → compiled phases → a table."""
    chosen, config = parse_run(argv, Options, Settings, __doc__)
    chip, devices = chip_of(chosen.topology), devices_of(chosen.topology)
    mesh = data_mesh(config.training.trajectories, config.training.micro_batches, devices)
    # What is compiled for a chip that is absent cannot be read from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    plan = Plan(config, chip, mesh, chosen.full_effort)
    phases: dict[str, Phase | str] = {name: plan.compile(name) for name in chosen.phases}
    print(show(plan, phases, f"{chosen.config} on {chosen.topology}"))
    if chosen.fit:
        largest = plan.largest_micro_batch() or "none"
        print(f"largest micro-batch of an update that fits: {largest} trajectories a device")


if __name__ == "__main__":
    main(sys.argv)
