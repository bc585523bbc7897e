"""Starts the processes of the lines, gives them turns on the device, and records their results."""

import os
import queue
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.accelerator
from benchmarks.accelerator.lines import LINES, SMALL
from benchmarks.accelerator.process import MEASURE, Process
from benchmarks.accelerator.report import Report
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import Checked, option


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The lines to measure, the time limit, and the file for the results."""

    out: Path = option(Path("accelerator.json"), "file for the results", file="output", endings=(".json",))
    seconds: float = option(600.0, "time limit, after which everything is ended", unit="seconds", above=0)
    only: tuple[str, ...] = option((), "lines to measure, instead of all", choices=LINES, empty=True)
    small: bool = option(False, "run only the quicker lines, at sizes that take a minute on a CPU")
    jobs: int = option(0, "processes that prepare simultaneously; 0: half the cores, at least 2", minimum=0)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Measures the lines and writes the report."""
    options = parse(argv, Options, benchmarks.accelerator.__doc__ or "")
    wanted = [name for name in options.only if name] or (SMALL if options.small else LINES)
    names = [name for name in LINES if name in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the child processes are ended
    report = Report(options.out, options.small, names)
    with tempfile.TemporaryDirectory() as cache, options.out.with_suffix(".log").open("a") as log:
        Floor(names, report, options, cache, log).run()
    print(report.table())


class Floor:
    """The processes, and their turns on the device."""

    def __init__(self, names: list[str], report: Report, options: Options, cache: str, log: Any):
        self.report, self.options, self.log = report, options, log
        self.jobs = options.jobs or max(len(os.sched_getaffinity(0)) // 2, 2)
        root = Path(__file__).parents[2]
        paths = (str(root), str(root / "tests"), os.environ.get("PYTHONPATH", ""))
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # many processes share the device
            "XLA_PYTHON_CLIENT_MEM_FRACTION": ".92",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
        }
        self.messages: queue.Queue[tuple[Process, dict[str, Any] | None]] = queue.Queue()
        self.waiting = [(name, "compile" if LINES[name].compiles else MEASURE) for name in names]
        self.running: list[Process] = []  # in the lines' order
        self.turn: Process | None = None
        self.finished: dict[str, dict[str, float]] = {}  # durations of processes that have ended, by line
        self.end = time.monotonic() + options.seconds

    def run(self) -> None:
        """Runs until all lines are done or the time limit is reached."""
        try:
            while (self.waiting or self.running) and time.monotonic() < self.end:
                self._start()
                self._give_turn()
                self._listen()
                self._cut()
        finally:
            for process in self.running:
                self.report.add(process.row("not finished when the time was over"))
                process.kill()
            for name, _ in self.waiting:
                self.report.add({"line": name, "what": "", "numbers": {}, "note": "not begun when the time was over"})
            self.report.finish()

    def _start(self) -> None:
        while self.waiting and sum(p.busy for p in self.running) < self.jobs and not self._alone():
            name, stage = self.waiting.pop(0)
            environment = dict(self.environment)
            if jax_on := LINES[name].jax_on:
                environment["JAX_PLATFORMS"] = jax_on
            self._add(Process(name, stage, self.options.small, environment, self.log, self.messages))

    def _add(self, process: Process) -> None:
        order = list(LINES)
        self.running = sorted([*self.running, process], key=lambda p: order.index(p.name))

    def _alone(self) -> bool:
        return self.turn is not None and LINES[self.turn.name].alone

    def _give_turn(self) -> None:
        ready = [p for p in self.running if p.state == "ready"]
        if self.turn is None and ready:
            self.turn = ready[0]
            if self._alone():
                for process in self.running:
                    if process is not self.turn:
                        process.stop()
            self.turn.go("measuring", self._durations(self.turn))

    def _durations(self, process: Process) -> dict[str, float]:
        """The seconds of the line's states so far, by stage and state."""
        own = {f"{process.stage} {state}": taken for state, taken in process.durations.items()}
        return self.finished.get(process.name, {}) | own

    def _listen(self) -> None:
        try:
            process, message = self.messages.get(timeout=0.5)
        except queue.Empty:
            return
        if message is None:
            self._ended(process)
        elif "row" in message:
            self.report.add(message["row"])
        else:
            self._heard(process, message)

    def _heard(self, process: Process, message: dict[str, Any]) -> None:
        process.enter(message["state"])
        if message["state"] == "lowered" and process.stage == "compile":
            # The measuring process traces while this one compiles, and then waits for it.
            self.waiting.insert(0, (process.name, MEASURE))
            process.go("compiling")
        elif message["state"] == "lowered" and not self._compiling(process.name):
            process.go("loading")

    def _compiling(self, name: str) -> bool:
        return any(p.name == name and p.stage == "compile" for p in self.running)

    def _ended(self, process: Process) -> None:
        if process in self.running:
            self.running.remove(process)
        code = process.popen.wait()
        self.finished[process.name] = self._durations(process)
        if process is self.turn:
            self.turn = None
            for other in self.running:
                other.resume()
        if process.stage == "compile":
            for other in self.running:
                if other.name == process.name and other.state == "lowered":
                    other.go("loading")
        if code and not process.cut:
            self.report.add(process.row(f"ended with exit code {code}"))

    def _cut(self) -> None:
        for process in list(self.running):
            limit = LINES[process.name].limit * (4 if self.options.small else 1)  # CPUs compile slowly
            if process.cut or process.state in ("ready", "lowered") or process.active_seconds() < limit:
                continue
            self.report.add(process.row(f"cut after {limit:.0f} s of {process.state}"))
            for other in self.running:
                if other.name == process.name:
                    other.cut = True
                    other.kill()
            self.waiting = [w for w in self.waiting if w[0] != process.name]
