"""The process that measures one line: it prepares, waits for its turn on the device, measures, and ends.

To the process that started it a worker says JSON lines through what was its standard output: {"state": …} and
{"row": …}. Whatever else is printed goes to the log.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax


class Worker:
    """What a line's function is given."""

    def __init__(self, line: str, small: bool):
        self.line, self.small = line, small
        self._to_parent = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def state(self, name: str, **more: Any) -> None:
        """Says how far this process is."""
        print(json.dumps({"state": name, **more}), file=self._to_parent)

    def row(self, what: str, note: str = "", **numbers: Any) -> None:
        """A row of the table; names of numbers say the unit, "_" standing for a space."""
        named = {name.replace("_", " "): _plain(value) for name, value in numbers.items()}
        row = {"line": self.line, "what": what, "numbers": named, "note": note}
        print(json.dumps({"row": row}), file=self._to_parent)

    def wait(self, state: str) -> dict[str, float]:
        """Says `state`, and waits to be told to go on; returns the seconds of the line's states, "compile tracing"."""
        self.state(state)
        answer = sys.stdin.readline()
        if not answer:
            sys.exit("the parent has ended")
        told: dict[str, float] = json.loads(answer)
        return told

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """What `function` returns; when it fails, a row that says how, and None."""
        try:
            return function()
        except Exception as error:  # of whatever kind: the other rows are wanted still
            self.row(what, note=f"failed: {type(error).__name__}: {_first_line(error)}")
            print(f"{self.line}, {what}: {error!r}", file=sys.stderr)
            return None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else float(value)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def seconds(function: Callable[[], Any], rounds: int = 3, enough: float = 10.0) -> list[float]:
    """Of `rounds` calls, fewer once they have taken `enough` together; one before them is not counted.

    `function` must wait for its result.
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
            raise RuntimeError("JAX has no accelerator here; --small is for a CPU")
        line.run(worker, stage)
    except Exception as error:
        worker.row(stage, note=f"failed: {type(error).__name__}: {_first_line(error)}")
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
