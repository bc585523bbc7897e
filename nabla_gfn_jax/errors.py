"""The exception for errors that a user can correct."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """An error that the user can correct. Its text is one line that names the cause and the remedy.

    The text may quote a file. Line ends and other characters that do not print, which could confuse a terminal, are
    shown as escapes.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


def exit_on_user_error(main: Callable[P, None]) -> Callable[P, None]:
    """Decorates a command: a `UserError` becomes one line on stderr and exit code 2."""

    @wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            _exit(str(error))
        except Exception as error:  # JAX wraps a `UserError` raised in a callback into the text of another exception
            _, raised, text = str(error).rpartition(f"{UserError.__name__}: ")
            if not raised:
                raise
            _exit(text.splitlines()[0])

    return wrapper


def _exit(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
