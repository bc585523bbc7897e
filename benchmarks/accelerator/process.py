"""A worker process, controlled by its parent."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

MEASURE = "measure"


class Process:
    """A worker that can be started, read, stopped, resumed and ended."""

    def __init__(
        self, name: str, stage: str, small: bool, environment: dict[str, str], log: Any, messages: "queue.Queue[Any]"
    ):
        self.name, self.stage, self.state, self.cut = name, stage, "starting", False
        self._entered, self._stopped_at, self._stopped = time.monotonic(), 0.0, 0.0
        self.durations: dict[str, float] = {}  # seconds of each state so far
        command = [sys.executable, "-m", "benchmarks.accelerator.worker", name, stage, *(["small"] if small else [])]
        self.popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,  # so that its child processes stop and end with it
        )
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()

    def _listen(self, messages: "queue.Queue[Any]") -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            messages.put((self, json.loads(line)))
        messages.put((self, None))

    @property
    def busy(self) -> bool:
        """Whether it uses a processor, and is not waiting for its turn or for another process that compiles."""
        return self.state not in ("ready", "lowered", "measuring") or self.stage == "compile"

    def enter(self, state: str) -> None:
        """Records that the worker has entered another state."""
        self.durations[self.state] = self.active_seconds()
        self.state, self._entered, self._stopped = state, time.monotonic(), 0.0

    def active_seconds(self) -> float:
        """The seconds in the present state, without the time for which it was stopped."""
        now = time.monotonic()
        return now - self._entered - self._stopped - (now - self._stopped_at if self._stopped_at else 0.0)

    def go(self, state: str, told: dict[str, float] | None = None) -> None:
        """Lets the worker continue, and sends it the seconds of its line's states."""
        self.enter(state)
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # the worker has ended, which is noticed elsewhere
            print(json.dumps(told or {}), file=self.popen.stdin, flush=True)

    def stop(self) -> None:
        """Stops the worker until `resume`."""
        if not self._stopped_at:
            self._signal(signal.SIGSTOP)
            self._stopped_at = time.monotonic()

    def resume(self) -> None:
        if self._stopped_at:
            self._signal(signal.SIGCONT)
            self._stopped += time.monotonic() - self._stopped_at
            self._stopped_at = 0.0

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def row(self, note: str) -> dict[str, Any]:
        """A row of the table about the end of the worker."""
        return {"line": self.name, "what": self.stage, "numbers": {}, "note": note}

    def _signal(self, which: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, which)
