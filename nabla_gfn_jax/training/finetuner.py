"""The compiled functions of a finetuning run, sampling and the update, and the state they pass on.

An epoch samples trajectories with the present parameters and trains on those of the epoch before (DESIGN: the trust
region's θ† is the previous iterate), so its transitions wait in the state and are saved with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from nabla_gfn_jax.algorithms.base import Algorithm, Metrics, Model
from nabla_gfn_jax.checkpoints.diffusers_folder import StableDiffusion
from nabla_gfn_jax.diffusion.sampler import Trajectory, sample
from nabla_gfn_jax.diffusion.schedule import Schedule
from nabla_gfn_jax.diffusion.text_to_image import Condition, decode, guided_predictor
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.models.unet import UNet2DConditionModel
from nabla_gfn_jax.parallel import AXIS, EVERYWHERE, SPLIT, place, split
from nabla_gfn_jax.rewards import Reward
from nabla_gfn_jax.training.latent_reward import in_parts, latent_reward
from nabla_gfn_jax.typing import Images, Latents, Params, PRNGKeys, Scores, Timesteps


@flax.struct.dataclass
class TrainState:
    """What an update changes: {"lora", "flow"} parameters, their optimizer's state, updates made."""

    params: Params
    optimizer: optax.OptState
    step: Int[Array, ""]


@flax.struct.dataclass
class Rollout:
    """One epoch's sampling: what the loss needs of the trajectories, the images and their log rewards."""

    transitions: PyTree[Any]  # leaves (updates, B, …)
    images: Images
    log_reward: Scores


class Compiled(NamedTuple):
    """What a run calls."""

    rollout: Any  # (frozen, params, keys, condition) → Rollout
    update: Any  # (frozen, state, transitions) → (TrainState, Metrics)
    draw: Callable[..., Images]  # (frozen, params, keys, condition)


# How it lies on the devices: by trajectories.
ROLLOUT_SPLIT = Rollout(transitions=PartitionSpec(None, AXIS), images=SPLIT, log_reward=SPLIT)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Finetuner:
    """A base model, a reward, an algorithm and an optimizer, and the functions compiled from them for a mesh."""

    base: StableDiffusion
    flow: UNet2DConditionModel
    reward: Reward
    algorithm: Algorithm
    schedule: Schedule
    guidance: float
    optimizer: optax.GradientTransformation
    mesh: Mesh
    micro_batches: int
    updates_per_epoch: int = 1
    images_at_once: int = 0  # that the VAE and the reward have on a device; 0: a micro-batch's, all
    start_from: Params | None = None  # a LoRA

    def init(self, seed: int, rank: int) -> TrainState:
        """The state that training starts from, on the devices."""
        return place(self.first_state(seed, rank), self.mesh)

    def first_state(self, seed: int, rank: int) -> TrainState:
        """LoRA and flow as they start: both leave the base model's distribution as it is, or LoRA as `start_from`."""
        lora_key, flow_key = jax.random.split(jax.random.key(seed))
        unet = self.base.unet
        lora = self.start_from or init_lora(lora_key, self.base.params["unet"], rank)
        params: Params = {"lora": lora, "flow": {}}
        if self.algorithm.uses_flow:
            latent, context = self._example(unet.config.cross_attention_dim)
            params["flow"] = init_flow(self.flow, flow_key, latent, context)
        return TrainState(params=params, optimizer=self.optimizer.init(params), step=jnp.zeros((), jnp.int32))

    def _example(self, context_width: int) -> tuple[Latents, Float[Array, "1 1 width"]]:
        return jnp.zeros((1, *self.base.latent_shape)), jnp.zeros((1, 1, context_width))

    @property
    def frozen_params(self) -> Params:
        """Parameters that training reads and never changes; arguments, not constants, of what is compiled."""
        base = {part: self.base.params[part] for part in ("unet", "vae")}
        return {"base": base, "reward": self.reward.params}

    @cached_property
    def frozen(self) -> Params:
        """The same on the devices."""
        return place(self.frozen_params, self.mesh)

    def model(self, frozen: Params) -> Model:
        """The algorithm's view of the pieces."""

        def flow(phi: Params, x: Latents, t: Timesteps, condition: Condition) -> Latents:
            apply: Any = self.flow.apply
            return apply({"params": phi}, x, t, condition["context"])

        score = latent_reward(lambda frozen, z, features: self._judge(frozen, z, features)[1], self.images_at_once)

        def log_reward(z: Latents, condition: Condition) -> Scores:
            return score(frozen, z, condition["reward"])

        return Model(guided_predictor(self.base, frozen["base"]["unet"], self.guidance), flow, log_reward)

    def _judge(self, frozen: Params, z: Latents, features: PyTree[Any]) -> tuple[Images, Scores]:
        images = decode(self.base, frozen["base"]["vae"], z)
        return images, self.reward.score(frozen["reward"], images, features)

    def compile(self) -> "Compiled":
        """What a run calls. Each device works on its part of the batch; the update's state is donated."""
        drawing = (EVERYWHERE, EVERYWHERE, SPLIT, SPLIT)
        updating = (EVERYWHERE, EVERYWHERE, ROLLOUT_SPLIT.transitions)
        return Compiled(
            rollout=split(self.rollout, self.mesh, drawing, ROLLOUT_SPLIT),
            update=split(self.update, self.mesh, updating, EVERYWHERE, donate_argnums=1),
            draw=split(self.draw, self.mesh, drawing, SPLIT),
        )

    def rollout(self, frozen: Params, params: Params, keys: PRNGKeys, condition: Condition) -> Rollout:
        """Samples one trajectory for each key (a device's) and keeps the transitions that will be trained on."""
        model = self.model(frozen)
        trajectory = self._sample(model, params, keys, condition)
        transitions = self.algorithm.transitions(
            params, model, keys, trajectory, self.schedule, condition, self.updates_per_epoch
        )
        judge = partial(self._judge, frozen)
        images, score = in_parts(judge, self.images_at_once, trajectory.samples, condition["reward"])
        return Rollout(transitions=transitions, images=images, log_reward=score)

    def draw(self, frozen: Params, params: Params, keys: PRNGKeys, condition: Condition) -> Images:
        """The images of a rollout, and nothing that is trained on."""
        trajectory = self._sample(self.model(frozen), params, keys, condition)
        return in_parts(partial(decode, self.base, frozen["base"]["vae"]), self.images_at_once, trajectory.samples)

    def _sample(self, model: Model, params: Params, keys: PRNGKeys, condition: Condition) -> Trajectory:
        def predict(x: Latents, t: Timesteps, condition: Condition) -> Latents:
            return model.predict(params["lora"], x, t, condition)

        return sample(predict, self.schedule, keys, self.base.latent_shape, condition)

    def update(self, frozen: Params, state: TrainState, transitions: PyTree[Any]) -> tuple[TrainState, Metrics]:
        """An optimizer step on each of the epoch's draws of transitions; metrics are means over them."""
        state, metrics = jax.lax.scan(partial(self._step, self.model(frozen)), state, transitions)
        return state, jax.tree.map(lambda a: a.mean(), metrics)

    def _step(self, model: Model, state: TrainState, transitions: PyTree[Any]) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean gradient over all transitions: added up over the micro-batches of a device,
        then, once, over the devices.
        """
        parts = jax.tree.map(lambda a: a.reshape(self.micro_batches, -1, *a.shape[1:]), transitions)

        def accumulate(total: Params, part: PyTree[Any]) -> tuple[Params, Metrics]:
            (loss, terms), gradient = self.algorithm.value_and_grad(state.params, model, part)
            return jax.tree.map(jnp.add, total, gradient), {"loss": loss, **terms}

        total, terms = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), parts)
        total = (jax.tree.map(lambda a: a.sum(), terms), total)
        flat, unravel = ravel_pytree(total)
        metrics, gradient = unravel(jax.lax.psum(flat, AXIS) / (self.micro_batches * self.mesh.size))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
            updates, moments = self.optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        for group in ("lora", "flow"):
            metrics[f"grad_norm_{group}"] = optax.tree.norm(gradient[group]) if gradient[group] else jnp.zeros(())
        return TrainState(params=params, optimizer=moments, step=state.step + 1), metrics


def make_optimizer(
    learning_rate: float, *, decay_lora: float, decay_flow: float, clip: float
) -> optax.GradientTransformation:
    """AdamW (.9, .999) for LoRA and flow, each with its own weight decay and its own clip of the global norm."""

    def group(weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(learning_rate, weight_decay=weight_decay))

    groups = {"lora": group(decay_lora), "flow": group(decay_flow)}
    return optax.multi_transform(groups, {name: name for name in groups})


def init_flow(flow: nn.Module, key: Array, latent: Latents, context: Float[Array, "1 1 width"]) -> Params:
    """Parameters of g_φ, its last layer zero, so that g = 0 at the start."""
    params = flow.init(key, latent, jnp.zeros(1, jnp.int32), context)["params"]
    return params | {"conv_out": jax.tree.map(jnp.zeros_like, params["conv_out"])}
