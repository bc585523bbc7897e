"""Compares this package with PyTorch on this machine: `python -m benchmarks [update sampling unet flops start
checkpoint]`.

Both programs run in one process, in turns, with the same weights and inputs. The benchmark first checks that they
compute the same. Times are medians. `unet` needs 12 GB and ten minutes.

`python -m benchmarks accelerator`, which has its own options, measures full-size models on an accelerator.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import Checked, option

BENCHMARKS = ("update", "sampling", "unet", "flops", "start", "checkpoint")  # each a module here, with a function `run`


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The benchmarks to run."""

    benchmark: tuple[str, ...] = option(BENCHMARKS, "the benchmarks to run", choices=BENCHMARKS, positional=True)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prints the rows of each benchmark as soon as they are measured."""
    if argv[1:2] == ["accelerator"]:
        importlib.import_module("benchmarks.accelerator.command").main(argv[1:])
        return
    names = parse(argv, Options, __doc__).benchmark
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # otherwise PyTorch's waiting threads occupy XLA's cores
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the PyTorch statements of the same mathematics
    print("| what | PyTorch | here | PyTorch / here |\n|---|---|---|---|", flush=True)
    for name in names:
        for row in importlib.import_module(f"benchmarks.{name}").run():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv)
