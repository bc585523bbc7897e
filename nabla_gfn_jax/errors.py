"""The one exception a user is meant to see."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

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
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapper
