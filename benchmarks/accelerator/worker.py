"""The process that measures one line: it prepares, waits for its turn on the device, measures, and ends.

A worker sends JSON lines to its parent through its original standard output: {"state": …} and {"row": …}. All other
output goes to the log.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax


class Worker:
    """The interface between a line's function and the parent process."""

    def __init__(self, line: str, small: bool):
        self.line, self.small = line, small
        self._to_parent = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def state(self, name: str, **more: Any) -> None:
        """Reports the state of this process."""
        print(json.dumps({"state": name, **more}), file=self._to_parent)

    def row(self, what: str, note: str = "", **numbers: Any) -> None:
        """Reports a row of the table. The name of a number states its unit; "_" stands for a space."""
        named = {name.replace("_", " "): _plain(value) for name, value in numbers.items()}
        row = {"line": self.line, "what": what, "numbers": named, "note": note}
        print(json.dumps({"row": row}), file=self._to_parent)

    def wait(self, state: str) -> dict[str, float]:
        """Reports `state` and waits for permission to continue. Returns the seconds of the line's states by name, such
        as "compile tracing".
        """
        self.state(state)
        answer = sys.stdin.readline()
        if not answer:
            sys.exit("the parent has ended")
        told: dict[str, float] = json.loads(answer)
        return told

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """The result of `function`. If it fails, reports a row with the error and returns None."""
        try:
            return function()
        except Exception as error:  # any error, so that the other rows are still measured
            kind = "not supported" if isinstance(error, NotImplementedError) else f"failed: {type(error).__name__}"
            self.row(what, note=f"{kind}: {_first_line(error)}")
            print(f"{self.line}, {what}: {error!r}", file=sys.stderr)
            return None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else float(value)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def seconds(function: Callable[[], Any], rounds: int = 3, enough: float = 10.0) -> list[float]:
    """The seconds of each of `rounds` calls, or of fewer if they take `enough` seconds together.

    One more call before them is not counted. `function` must wait for its result.
    """
    function()
    times: list[float] = []
    while len(times) < rounds and sum(times) < enough:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def main(argv: list[str]) -> None:
    """`python -m benchmarks.accelerator.worker LINE STAGE [small]`."""
    from benchmarks.accelerator.lines import LINES

    name, stage, *small = argv
    worker = Worker(name, bool(small))
    line = LINES[name]
    worker.state("preparing")
    try:
        if not worker.small and not line.jax_on and jax.default_backend() == "cpu":
            raise RuntimeError("JAX finds no accelerator; use --small on a CPU")
        line.run(worker, stage)
    except Exception as error:
        worker.row(stage, note=f"failed: {type(error).__name__}: {_first_line(error)}")
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
