"""The compiled functions of a finetuning run: sampling, update and images.

They use the protocols of algorithms, rewards and base models, and name none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from nabla_gfn_jax.algorithms.base import Algorithm, Metrics, Model, Rollout, Scalars
from nabla_gfn_jax.base_models.base import BaseModel, HeadNetwork, Table, change_predictor, predictor, window
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.models.lora import Layers
from nabla_gfn_jax.parallel import AXIS, EVERYWHERE, SPLIT, place, split
from nabla_gfn_jax.rewards import TOTAL, Reward
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.training.faults import all_finite, finite_rows
from nabla_gfn_jax.training.latent_reward import in_parts, latent_reward
from nabla_gfn_jax.training.state import TrainState
from nabla_gfn_jax.typing import Images, Latents, Params, PerSample, PRNGKeys, PromptIds


@flax.struct.dataclass
class Sampled:
    """The result of an epoch's sampling: training data, and "log_reward" and other scalars of each sample.

    `finite` says of each sample whether its latents and its training data are finite.
    """

    data: PyTree[Any]
    scalars: Scalars
    finite: dict[str, Bool[Array, " batch"]]


@flax.struct.dataclass
class Steps:
    """What an epoch's updates found, leading axis (updates,).

    An update is not applied if its loss, its gradient or a weight is not finite. `finite` says it of each micro-batch,
    in the order of the samples.
    """

    metrics: Metrics
    applied: Bool[Array, " updates"]
    finite: Bool[Array, "updates parts"]


BY_UPDATE = PartitionSpec(None, AXIS)  # leaves (updates, B, …), split by samples
# The shardings of a `Sampled` and of a `Steps`.
SAMPLED_SPLIT = Sampled(data=BY_UPDATE, scalars=SPLIT, finite=SPLIT)  # type: ignore[arg-type]
STEPS_SPLIT = Steps(metrics=EVERYWHERE, applied=EVERYWHERE, finite=BY_UPDATE)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A base model, a reward, an algorithm and an optimizer on the devices of a mesh."""

    base: BaseModel
    reward: Reward
    algorithm: Algorithm
    chain: Chain
    table: Mapping[str, Table]  # features of the run's prompts for "base" and "reward"; of so many as it has rows
    num_prompts: int
    guidance: float
    optimizer: optax.GradientTransformation
    head_options: Mapping[str, Any]  # options of the heads' networks
    mesh: Mesh
    micro_batches: int
    updates_per_epoch: int = 1
    images_at_once: int = 0  # most images decoded and scored together on a device; 0: a whole micro-batch
    start_from: Params | None = None  # the LoRA that training starts from; None: a new one
    prompt_weights: tuple[float, ...] | None = None  # relative frequency of each prompt; None: all the same
    carry_change: bool = False  # in half precision: carry o_θ − o_# through the network; False: subtract outputs
    lora_steps: int | None = None  # number of first steps with the LoRA; None: all
    average: float = 0.0  # decay of the running mean of the LoRA; 0: no running mean
    encode: Callable[[Int[np.ndarray, " rows"]], Mapping[str, Table]] | None = None  # the table of these prompts, if
    # they are too many for one; its number of rows is then that of `table`

    @cached_property
    def heads(self) -> dict[str, HeadNetwork]:
        """The networks of the algorithm's heads."""
        return {name: self.base.head(kind, self.head_options) for name, kind in self.algorithm.heads().items()}

    def first_state(self, seed: int, rank: int, layers: Layers = "attention") -> TrainState:
        """The initial state. A new LoRA and the heads do not change the base model's distribution."""
        key = jax.random.key(seed)
        lora = self.start_from or self.base.init_lora(stream(key, "lora"), rank, layers)
        params: Params = {"lora": lora} | {name: h.init(stream(key, name)) for name, h in self.heads.items()}
        average = jax.tree.map(jnp.copy, lora) if self.average else None
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32), average)

    @property
    def frozen_params(self) -> Params:
        """The parameters that training does not change. They are arguments, not constants, of the compiled programs."""
        return {"base": self.base.frozen_params, "reward": self.reward.params, "table": dict(self.table)}

    @cached_property
    def frozen(self) -> Params:
        """`frozen_params` on the devices."""
        return place(self.frozen_params, self.mesh)

    def seeing(self, prompt_id: Int[np.ndarray, " n"]) -> tuple[Params, Int[np.ndarray, " n"]]:
        """`frozen` with a table that has these prompts, and the row of each."""
        if self.encode is None:
            return self.frozen, prompt_id
        ids, rows = window(prompt_id, len(prompt_id))
        return self.frozen | {"table": place(dict(self.encode(ids)), self.mesh)}, rows

    def told(self, scalars: Mapping[str, Any], samples: int) -> tuple[PyTree[np.ndarray], PyTree[np.ndarray]]:
        """What the algorithm tells each sample after an epoch, and what it then remembers; good for their shapes alone.

        `scalars`: the shapes of what a rollout gives to `Algorithm.weigh`.
        """
        zeros = {name: np.zeros(a.shape, a.dtype) for name, a in scalars.items()}
        first = self.algorithm.first_stats(self.num_prompts)
        return self.algorithm.weigh(first, zeros, np.zeros(samples, np.int32))

    def model(self, frozen: Params) -> Model:
        """The functions that the algorithm works with."""
        table = frozen["table"]["base"]
        score = latent_reward(self._score, self.images_at_once)

        def log_reward(z: Latents, prompt_id: PromptIds) -> PerSample:
            return score(frozen, z, prompt_id)

        view = (self.base, frozen["base"], table, self.guidance)
        return Model(
            chain=self.chain,
            predict=predictor(*view),
            log_reward=log_reward,
            heads={name: partial(_head, network, table) for name, network in self.heads.items()},
            predict_change=change_predictor(*view) if self.carry_change else None,
            lora_steps=self.lora_steps,
        )

    def _score(self, frozen: Params, z: Latents, prompt_id: PromptIds) -> PerSample:
        return self._scores(frozen, z, prompt_id)[TOTAL]

    def _scores(self, frozen: Params, z: Latents, prompt_id: PromptIds) -> dict[str, PerSample]:
        images = self.base.decode(frozen["base"], z)
        return self.reward.scores(frozen["reward"], images, self._features(frozen, prompt_id))

    def _features(self, frozen: Params, prompt_id: PromptIds) -> PyTree[Any]:
        """The reward's features of each prompt."""
        return jax.tree.map(lambda a: a[prompt_id], frozen["table"]["reward"])

    @cached_property
    def rollout(self) -> Any:
        """(frozen, params, keys, prompt_id) → Sampled, compiled when called. Each device works on its own samples."""
        inputs = (EVERYWHERE, EVERYWHERE, SPLIT, SPLIT)
        return split(self._rollout, self.mesh, inputs, SAMPLED_SPLIT)

    @cached_property
    def update(self) -> Any:
        """(frozen, state, data, weight) → (TrainState, Steps), compiled when called.

        The state that is given stays, so that a signal can save it during the update.
        """
        inputs = (EVERYWHERE, EVERYWHERE, BY_UPDATE, SPLIT)
        return split(self._update, self.mesh, inputs, (EVERYWHERE, STEPS_SPLIT))

    @cached_property
    def take(self) -> Any:
        """(data, index) → data of a rollout with sample index[i] in place i, compiled when called."""
        split_by_samples = NamedSharding(self.mesh, BY_UPDATE)
        return jax.jit(
            lambda data, index: jax.tree.map(lambda leaf: leaf[:, index], data), out_shardings=split_by_samples
        )

    @cached_property
    def images(self) -> Any:
        """(frozen, params, keys, prompt_id) → (Images, scores by name), sampled as in a rollout."""
        return split(self._images, self.mesh, (EVERYWHERE, EVERYWHERE, SPLIT, SPLIT), SPLIT)

    def _rollout(self, frozen: Params, params: Params, keys: PRNGKeys, prompt_id: PromptIds) -> Sampled:
        model = self.model(frozen)
        trajectory = sample(
            model.predict, params["lora"], self.chain, keys, self.base.latent_shape, prompt_id, self.lora_steps
        )
        scores = in_parts(partial(self._scores, frozen), self.images_at_once, trajectory.samples, prompt_id)
        rollout = Rollout(trajectory=trajectory, log_reward=scores[TOTAL], prompt_id=prompt_id, keys=keys)
        batch = self.algorithm.batch(params, model, rollout, self.updates_per_epoch)
        finite = {
            "latents": finite_rows((trajectory.latents, trajectory.outputs), 1),
            "training data": finite_rows(batch.data, 1),
        }
        return Sampled(data=batch.data, scalars=scores | batch.scalars, finite=finite)

    def _images(
        self, frozen: Params, params: Params, keys: PRNGKeys, prompt_id: PromptIds
    ) -> tuple[Images, dict[str, PerSample]]:
        predict = self.model(frozen).predict
        trajectory = sample(
            predict, params["lora"], self.chain, keys, self.base.latent_shape, prompt_id, self.lora_steps
        )

        def show(z: Latents, prompt_id: PromptIds) -> tuple[Images, dict[str, PerSample]]:
            images = self.base.decode(frozen["base"], z)
            return images, self.reward.scores(frozen["reward"], images, self._features(frozen, prompt_id))

        return in_parts(show, self.images_at_once, trajectory.samples, prompt_id)

    def _update(
        self, frozen: Params, state: TrainState, data: PyTree[Any], weight: Float[Array, " batch *rest"]
    ) -> tuple[TrainState, Steps]:
        """One optimizer step on each of the epoch's batches."""
        return jax.lax.scan(partial(self._step, self.model(frozen), weight), state, data)

    def _step(
        self, model: Model, weight: Float[Array, " batch *rest"], state: TrainState, data: PyTree[Any]
    ) -> tuple[TrainState, Steps]:
        """One optimizer step on the mean gradient over all samples.

        The gradient is summed over the micro-batches of a device, and then once over the devices.
        """
        size = len(weight) // self.micro_batches  # not -1: data may have an axis of length 0
        parts = jax.tree.map(lambda a: a.reshape(self.micro_batches, size, *a.shape[1:]), (data, weight))

        def accumulate(total: Params, part: PyTree[Any]) -> tuple[Params, tuple[Metrics, Bool[Array, ""]]]:
            (loss, terms), gradient = self.algorithm.value_and_grad(state.params, model, *part)
            finite = all_finite((loss, terms, gradient, part[1]))
            return jax.tree.map(jnp.add, total, gradient), ({"loss": loss, **terms}, finite)

        total, (terms, finite) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), parts)
        total = (jax.tree.map(lambda a: a.sum(), terms), (~finite).sum().astype(jnp.float32), total)
        flat, unravel = ravel_pytree(total)
        metrics, bad, gradient = unravel(jax.lax.psum(flat, AXIS) / (self.micro_batches * self.mesh.size))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
            updates, moments = self.optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {f"grad_norm_{name}": optax.tree.norm(part) for name, part in gradient.items()}
        average = state.average
        if average is not None:
            average = optax.incremental_update(params["lora"], average, 1.0 - self.average)
        applied = (bad == 0) & all_finite(norms)
        moves = jnp.any(ravel_pytree(gradient)[0] != 0)  # a policy that waits leaves Adam's moments and rate alone
        after = TrainState(params, moments, state.step, average)
        kept: TrainState = jax.tree.map(lambda new, old: jnp.where(applied & moves, new, old), after, state)
        state = TrainState(kept.params, kept.optimizer, state.step + 1, kept.average)
        return state, Steps(metrics=metrics | norms, applied=applied, finite=finite)


def _head(
    network: HeadNetwork, table: Table, phi: Params, x: Latents, level: Any, prompt_id: PromptIds
) -> Latents | PerSample:
    return network.apply(phi, x, level, table, prompt_id)
