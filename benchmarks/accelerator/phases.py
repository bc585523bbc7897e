"""Measures a phase of the run as `train` compiles it: time, work, memory, compilation, and time by kind of kernel."""

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.sizes import Size, Weights, chip_of, phase
from benchmarks.accelerator.worker import Worker, seconds
from nabla_gfn_jax.flops import FULL, flops_of
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, place
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.profiling import peak_memory
from nabla_gfn_jax.training.trainer import BY_UPDATE

_GIB = 2**30
# The estimate of `plan` in docs/scaling.md: configs/hps.py on one A100, micro-batches of 16, jax 0.10.2.
_PLANNED = {"rollout": 11.30, "update": 41.51}
# Kinds of GPU kernels by their names; the first match counts.
_KINDS = {
    "attention": "flash|fmha|sdpa|softmax|attention",
    "convolution": "conv|dgrad|wgrad|fprop|implicit",
    "float32 product": "sgemm|f32f32|f32_f32|simt",
    "product": "gemm|nvjet|cutlass|dot|cublas|xmma",
    "copy": "memcpy|memset|copy|transpose",
    "other fusions": "fusion|reduce|loop",
}


def run(worker: Worker, stage: str, name: str, **fields: Any) -> None:
    """Measures `configs/hps.py` with one micro-batch and with `fields`."""
    size = Size(worker.small)
    config = size.config(**fields)
    pieces = size.pieces(config)
    function, shapes = phase(name, config, pieces)
    worker.state("tracing")
    traced = function.trace(*shapes)
    lowered = traced.lower()
    options = {"xla_backend_optimization_level": 0} if worker.small else {}
    if stage == "compile":
        worker.wait("lowered")
        lowered.compile(compiler_options=options)
        worker.state("compiled")
        return
    worker.state("making weights")
    arguments = Weights().arguments(name, pieces, shapes)
    worker.wait("lowered")
    compiled = lowered.compile(compiler_options=options)
    told = worker.wait("ready")
    what = f"{name}, {config.algorithm.credit}, {config.training.trajectories} trajectories"
    if not config.training.remat:
        what += ", no remat"
    memory = compiled.memory_analysis()
    planned = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    worker.row(
        f"{what}: memory by the compiler",
        **{f"{part}_GiB": value / _GIB for part, value in planned.items()},
        peak_GiB=sum(planned.values()) / _GIB,
    )
    worker.row(
        f"{what}: compiling",
        tracing_seconds=told.get("compile tracing"),
        cold_seconds=told.get("compile compiling"),
        from_cache_seconds=told.get("measure loading"),
        note="others compiled at the same time",
    )
    call = Call(compiled, name, arguments, pieces.mesh)
    taken = seconds(call, rounds=3, enough=8.0)
    _time_row(worker, what, name, config, flops_of(traced.jaxpr), taken)
    worker.row(
        f"{what}: memory of the device",
        peak_GiB=peak_memory() / _GIB,
        plan_said_GiB=_PLANNED.get(name) if config.algorithm.credit == "lookahead" or name == "rollout" else None,
    )
    worker.row(f"{what}: results", note="finite" if call.finite() else "NOT finite")
    if fields.get("training__trajectories") is None:
        worker.attempt(f"{what}: kernels", lambda: _kernels(worker, what, call))


class Call:
    """The compiled phase with its arguments on the device.

    A call waits for the result; an update keeps its new state.
    """

    def __init__(self, compiled: Any, name: str, arguments: tuple[Any, ...], mesh: Any):
        specs = (EVERYWHERE, EVERYWHERE, SPLIT if name == "rollout" else BY_UPDATE, SPLIT)
        self._arguments = [place(a, mesh, spec) for a, spec in zip(arguments, specs, strict=True)]
        self._compiled, self._updates = compiled, name == "update"
        self._result: Any = None

    def __call__(self) -> None:
        self._result = jax.block_until_ready(self._compiled(*self._arguments))
        if self._updates:
            self._arguments[1] = self._result[0]

    def finite(self) -> bool:
        """Whether the last result is finite."""
        kept = self._result[1] if self._updates else self._result.scalars
        return all(bool(np.isfinite(np.asarray(leaf, np.float32)).all()) for leaf in jax.tree.leaves(kept))


def _time_row(
    worker: Worker, what: str, name: str, config: Settings, flops: dict[str, float], taken: list[float]
) -> None:
    chip, best = chip_of(jax.local_devices()[0]), min(taken)
    full = flops.get(FULL, 0.0)
    rounded = sum(flops.values()) - full
    trajectories = config.training.trajectories
    transitions = 1 + config.algorithm.bins(config.sampling.num_steps)
    least = rounded / chip.flops + full / chip.float32_flops if chip else None
    each = {"seconds a transition": best / trajectories / transitions} if name == "update" else {}
    if name == "rollout":
        each = {"seconds an image": best / trajectories}
    worker.row(
        what,
        seconds=best,
        slowest_seconds=max(taken),
        calls=len(taken),
        images_a_second=trajectories / best,
        TFLOP=rounded / 1e12,
        TFLOP_in_full_float32=full / 1e12,
        TFLOP_a_second=sum(flops.values()) / best / 1e12,
        least_seconds_by_the_data_sheet=least,
        share_of_the_peak=f"{least / best:.0%}" if least else None,
        **each,
    )


def _kernels(worker: Worker, what: str, call: Call) -> None:
    """Traces one call. Reports the time of the device's operations by kind, and the longest operations."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        file = next(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                times[event.name] += event.duration_ns
                calls[event.name] += 1
    total = sum(times.values())
    if not total:
        worker.row(f"{what}: kernels", note="the trace has none")
        return
    kinds: Counter[str] = Counter()
    for kernel, time in times.items():
        kinds[next((kind for kind, names in _KINDS.items() if re.search(names, kernel, re.I)), "other")] += time
    shares = {kind: f"{time / total:.1%}" for kind, time in kinds.most_common()}
    worker.row(f"{what}: kernels", seconds=total / 1e9, kernels=sum(calls.values()), **shares)
    for kernel, time in times.most_common(12):
        worker.row(
            f"{what}: kernel {kernel[:90]}", seconds=time / 1e9, calls=calls[kernel], share=f"{time / total:.1%}"
        )
