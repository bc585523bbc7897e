"""This program against PyTorch on this machine: `python -m benchmarks [update sampling unet flops start]`.

Both sides of a line run in one process, in turns, on the same weights and inputs, and are first checked to compute the
same; times are medians. `unet` wants 12 GB and ten minutes.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's waiting threads would keep XLA's cores
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the PyTorch statements of the same mathematics

from benchmarks import flops, sampling, start, unet, update

BENCHMARKS = {
    "update": update.run,
    "sampling": sampling.run,
    "unet": unet.run,
    "flops": flops.run,
    "start": start.run,
}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"there is no benchmark {unknown[0]!r}; choose of {', '.join(BENCHMARKS)}")
    print("| what | PyTorch | here | PyTorch / here |\n|---|---|---|---|", flush=True)
    for name in names:
        for row in BENCHMARKS[name]():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
