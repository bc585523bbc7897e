"""This program against PyTorch on this machine: `python -m benchmarks [update sampling unet flops start]`.

Both sides of a line run in one process, in turns, on the same weights and inputs, and are first checked to compute the
same; times are medians. `unet` wants 12 GB and ten minutes.

`python -m benchmarks accelerator`, with options of its own, measures the true sizes on an accelerator.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import Checked, option

BENCHMARKS = ("update", "sampling", "unet", "flops", "start")  # each a module here, with a function `run`


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Which are run."""

    benchmark: tuple[str, ...] = option(BENCHMARKS, "which to run", choices=BENCHMARKS, positional=True)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prints the rows of each benchmark as they come."""
    if argv[1:2] == ["accelerator"]:
        importlib.import_module("benchmarks.accelerator.command").main(argv[1:])
        return
    names = parse(argv, Options, __doc__).benchmark
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's waiting threads would keep XLA's cores
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the PyTorch statements of the same mathematics
    print("| what | PyTorch | here | PyTorch / here |\n|---|---|---|---|", flush=True)
    for name in names:
        for row in importlib.import_module(f"benchmarks.{name}").run():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv)
