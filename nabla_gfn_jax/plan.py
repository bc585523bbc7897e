"""Will a run fit, and how long will it take, on devices that are not here.

    python -m nabla_gfn_jax.plan --config=configs/hps.py --topology=v5e:2x4

The run's own sampler and update are compiled for those devices (TPUs by libtpu, extra `[tpu]`; NVIDIA's GPUs, extra
`[plan]`), from the shapes of the weights alone. `--fit` also looks for the largest micro-batch. `--full_effort`
compiles as a run would, which takes hours at Stable Diffusion's size, for the cost model's time; without it a TPU's
memory is within a tenth. `--phases=rollout` compiles that alone. Nothing here is measured on a device.
"""

import sys

import jax

from nabla_gfn_jax.command_line import parse_flags
from nabla_gfn_jax.configuration import check
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.parallel import data_mesh
from nabla_gfn_jax.planning.chips import chip_of, devices_of
from nabla_gfn_jax.planning.phases import PHASES, Plan
from nabla_gfn_jax.planning.table import show


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Configuration → shapes → compiled phases → a table."""
    options: dict[str, str | bool] = {"topology": "v5e:2x4", "phases": ",".join(PHASES)}
    config, chosen = parse_flags(argv, "configs/hps.py", options | {"fit": False, "full_effort": False})
    check(config)
    names = chosen.phases.split(",")
    if not set(names) <= set(PHASES):
        raise UserError(f"--phases={chosen.phases} is unknown; use {', '.join(PHASES)} or both with a comma")
    chip, devices = chip_of(chosen.topology), devices_of(chosen.topology)
    mesh = data_mesh(config.training.trajectories, config.training.micro_batches, devices)
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what is compiled for a chip that is absent cannot be read
    plan = Plan(config, chip, mesh, chosen.full_effort)
    phases = {name: plan.compile(name) for name in names}
    print(show(plan, phases, f"{chosen.config} on {chosen.topology}"))
    if chosen.fit:
        largest = plan.largest_micro_batch() or "none"
        print(f"largest micro-batch of an update that fits: {largest} trajectories a device")


if __name__ == "__main__":
    main(sys.argv)
