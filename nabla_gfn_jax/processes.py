"""One run in several processes, each with its devices: how they find each other, and what they do if one dies."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option

_FIND_EACH_OTHER = 120  # seconds
_SILENCE = 30  # seconds without a sign of life after which a process counts as dead
_COMPILING = 3600  # seconds that a process waits for others that are alive


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(Checked):
    """Who this process is, of several that make one run."""

    distributed: bool = option(False, "one process of several: the cluster says which (TPU pod, Slurm, Open MPI, ...)")
    coordinator: str | None = option(None, "the same without a cluster: HOST:PORT of process 0")
    num_processes: int | None = option(None, "with --coordinator, how many processes there are", minimum=1)
    process_id: int | None = option(None, "with --coordinator, which of them this one is, from 0", minimum=0)


def join(options: ProcessOptions) -> None:
    """Makes this process one of several, if the options say so. Before anything else of JAX.

    `--distributed` takes what TPU pods, Slurm, Open MPI and Kubernetes say of the processes;
    `--coordinator=HOST:PORT --num_processes=N --process_id=I` says it, the coordinator being process 0.
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
    """Waits until all processes are here, before what they do together: collectives give each other half a minute, and
    compiling may take one process longer than that. `where` is the barrier's name; use each once per run.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=1000 * _COMPILING)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextmanager
def ending_together() -> Iterator[None]:
    """An error ends this process at once and, where it is one of several, without waiting for the others.

    What JAX raises when another has died is reported in one line. Those that wait for the coordinator's sign of life
    are ended by JAX itself.
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
        os._exit(2)  # the usual exit waits for all processes
