"""Reports the device and the versions, and measures two upper bounds: matrix products and copies."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.sizes import chip_of
from benchmarks.accelerator.worker import Worker, seconds

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy")
_THEIRS = ("torch", "diffusers", "transformers", "peft")


def run(worker: Worker, stage: str) -> None:
    """Reports device and versions, and measures products and copies."""
    device = jax.local_devices()[0]
    worker.wait("ready")
    memory = device.memory_stats() or {}
    worker.row(
        "device",
        kind=device.device_kind,
        platform=device.platform,
        devices=len(jax.devices()),
        driver=_driver(),
        memory_GiB=memory.get("bytes_limit", 0) / 2**30 or None,
        cores=len(os.sched_getaffinity(0)),
        processor=platform.machine(),
    )
    versions = {name: _version(name) for name in (*_PACKAGES, *_THEIRS)}
    worker.row("versions", python=platform.python_version(), **{k: v for k, v in versions.items() if v})
    worker.attempt("matrix product", lambda: _products(worker, device))
    worker.attempt("copy", lambda: _copy(worker))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _products(worker: Worker, device: Any) -> None:
    """Measures products of random square matrices, the highest rate that the products of a network can reach."""
    size, chip = (256 if worker.small else 8192), chip_of(device)
    for dtype, precision in (("bfloat16", None), ("float32", None), ("float32", "highest")):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        product = jax.jit(lambda a, b, precision=precision: jnp.matmul(a, b, precision=precision))
        taken = min(seconds(lambda a=a, b=b, f=product: jax.block_until_ready(f(a, b)), rounds=10, enough=2))
        rate = 2 * size**3 / taken
        peak = (chip.flops if dtype == "bfloat16" else chip.float32_flops) if chip else None
        worker.row(
            f"{size}² matrix product, {dtype}{', highest precision' if precision else ''}",
            seconds=taken,
            TFLOP_a_second=rate / 1e12,
            of_the_data_sheet=f"{rate / peak:.0%}" if peak else None,
        )


def _copy(worker: Worker) -> None:
    count = 2**20 if worker.small else 2**31
    x = jnp.ones(count, jnp.bfloat16)
    double = jax.jit(lambda x: x + x)
    taken = min(seconds(lambda: jax.block_until_ready(double(x)), rounds=10, enough=2))
    worker.row("reading and writing memory", seconds=taken, GB_a_second=2 * x.nbytes / taken / 1e9)
