"""Measures the released program's transition step and sampling in PyTorch on the same device, for the speed ratio.

The program is written from the equations (`benchmarks/naive_loss.py`), with UNet and VAE in bfloat16 and the reward in
float32.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import torch

from benchmarks.accelerator import torch_networks
from benchmarks.accelerator.sizes import Size, Weights, phase
from benchmarks.accelerator.worker import Worker, seconds
from benchmarks.naive_loss import Batch, loss_terms
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.settings import Settings

_TOGETHER = (4, 2, 1)  # numbers of transitions to try; the largest that fits is used
_ROLLOUT_STEPS = 5  # number of timed steps
Take = Callable[[int], Batch]  # n → the first n transitions


def run(worker: Worker, stage: str) -> None:
    """Measures the seconds of a transition, and of the 50 steps of an image."""
    size = Size(worker.small)
    config = size.config()
    pieces = size.pieces(config)
    arguments = Weights().arguments("update", pieces, phase("update", config, pieces)[1])
    frozen, state, transitions, _ = arguments
    ordinary = flatten(jax.tree.map(lambda a: a[0], transitions.ordinary))
    take = partial(torch_networks.batch_of, ordinary, pieces.chain, frozen["table"])
    worker.wait("ready")
    program = torch_networks.Program(size, config, frozen, state.params, torch.bfloat16)
    for tf32 in (False, True):
        torch_networks.use_tf32(tf32)
        rounding = "tf32" if tf32 else "full float32"
        worker.attempt(f"update, reward in {rounding}", lambda r=rounding: _update(worker, program, config, take, r))
    worker.attempt("sampling", lambda: _sampling(worker, program, config, take))


def _update(worker: Worker, program: torch_networks.Program, config: Settings, take: Take, rounding: str) -> None:
    for count in _TOGETHER:
        c = take(count)

        def step(c: Batch = c) -> None:
            terms = loss_terms(program.networks, config.algorithm, c)
            torch.stack(list(terms.values())).sum(0).mean().backward()
            torch_networks.wait()

        try:
            taken = min(seconds(step, rounds=3, enough=5.0))
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    else:
        raise MemoryError("a single transition does not fit")
    worker.row(
        f"update in PyTorch, reward in {rounding}, {count} transitions at once",
        seconds=taken,
        seconds_a_transition=taken / count,
        peak_GiB=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    )


@torch.no_grad()
def _sampling(worker: Worker, program: torch_networks.Program, config: Settings, take: Take) -> None:
    images = min(config.training.trajectories, 4 if worker.small else 16)
    c = take(images)
    predict = lambda: (program.networks.predict(c["x"], c["t"], c, False), torch_networks.wait())  # noqa: E731
    predict()
    start = time.perf_counter()
    for _ in range(_ROLLOUT_STEPS):
        predict()
    taken = (time.perf_counter() - start) / _ROLLOUT_STEPS
    worker.row(
        f"a guided step in PyTorch, {images} images",
        seconds=taken,
        seconds_an_image=taken * config.sampling.num_steps / images,
        note="the VAE and the reward not counted",
    )
