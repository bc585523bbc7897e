"""The one exception a user is meant to see."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Something the user can put right. Its text is one line that names the thing and the remedy."""


def exit_on_user_error(main: Callable[P, None]) -> Callable[P, None]:
    """Turns a `UserError` inside a command into one line on stderr and exit code 2."""

    @wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            _exit(str(error))
        except Exception as error:  # one that was raised in a callback comes out of JAX as another's text
            _, raised, text = str(error).rpartition(f"{UserError.__name__}: ")
            if not raised:
                raise
            _exit(text.splitlines()[0])

    return wrapper


def _exit(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)
