"""The program `nabla-gfn COMMAND ...`, also `python -m nabla_gfn_jax COMMAND ...`."""

import importlib
import sys

from nabla_gfn_jax import __version__
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.options import did_you_mean

COMMANDS = {
    "train": "finetune a model with a reward",
    "sample": "sample images",
    "evaluate": "measure reward, nats and diversity",
    "report": "write one HTML file: curves, pictures over the updates, reward against nats",
    "reproduce": "run a grid of methods, seeds and configs, and write their results",
    "plan": "estimate the memory and the time of a run on a device",
    "pretrain": "train the emoji model that ships with the package",
}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    command, *rest = (sys.argv if argv is None else argv)[1:] or ["--help"]
    if command in ("-h", "--help"):
        names = "\n".join(f"  {name.ljust(10)}{meaning}" for name, meaning in COMMANDS.items())
        print(f"usage: nabla-gfn COMMAND [--OPTION=VALUE ...]\n\n{names}\n\nnabla-gfn COMMAND --help says more.")
    elif command == "--version":
        print(__version__)
    elif command not in COMMANDS:
        near = did_you_mean(command, COMMANDS)
        raise UserError(f"there is no command {command!r}{near}; the commands are {', '.join(COMMANDS)}")
    else:
        importlib.import_module(f"nabla_gfn_jax.{command}").main([f"nabla-gfn {command}", *rest])


if __name__ == "__main__":
    main(sys.argv)
