"""How many images fit into memory: what a compiled program needs, and the memory that there is."""

from pathlib import Path
from typing import Any

import jax

_SHARE = 0.8  # of the free memory that a program may take
_FREE = "MemAvailable:"
_CGROUP = Path("/sys/fs/cgroup")  # version 2; limits of a container


def fits(compiled: Any, devices: int) -> bool:
    """Whether a program for CPUs can allocate its temporaries and results. True if the free memory is unknown.

    Each of `devices` parts of a CPU has arrays of its own.
    """
    free, sizes = free_memory(), compiled.memory_analysis()
    if free is None or sizes is None:
        return True
    return bool((sizes.temp_size_in_bytes + sizes.output_size_in_bytes) * devices <= _SHARE * free)


def free_memory() -> int | None:
    """Bytes of the machine's or the container's memory that are free; None if the system does not say."""
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(_FREE)), None)
    except (OSError, ValueError):
        return None


def _of_container() -> int | None:
    try:
        most, now = ((_CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return max(0, int(most) - int(now))
    except (OSError, ValueError):  # "max": no limit
        return None
