"""Data parallelism over one axis of devices, "data": every batch is split over it, and every parameter replicated."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nabla_gfn_jax.errors import UserError

AXIS = "data"
EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)


def use_cpu_cores(batch: int) -> None:
    """Makes each CPU core a device, up to the largest number that divides `batch`.

    One device leaves cores idle on small models. Call this before any other function of JAX. If JAX_NUM_CPU_DEVICES is
    set, it decides instead; set it if several processes share the cores of a machine. GPUs and TPUs are not affected.
    """
    if jax.config.jax_num_cpu_devices > 0:  # type: ignore[attr-defined]
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, max(cores, 1) + 1) if batch % n == 0))


def require_devices() -> None:
    """Raises `UserError` if JAX_PLATFORMS names a platform of which JAX finds no device."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # CUDA without a GPU is an assertion, of jax 0.10
        named = jax.config.jax_platforms  # type: ignore[attr-defined]
        if not named:
            raise
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS = {named!r}; unset it, or install JAX for this platform"
        ) from None


def data_mesh(trajectories: int, micro_batches: int, devices: np.ndarray | None = None) -> Mesh:
    """A mesh of all devices, or of those given, along one axis.

    Raises `UserError` if the trajectories cannot be split over micro-batches and devices.
    """
    mesh = all_devices() if devices is None else Mesh(devices, (AXIS,))
    unit = micro_batches * mesh.size
    if micro_batches < 1 or trajectories < 1 or trajectories % unit:
        below = trajectories // unit * unit if micro_batches > 0 else 0
        nearest = " or ".join(str(n) for n in (below, below + unit) if n > 0)
        raise UserError(
            f"training.trajectories = {trajectories} cannot be split into training.micro_batches = {micro_batches} on "
            f"each of {mesh.size} device{'s' * (mesh.size > 1)}; use {nearest} trajectories, or fewer micro-batches"
        )
    return mesh


def all_devices() -> Mesh:
    """A mesh of all devices along one axis."""
    return jax.make_mesh((len(jax.devices()),), (AXIS,), axis_types=(AxisType.Auto,))


def host_memory() -> AbstractContextManager[Any]:
    """A context in which new arrays stay in the host's memory until `place`, so that no device holds them twice."""
    if jax.default_backend() == "cpu":
        return nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names only the accelerator
        return nullcontext()


def split(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any, **options: Any) -> Any:
    """`function` compiled to run on each device with the device's part of the inputs.

    `inputs` and `outputs` are partition specs; `options` are those of `jax.jit`. `check_vma` is off, because a checked
    map would sum every gradient over the devices, and so once in every micro-batch.
    """
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False), **options)


def place(tree: Any, mesh: Mesh, spec: PartitionSpec = EVERYWHERE) -> Any:
    """The arrays of `tree` on the mesh's devices: replicated, or split by `spec`.

    All processes give the same arrays.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def spread(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(spread(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(spread, tree)


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec = EVERYWHERE) -> Any:
    """The shapes, types and shardings that `place` would give to the arrays of `tree`."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def gather(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """The whole of an array that is split over the devices, as NumPy, in every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, EVERYWHERE))(array))
