"""What a run costs: its trace on request, and the work, time and memory of each epoch for the log."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

from nabla_gfn_jax.flops import flops_of

_TRACED = 2  # epochs


class Trace:
    """A trace of two epochs after the compiling ones, in `workdir/profile`, which TensorBoard and XProf open."""

    def __init__(self, workdir: Path, first: int, last: int, wanted: bool):
        self._folder = workdir / "profile"
        start = min(first + 2, max(last - 1, first))
        self._epochs = range(start, min(start + _TRACED, last + 1)) if wanted else range(0)

    def before(self, epoch: int) -> None:
        if self._epochs and epoch == self._epochs[0]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls crowd the program's operations out of the viewer
            jax.profiler.start_trace(self._folder, profiler_options=options)

    def after(self, epoch: int) -> None:
        if self._epochs and epoch == self._epochs[-1]:
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                print(f"trace of epochs {self._epochs[0]} to {epoch}: {self._folder}")


def peak_memory() -> int:
    """Bytes: the most that one of this process's devices has held so far; on a CPU, the process."""
    stats: list[dict[str, Any] | None] = [device.memory_stats() for device in jax.local_devices()]
    held = [int(s["peak_bytes_in_use"]) for s in stats if s and "peak_bytes_in_use" in s]
    if held:
        return max(held)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """An epoch's time, and what its compiled functions do in it."""

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}  # of one call, by name
        self._start, self._done = time.time(), 0.0

    def start(self) -> None:
        """An epoch begins."""
        self._start, self._done = time.time(), 0.0

    def know(self, name: str, traced: Any) -> None:
        """What one call of a traced function does, under its name."""
        self._flops[name] = sum(flops_of(traced.jaxpr).values())

    def call(self, name: str) -> None:
        """Counts a call of a function that is known."""
        self._done += self._flops[name]

    def numbers(self, images: int) -> dict[str, float]:
        """Of the epoch that ends: its seconds, images sampled a second, FLOPs a second of one device, and the peak of a
        device's memory so far in GiB."""
        seconds = time.time() - self._start
        return {
            "seconds": seconds,
            "images_per_second": images / seconds,
            "flops_per_second": self._done / seconds,
            "device_memory_gib": peak_memory() / 2**30,
        }
