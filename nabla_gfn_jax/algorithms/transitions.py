"""Transitions x → y of sampled trajectories, and which of them are trained on."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from nabla_gfn_jax.diffusion.sampler import Trajectory
from nabla_gfn_jax.diffusion.schedule import Schedule
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Latents, PRNGKeys

_SELECTION = 1_000_000  # folded into the sample's key: a stream apart from the sampler's, which counts steps


@flax.struct.dataclass
class AdjointCredit:
    """What the adjoint pass leaves of every step of a trajectory, leaves (T, B, …)."""

    gradient: Latents  # a_{t+1}: the credit at y
    base_prediction: Latents  # ε_#(x, t), which the loss then need not evaluate again


@flax.struct.dataclass
class Transition:
    """Steps x → y, any leading axes."""

    x: Latents
    y: Latents
    noise_prediction: Latents  # ε_θ†(x, t), by the parameters θ† that sampled
    step: Schedule
    condition: PyTree[Any]
    adjoint: AdjointCredit | None  # None under the lookahead credits


@flax.struct.dataclass
class Transitions:
    """The last step apart, because it needs less: no UNet at y = x_T, no reverse term."""

    ordinary: Transition  # leading axes (B, bins)
    last: Transition  # leading axis (B,)


def number_of_bins(num_steps: int, fraction: float, *, uneven: bool = False) -> int:
    """⌊T·fraction⌋ bins of steps, equal ones unless `uneven`.

    Raises:
        UserError: the bins do not divide the steps, or leave the last bin nothing but the last step.
    """
    bins = int(num_steps * fraction + 1e-6)
    if bins < 1 or (num_steps % bins and not uneven) or num_steps // bins < 2:
        raise UserError(
            f"{num_steps} sampling steps do not fall into {bins} equal bins of at least 2 "
            f"(fraction {fraction:g}); choose another number of steps or fraction, or algorithm.uneven_bins"
        )
    return bins


def draw_steps(keys: PRNGKeys, num_steps: int, bins: int, draw: int | Array = 0) -> Int[Array, "batch {bins}"]:
    """One step drawn uniformly from each bin; the last step, always taken, is not drawn again.

    `draw` counts the draws from one trajectory; each is independent. Where the bins do not divide the steps, a bin's
    end lies within a step, which both its bins may then draw.
    """
    width = num_steps // bins if num_steps % bins == 0 else num_steps / bins
    widths = jnp.full(bins, width).at[-1].add(-1)

    def of_sample(key: Array) -> Array:
        key = jax.random.fold_in(key, _SELECTION + draw)
        if num_steps % bins == 0:
            return jnp.arange(bins) * width + jax.random.randint(key, (bins,), 0, widths)
        points = jnp.arange(bins, dtype=jnp.float32) * width + widths * jax.random.uniform(key, (bins,))
        return jnp.minimum(points.astype(jnp.int32), num_steps - 2)

    return jax.vmap(of_sample)(keys)


def gather(
    steps: Int[Array, " batch *bins"],
    trajectory: Trajectory,
    schedule: Schedule,
    condition: PyTree[Any],
    adjoint: AdjointCredit | None,
) -> Transition:
    """The transitions at `steps` of each trajectory, leaves (B, *bins, …)."""
    rows = jnp.arange(steps.shape[0]).reshape((-1,) + (1,) * (steps.ndim - 1))

    def at(leaf: Array, k: Array = steps) -> Array:
        return leaf[k, jnp.broadcast_to(rows, k.shape)]

    def repeat(leaf: Array) -> Array:
        return leaf[jnp.broadcast_to(rows, steps.shape)]

    return Transition(
        x=at(trajectory.latents),
        y=at(trajectory.latents, steps + 1),
        noise_prediction=at(trajectory.noise_predictions),
        step=schedule[steps],
        condition=jax.tree.map(repeat, condition),
        adjoint=jax.tree.map(at, adjoint),
    )


def select(
    keys: PRNGKeys,
    trajectory: Trajectory,
    schedule: Schedule,
    condition: PyTree[Any],
    bins: int,
    adjoint: AdjointCredit | None = None,
    draw: int | Array = 0,
) -> Transitions:
    """1 + bins transitions of each trajectory: the last, and one drawn from each bin of steps."""
    steps = draw_steps(keys, schedule.num_steps, bins, draw)
    last = jnp.full(len(keys), schedule.num_steps - 1)
    return Transitions(
        ordinary=gather(steps, trajectory, schedule, condition, adjoint),
        last=gather(last, trajectory, schedule, condition, adjoint),
    )


def flatten(transition: Transition) -> Transition:
    """Leading axes (B, bins) → (B·bins,)."""
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), transition)
