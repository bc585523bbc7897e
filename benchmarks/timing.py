"""Times two implementations in turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def compare(what: str, theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[str, str, str, str]:
    """A row of the table. Both functions run once before the timing, and must wait for their results."""
    theirs(), ours()
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(rounds):
        for name, function in (("theirs", theirs), ("ours", ours)):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    a, b = (statistics.median(times[name]) for name in ("theirs", "ours"))
    spread = " to ".join(f"{f(t / o for t, o in zip(*times.values(), strict=True)):.2f}" for f in (min, max))
    return what, f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.2f} ({spread} in {rounds} rounds)"
