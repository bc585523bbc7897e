"""Accelerators that need not be attached: their specifications from data sheets, and devices to compile for."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies

from nabla_gfn_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device. `memory` is what a program may use: for GPUs 90 %, with XLA_PYTHON_CLIENT_MEM_FRACTION=.9."""

    kind: Literal["tpu", "gpu"]
    memory: float  # bytes
    flops: float  # in bfloat16, FLOP/s
    float32_flops: float  # in full float32, FLOP/s; a TPU computes it with six bfloat16 products
    bandwidth: float  # of the memory, bytes/s
    clock: float | None = None  # of the cycles that the compiler estimates, 1/s; None if it is not published
    environment: str = ""  # TPU_ACCELERATOR_TYPE


CHIPS = {
    "v4": Chip(
        kind="tpu",
        memory=30.75 * GIB,
        flops=275e12,
        float32_flops=275e12 / 6,
        bandwidth=1.2e12,
        clock=1.05e9,
        environment="v4-8",
    ),
    "v5e": Chip(
        kind="tpu",
        memory=15.75 * GIB,
        flops=197e12,
        float32_flops=197e12 / 6,
        bandwidth=819e9,
        clock=1.5e9,
        environment="v5litepod-8",
    ),
    "v5p": Chip(
        kind="tpu",
        memory=95.74 * GIB,
        flops=459e12,
        float32_flops=459e12 / 6,
        bandwidth=2765e9,
        clock=1.75e9,
        environment="v5p-8",
    ),
    "v6e": Chip(
        kind="tpu", memory=31.25 * GIB, flops=918e12, float32_flops=918e12 / 6, bandwidth=1640e9, environment="v6e-8"
    ),
    "a100": Chip(kind="gpu", memory=72 * GIB, flops=312e12, float32_flops=19.5e12, bandwidth=2.039e12),
    "h100": Chip(kind="gpu", memory=72 * GIB, flops=989e12, float32_flops=67e12, bandwidth=3.35e12),
}
_EXAMPLES = "v4:2x2x1, v5e:2x4, v5e:1x1, v5p:2x2x2, v6e:2x4, a100:8, h100:1"

# NVIDIA's data sheets in the compiler's format (stream_executor's GpuTargetConfigProto).
_GPU = """gpu_device_info {{
  cuda_compute_capability {{ major: {major} }} core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  device_memory_size: 85899345920 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}} platform_name: "CUDA" """
_GPUS: dict[str, dict[str, Any]] = {
    "a100": {
        "major": 8,
        "cores": 108,
        "units": 64,
        "clock": 1.41,
        "bandwidth": 2039000000000,
        "cache": 41943040,
        "shared": 166912,
        "shared_core": 167936,
    },
    "h100": {
        "major": 9,
        "cores": 132,
        "units": 128,
        "clock": 1.98,
        "bandwidth": 3350000000000,
        "cache": 52428800,
        "shared": 232448,
        "shared_core": 233472,
    },
}


def chip_of(topology: str) -> Chip:
    """The chip of `topology`, such as "v5e:2x4" or "a100:8". Raises `UserError` for an unknown chip."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(f"topology {topology!r} is unknown; write it like {_EXAMPLES}")
    return CHIPS[name]


def devices_of(topology: str) -> np.ndarray:
    """Compile-only devices as a one-dimensional array.

    The topology of TPUs is CHIP:XxY (v5e, v6e) or CHIP:XxYxZ (v4, v5p), that of GPUs CHIP:GPUS or CHIP:HOSTSxGPUS. Call
    this before anything is compiled for a TPU, because its compiler reads the environment only once.

    Raises:
        UserError: the topology does not exist, or its compiler is not installed.
    """
    chip = chip_of(topology)
    name, _, shape = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")
    try:
        if chip.kind == "gpu":
            hosts, _, gpus = shape.rpartition("x")
            spec = _GPU.format(**_GPUS[name])
            described = topologies.get_topology_desc(
                platform="cuda", target_config=spec, topology=f"1x{int(hosts or 1)}x{int(gpus)}"
            )
        else:
            described = _describe_tpu(name, shape, chip)
    except UserError:
        raise
    except Exception as error:  # the compilers' plugins raise many kinds
        needs = (
            "libtpu (pip install 'nabla_gfn_jax[tpu]')" if chip.kind == "tpu" else "pip install 'nabla_gfn_jax[plan]'"
        )
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot compile for topology {topology!r} ({reason}); names are like {_EXAMPLES}, and the compiler is "
            f"{needs}"
        ) from error
    return np.asarray(described.devices)


def _describe_tpu(name: str, shape: str, chip: Chip) -> Any:
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip.environment,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=4194304",  # some attention overflows the default
    }
    os.environ.update({key: os.environ.get(key, value) for key, value in environment.items()})
    options: dict[str, Any] = {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # the chip's two cores as one device
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **options)
