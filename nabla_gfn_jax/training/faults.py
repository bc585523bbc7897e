"""Numbers that are not finite: the samples that an epoch loses by them, and the updates that are not applied.

A sample whose latents, reward or training data are not all finite is left out: another one takes its place. An update
whose loss or gradient is not finite leaves the state as it is (`Trainer.update`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from nabla_gfn_jax.rewards import TOTAL

_SHOWN = 8  # the most samples that one message lists


def finite_rows(tree: PyTree[Array], axis: int) -> Bool[Array, " batch"]:
    """Whether all numbers of each sample are finite; the samples are along `axis` of every leaf."""
    checks = [
        jnp.isfinite(leaf).all(axis=[n for n in range(leaf.ndim) if n != axis])
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack(checks).all(axis=0)


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether all numbers of the tree are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def lost_by(scalars: Mapping[str, np.ndarray], finite: Mapping[str, np.ndarray]) -> dict[str, Bool[np.ndarray, " all"]]:
    """The samples that are lost, by the name of what is not finite. `finite` is what `finite_rows` found in a rollout.

    Names without a lost sample are left out.
    """
    lost = {name: ~np.asarray(rows) for name, rows in finite.items()}
    for name, values in scalars.items():
        lost[name.replace(TOTAL, "reward")] = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return {name: rows for name, rows in lost.items() if rows.any()}


def stand_ins(whole: Bool[np.ndarray, " all"], prompt_id: Int[np.ndarray, " all"]) -> Int[np.ndarray, " all"]:
    """The sample that is used in each place: itself, or for a lost one another of the same prompt, or of any prompt.

    At least one sample must be whole.
    """
    chosen = np.arange(len(whole))
    for turn, place in enumerate(np.flatnonzero(~whole)):
        of_prompt = np.flatnonzero(whole & (prompt_id == prompt_id[place]))
        found = of_prompt if len(of_prompt) else np.flatnonzero(whole)
        chosen[place] = found[turn % len(found)]
    return chosen


def describe_lost(lost: Mapping[str, Bool[np.ndarray, " all"]]) -> str:
    """What is not finite, and in which samples, as a phrase."""
    return ", ".join(f"{name} of {samples(np.flatnonzero(rows))}" for name, rows in lost.items())


def describe_skipped(
    metrics: Mapping[str, Any],
    applied: Bool[np.ndarray, " updates"],
    finite: Bool[np.ndarray, "updates parts"],
    count: int,
) -> str:
    """What was not finite in the first update that was not applied, and in which samples, as a phrase.

    Args:
        metrics: by name, (updates,).
        applied: which updates were applied; not all.
        finite: which micro-batches were finite, in the order of the samples.
        count: the number of samples.
    """
    step = int(np.argmin(applied))
    what = ", ".join(name for name, values in metrics.items() if not np.isfinite(np.asarray(values)[step]))
    each = count // finite.shape[1]
    of = [np.arange(part * each, (part + 1) * each) for part in np.flatnonzero(~finite[step])]
    return f"{what or 'weights'} of {samples(np.concatenate(of) if of else np.arange(count))}"


def samples(places: Sequence[int] | np.ndarray) -> str:
    """Numbers of samples as a phrase: "sample 3", "samples 0, 1, 5 and 9 more"."""
    shown, more = [str(int(n)) for n in places[:_SHOWN]], len(places) - _SHOWN
    return f"sample{'s' * (len(places) > 1)} {', '.join(shown)}{f' and {more} more' if more > 0 else ''}"


def in_a_row(before: int, applied: Bool[np.ndarray, " updates"]) -> int:
    """How many updates have been skipped since the last applied one; `before`: at the beginning of the epoch."""
    for done in applied:
        before = 0 if done else before + 1
    return before


def mean(values: np.ndarray) -> float:
    """The mean, and NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan


def mean_applied(metrics: Mapping[str, Any], applied: Bool[np.ndarray, " updates"]) -> dict[str, float]:
    """The means over the updates that were applied; NaN if none was."""
    return {name: mean(np.asarray(values)[applied]) for name, values in metrics.items()}
