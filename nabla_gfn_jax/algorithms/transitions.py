"""Transitions x → y of sampled trajectories, and which of them are trained on."""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, PromptIds


@flax.struct.dataclass
class AdjointCredit:
    """What is known of every step of a trajectory once it has ended, leaves (T, B, …)."""

    gradient: Latents  # a_{t+1}: the credit at y
    base_output: Latents | None  # o_# at x, if it is known: the loss then need not evaluate it again


@flax.struct.dataclass
class Transition:
    """Steps x → y, any leading axes."""

    x: Latents
    y: Latents
    output: Latents  # o_θ† at x, by the parameters θ† that sampled
    index: Int[Array, "*steps"]  # of the step in the chain
    prompt_id: Int[Array, "*steps"]
    adjoint: AdjointCredit | None  # None under the lookahead credits
    change: Latents | None = None  # o_θ† − o_# at x, where λ's term is the difference of two such


@flax.struct.dataclass
class Transitions:
    """The last step apart, because it needs less: no UNet at the sample y, no reverse term."""

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
            f"algorithm.transition_fraction = {fraction:g} of sampling.num_steps = {num_steps} makes {bins} bins, "
            f"which are not equal or have fewer than 2 steps; change one of both, or set algorithm.uneven_bins"
        )
    return bins


@dataclass(frozen=True, kw_only=True)
class FromBins(Checked):
    """The options of an algorithm that trains on a step from each of equal bins, and on the last (`select`)."""

    transition_fraction: float = option(0.1, "fraction of the steps trained on, beside the last", above=0, maximum=1)
    uneven_bins: bool = option(False, "let the bins that steps are drawn from divide a step between two")

    def bins(self, num_steps: int) -> int:
        """Into how many a trajectory's steps are divided. Raises `UserError` if that cannot be."""
        return number_of_bins(num_steps, self.transition_fraction, uneven=self.uneven_bins)

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if the options do not fit a trajectory of so many steps."""
        self.bins(num_steps)


def select_steps(keys: PRNGKeys, num_steps: int, bins: int, update: int | Array = 0) -> Int[Array, "batch {bins}"]:
    """One step chosen uniformly from each bin; the last step, always taken, is not chosen again.

    `update` counts the selections from one trajectory; each is independent. Where the bins do not divide the steps, a
    bin's end lies within a step, which both its bins may then choose.
    """
    width = num_steps // bins if num_steps % bins == 0 else num_steps / bins
    widths = jnp.full(bins, width).at[-1].add(-1)

    def of_sample(key: Array) -> Array:
        key = jax.random.fold_in(stream(key, "steps"), update)
        if num_steps % bins == 0:
            return jnp.arange(bins) * width + jax.random.randint(key, (bins,), 0, widths)
        points = jnp.arange(bins, dtype=jnp.float32) * width + widths * jax.random.uniform(key, (bins,))
        return jnp.minimum(points.astype(jnp.int32), num_steps - 2)

    return jax.vmap(of_sample)(keys)


def share_out(keys: PRNGKeys, num_steps: int, updates: int, each: int) -> Int[Array, "{updates} batch {each}"]:
    """`each` steps of a trajectory for every update, in random order: none twice before all have been taken."""

    def order(key: Array) -> Array:
        return jnp.resize(jax.random.permutation(stream(key, "shares"), num_steps), (updates, each))

    return jax.vmap(order, out_axes=1)(keys)


def take(steps: Int[Array, " batch *bins"], rollout: Rollout, adjoint: AdjointCredit | None = None) -> Transition:
    """The transitions at `steps` of each trajectory, leaves (B, *bins, …)."""
    rows = jnp.broadcast_to(jnp.arange(steps.shape[0]).reshape((-1,) + (1,) * (steps.ndim - 1)), steps.shape)
    trajectory = rollout.trajectory
    return Transition(
        x=trajectory.latents[steps, rows],
        y=trajectory.latents[steps + 1, rows],
        output=trajectory.outputs[steps, rows],
        index=steps,
        prompt_id=rollout.prompt_id[rows],
        adjoint=jax.tree.map(lambda leaf: leaf[steps, rows], adjoint),
    )


def select(rollout: Rollout, bins: int, adjoint: AdjointCredit | None = None, update: int | Array = 0) -> Transitions:
    """1 + bins transitions of each trajectory: the last, and one chosen from each bin of steps."""
    num_steps = len(rollout.trajectory.outputs)
    last = jnp.full(len(rollout.keys), num_steps - 1)
    return Transitions(
        ordinary=take(select_steps(rollout.keys, num_steps, bins, update), rollout, adjoint),
        last=take(last, rollout, adjoint),
    )


def with_changes(model: Model, lora: Params, transition: Transition) -> Transition:
    """The same with o_θ† − o_#, of the LoRA that sampled, leading axes (updates, B, *bins); a batch at a time."""
    assert model.predict_change is not None
    predict_change, chain, axes = model.predict_change, model.chain, transition.index.ndim

    def of_batch(rows: tuple[Latents, Array, PromptIds]) -> Latents:
        x, index, prompt_id = rows
        return predict_change(lora, x, chain[index].at, prompt_id)[1]

    def batches(a: Array) -> Array:
        a = jnp.moveaxis(a, 1, axes - 1)
        return a.reshape(-1, *a.shape[axes - 1 :])

    change = jax.lax.map(of_batch, jax.tree.map(batches, (transition.x, transition.index, transition.prompt_id)))
    updates, batch, *bins = transition.index.shape
    change = jnp.moveaxis(change.reshape(updates, *bins, batch, *change.shape[2:]), axes - 1, 1)
    return transition.replace(change=change)  # type: ignore[attr-defined]


def flatten(tree: Any) -> Any:
    """Leading axes (B, bins) → (B·bins,)."""
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), tree)
