"""The lines by name, the most important first."""

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Line:
    """The measurements of one process.

    Attributes:
        module: a module of this package, whose `run(worker, stage, **arguments)` prepares, waits and measures.
        arguments: the arguments of `run`.
        compiles: whether a separate process compiles into the compilation cache first. The measuring process reads the
            cache, so that compilation leaves nothing in the memory of the device.
        alone: whether other processes are stopped while it measures; not needed if no time is measured.
        jax_on: the platform of JAX; "" for the accelerator.
        limit: seconds for preparation and for measurement, each.
    """

    module: str
    arguments: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False
    alone: bool = True
    jax_on: str = ""
    limit: float = 150.0

    def run(self, worker: Any, stage: str) -> None:
        importlib.import_module(f"benchmarks.accelerator.{self.module}").run(worker, stage, **self.arguments)


def _phase(name: str, **fields: Any) -> Line:
    return Line(module="phases", arguments={"name": name, **fields}, compiles=True, limit=240.0)


_ADJOINT = {"algorithm__credit": "adjoint"}
_GUESS = {"algorithm__credit": "guess"}

LINES: dict[str, Line] = {
    "environment": Line(module="environment", limit=60.0),
    "parity_unet": Line(module="parity", arguments={"network": "unet"}, alone=False),
    "parity_vae": Line(module="parity", arguments={"network": "vae"}, alone=False),
    "parity_hps": Line(module="parity", arguments={"network": "hps"}, alone=False),
    "attention": Line(module="attention", limit=60.0),
    "update_guess": _phase("update", **_GUESS),
    "rollout": _phase("rollout", **_GUESS),
    "update": _phase("update"),
    "released": Line(module="released", jax_on="cpu", limit=90.0),
    "precision": Line(module="precision", alone=False, limit=240.0),
    "rollout_adjoint": _phase("rollout", **_ADJOINT),
    "update_adjoint": _phase("update", **_ADJOINT),
    "unet": Line(module="unet"),
    "update_guess_no_remat": _phase("update", training__remat=False, training__trajectories=4, **_GUESS),
    "update_guess_8": _phase("update", training__trajectories=8, **_GUESS),
    "update_guess_32": _phase("update", training__trajectories=32, **_GUESS),
}
# The lines of --small, which take a minute together.
SMALL = ("environment", "parity_unet", "parity_vae", "parity_hps", "attention", "update_guess", "released")
