"""A logger beside `metrics.jsonl`, in a thread of its own, so that it cannot stop or slow a run."""

import queue
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from nabla_gfn_jax.checkpoints.files import reason_of

Write = Callable[[Mapping[str, Any]], None]
Close = Callable[[], None]


class Sink:
    """Gives rows to `write`, one after the other, and calls `close` at the end. The first error ends it with a line."""

    def __init__(self, name: str, write: Write, close: Close):
        self._name, self._write, self._close = name, write, close
        self._rows: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Puts the row into the queue."""
        self._rows.put(dict(row))

    def close(self, patience: float) -> None:
        """Waits until all rows are written, for up to `patience` seconds."""
        self._rows.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            print(f"{self._name} has not taken all rows in {patience:g} s; they are left out", file=sys.stderr)

    def _work(self) -> None:
        try:
            while (row := self._rows.get()) is not None:
                self._write(row)
            self._close()
        except Exception as error:  # libraries raise many kinds
            print(f"{self._name} gets no more rows ({reason_of(error)}); the run goes on", file=sys.stderr)
