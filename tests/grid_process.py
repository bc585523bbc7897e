"""The grid command with the tests' reward, as a separate process that can kill itself as `killed_process` does.

`KILL_AT=file:17 python tests/grid_process.py PATH GRID.toml --out=OUT`, or `KILL_AT=never`.
"""

import os
import sys

from killed_process import arm
from tiny_run import brightness

from nabla_gfn_jax import reproduce
from nabla_gfn_jax.metrics import tilt
from nabla_gfn_jax.rewards import REWARDS

if __name__ == "__main__":
    arm(sys.argv.pop(1), *f"{os.environ['KILL_AT']}:".split(":")[:2])
    REWARDS["1.0"] = lambda: brightness(1.0)
    tilt.REPLICATES = 20
    reproduce.main(["nabla-gfn reproduce", *sys.argv[1:]])
