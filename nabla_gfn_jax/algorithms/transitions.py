"""Transitions x → y of sampled trajectories, and the selection of those that an update trains on."""

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
    """The credit of every step of a finished trajectory, leaves (T, B, …)."""

    gradient: Latents  # a_{t+1}: the credit at y
    base_output: Latents | None  # o_# at x if it was computed, so that the loss need not compute it again


@flax.struct.dataclass
class Transition:
    """Steps x → y, with any leading axes."""

    x: Latents
    y: Latents
    output: Latents  # o_θ† at x, from the parameters θ† that sampled
    index: Int[Array, "*steps"]  # the step in the chain
    prompt_id: Int[Array, "*steps"]
    adjoint: AdjointCredit | None  # None for the credits "lookahead" and "guess"
    change: Latents | None = None  # o_θ† − o_# at x, if λ's term is computed from two such changes


@flax.struct.dataclass
class Transitions:
    """Ordinary and last steps. The last step needs neither the UNet at the sample y nor the reverse term."""

    ordinary: Transition  # leading axes (B, bins)
    last: Transition  # leading axis (B,)


def number_of_bins(num_steps: int, fraction: float, *, uneven: bool = False) -> int:
    """The number of bins of steps, ⌊T·fraction⌋. The bins have equal numbers of steps unless `uneven`.

    Raises:
        UserError: the bins do not divide the steps, or the last bin would have only the last step.
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
    """The options of an algorithm that trains on one step from each bin and on the last step (`select`)."""

    transition_fraction: float = option(
        0.1, "fraction of the steps that are trained on, beside the last step", above=0, maximum=1
    )
    uneven_bins: bool = option(False, "allow bins that begin or end within a step")

    def bins(self, num_steps: int) -> int:
        """The number of bins for `num_steps` steps. Raises `UserError` if the steps cannot be divided so."""
        return number_of_bins(num_steps, self.transition_fraction, uneven=self.uneven_bins)

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if the options do not fit a trajectory of `num_steps` steps."""
        self.bins(num_steps)


def select_steps(keys: PRNGKeys, num_steps: int, bins: int, update: int | Array = 0) -> Int[Array, "batch {bins}"]:
    """One step chosen uniformly from each bin. The last step is never chosen, because `select` always takes it.

    `update` numbers the selections from one trajectory, which are independent. If the bins do not divide the steps, a
    bin may end within a step, and both bins may choose this step.
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
    """`each` steps of a trajectory for every update, in random order. No step repeats until all have been taken."""

    def order(key: Array) -> Array:
        return jnp.resize(jax.random.permutation(stream(key, "shares"), num_steps), (updates, each))

    return jax.vmap(order, out_axes=1)(keys)


def check_steps(steps: int, num_steps: int) -> None:
    """Raises `UserError` if an update takes more steps of a trajectory than the trajectory has."""
    if steps > num_steps:
        raise UserError(f"algorithm.steps = {steps} is more than sampling.num_steps = {num_steps}; lower it")


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
    """1 + bins transitions of each trajectory: the last step, and one step from each bin."""
    num_steps = len(rollout.trajectory.outputs)
    last = jnp.full(len(rollout.keys), num_steps - 1)
    return Transitions(
        ordinary=take(select_steps(rollout.keys, num_steps, bins, update), rollout, adjoint),
        last=take(last, rollout, adjoint),
    )


def with_changes(model: Model, lora: Params, transition: Transition) -> Transition:
    """The transition with `change` = o_θ† − o_# filled in; leading axes (updates, B, *bins).

    `lora` is the LoRA that sampled. The changes are computed one batch at a time.
    """
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
    """Merges the leading axes of every leaf: (B, bins, …) → (B·bins, …)."""
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), tree)
