"""A run in several processes, each with its own devices: how they connect, and what they do if one dies."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option

_FIND_EACH_OTHER = 120  # seconds
_SILENCE = 30  # seconds without a heartbeat after which a process counts as dead
_COMPILING = 3600  # seconds that a process waits for others that are alive


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(Checked):
    """The place of this process among several that make one run."""

    distributed: bool = option(
        False, "run as one of several processes, as the cluster says (TPU pod, Slurm, Open MPI, ...)"
    )
    coordinator: str | None = option(None, "HOST:PORT of process 0, for several processes without such a cluster")
    num_processes: int | None = option(None, "with --coordinator, the number of processes", minimum=1)
    process_id: int | None = option(None, "with --coordinator, the number of this process, from 0", minimum=0)


def join(options: ProcessOptions) -> None:
    """Connects this process with the others if the options say so. Call it before any other function of JAX.

    With `--distributed`, TPU pods, Slurm, Open MPI and Kubernetes tell the process its place. Without them,
    `--coordinator=HOST:PORT --num_processes=N --process_id=I` gives it; the coordinator is process 0.

    Raises:
        UserError: the options are incomplete, or the processes do not connect within two minutes.
    """
    explicit = (options.coordinator, options.num_processes, options.process_id)
    asked = [value is not None for value in explicit]
    if not options.distributed and not any(asked):
        return
    if any(asked) and not all(asked):
        raise UserError("several processes need all of --coordinator=HOST:PORT --num_processes=N --process_id=I")
    names = ("coordinator_address", "num_processes", "process_id")
    given: dict[str, Any] = dict(zip(names, explicit, strict=True)) if any(asked) else {}
    try:
        jax.distributed.initialize(**given, initialization_timeout=_FIND_EACH_OTHER, heartbeat_timeout_seconds=_SILENCE)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the processes did not find each other ({reason}); start all of them, or name them") from error


def meet(where: str) -> None:
    """Waits until all processes have reached this point, for up to an hour.

    Call it before a collective operation: these wait only half a minute, and compiling may take one process longer.
    `where` is the barrier's name; use each name once per run.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=1000 * _COMPILING)


def greatest(number: int) -> int:
    """The greatest of the numbers that the processes give. All processes must call it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def is_first() -> bool:
    """Whether this is process 0, which alone writes files."""
    return jax.process_index() == 0


def tell(line: str) -> None:
    """Prints a line to stderr, in one process of the run."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def ending_together() -> Iterator[None]:
    """A context in which an error ends this process immediately, without waiting for the other processes.

    The error that JAX raises when another process has died is reported in one line. JAX itself ends the processes that
    miss the coordinator's heartbeat.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError | UserError):
            reason = " ".join(str(error).split())
            advice = "" if isinstance(error, UserError) else "; start all with the same command, and the run resumes"
            known = "" if isinstance(error, UserError) else "another process is gone or failed: "
            print(f"error: process {jax.process_index()}: {known}{reason[:300]}{advice}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(2)  # a normal exit would wait for all processes
