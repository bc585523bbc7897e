"""The training command with the tests' reward, as a separate process: `python tests/tiny_process.py --config=…`."""

import sys

from tiny_run import brightness, last_of_each

from nabla_gfn_jax import train
from nabla_gfn_jax.rewards import REWARDS


def main() -> None:
    REWARDS["1.0"] = lambda: brightness(1.0)
    train.main([sys.argv[0], *last_of_each(sys.argv[1:])])


if __name__ == "__main__":
    main()
