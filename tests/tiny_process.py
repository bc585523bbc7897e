"""The training command with the tests' reward, as a process: `python tests/tiny_process.py --config=…`."""

import sys

from tiny_run import brightness

from nabla_gfn_jax import configuration, train

if __name__ == "__main__":
    configuration.load_reward = lambda name: brightness(float(name))
    train.main(sys.argv)
