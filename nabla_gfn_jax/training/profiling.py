"""Measures the cost of a run: the work, time and memory of each epoch, and a trace on request."""

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nabla_gfn_jax.flops import flops_of

_TRACED = 2  # epochs


class Trace:
    """A trace of two epochs after compilation, in `workdir/profile`, for TensorBoard or XProf."""

    def __init__(self, workdir: Path, first: int, last: int, wanted: bool):
        self._folder = workdir / "profile"
        start = min(first + 2, max(last - 1, first))
        self._epochs = range(start, min(start + _TRACED, last + 1)) if wanted else range(0)

    def before(self, epoch: int) -> None:
        """Starts the trace if `epoch` is its first."""
        if self._epochs and epoch == self._epochs[0]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would hide the program's operations in the viewer
            jax.profiler.start_trace(self._folder, profiler_options=options)

    def after(self, epoch: int) -> None:
        """Ends the trace if `epoch` was its last, and prints its folder."""
        if self._epochs and epoch == self._epochs[-1]:
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                print(f"trace of epochs {self._epochs[0]} to {epoch}: {self._folder}")


def peak_memory() -> int:
    """The largest memory, in bytes, that a device of this process has used so far; on a CPU, that of the process."""
    stats: list[dict[str, Any] | None] = [device.memory_stats() for device in jax.local_devices()]
    held = [int(s["peak_bytes_in_use"]) for s in stats if s and "peak_bytes_in_use" in s]
    if held:
        return max(held)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """The time that a run takes in all of its starts together. Work that a crash lost is not counted."""

    def __init__(self, about: Mapping[str, Any], devices: int, begun: float):
        """`about`: what a checkpoint says about the run, {} for a new run. `begun`: when this start did, monotonic."""
        self._seconds, self._device_seconds = (float(about.get(name, 0.0)) for name in ("seconds", "device_seconds"))
        self._devices, self._start = devices, begun

    @property
    def about(self) -> dict[str, float]:
        """What a checkpoint says."""
        here = time.monotonic() - self._start
        return {"seconds": self._seconds + here, "device_seconds": self._device_seconds + self._devices * here}

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.about["seconds"]

    @property
    def device_hours(self) -> float:
        """Hours so far, multiplied by the number of devices."""
        return self.about["device_seconds"] / 3600


class Meter:
    """Measures the time of an epoch and counts the FLOPs of its compiled functions."""

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}  # of one call, by name
        self._start, self._done = time.monotonic(), 0.0

    def start(self) -> None:
        """Starts the measurement of an epoch."""
        self._start, self._done = time.monotonic(), 0.0

    def know(self, name: str, traced: Any) -> None:
        """Stores the FLOPs of one call of a traced function under `name`."""
        self._flops[name] = sum(flops_of(traced.jaxpr).values())

    def call(self, name: str) -> None:
        """Counts one call of a function whose FLOPs are stored."""
        self._done += self._flops[name]

    def numbers(self, images: int) -> dict[str, float]:
        """The columns of the log for an epoch that sampled `images` images.

        These are the seconds, images per second, FLOPs per second of one device, and peak memory of a device in GiB.
        """
        seconds = time.monotonic() - self._start
        return {
            "seconds": seconds,
            "images_per_second": images / seconds,
            "flops_per_second": self._done / seconds,
            "device_memory_gib": peak_memory() / 2**30,
        }
