"""The parts of the comparison in the plane: settings with known targets, methods, their training and evaluation.

Runs of a method with different settings, seeds or learning rates are lanes of one compiled program.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.optimize import brentq

from nabla_gfn_jax.algorithms.base import Algorithm, Model, Rollout
from nabla_gfn_jax.diffusion.chain import Level
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.flops import count_flops
from nabla_gfn_jax.inference.paths import Paths, sample_paths
from nabla_gfn_jax.studies.mixture import Mixture, Points, distance, sampled
from nabla_gfn_jax.studies.mixture2d import CHAINS, DATA, REWARDS, init_mlp, keys_of, make_model
from nabla_gfn_jax.typing import Params, PRNGKey, PromptIds

CHAIN = CHAINS["diffusion"]
BATCH, WIDTH, LANES = 128, 32, 3
WINDOW = 10  # the running mean is over about 1/WINDOW of the updates so far
JUDGED = 10_000  # samples for the evaluation of a policy
_ANGLES = 2 * np.pi * np.arange(8) / 8
RING = Mixture(  # the rare mode is at angle 0, where the reward is largest
    np.array([0.01, *[0.99 / 7] * 7]), 3.0 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1), 0.3
)


class Setting(NamedTuple):
    """A base model and a reward, log R = k·x."""

    data: Mixture
    k: Float[np.ndarray, "2"]

    @property
    def base(self) -> Mixture:
        """The distribution that the chain's steps sample with the exact network."""
        return sampled(self.data, CHAIN)


SETTINGS = {
    "mild": Setting(DATA, REWARDS["mild"]),
    "doubled": Setting(DATA, REWARDS["doubled"]),
    "rare": Setting(RING, np.array([1.5, 0.0])),
}
MODES, STD, BASE_STD = len(RING.weights), DATA.std, sampled(DATA, CHAIN).std


class Method(NamedTuple):
    """An algorithm and how it is trained in the comparison."""

    algorithm: Algorithm
    clip: float = 1.0  # largest norm of the gradient, for the LoRA and each head separately
    times_base: bool = False  # True if the algorithm's target has no base model; its reward is then P_base R


def evaluations(algorithm: Algorithm, batch: int = 16) -> float:
    """The cost of an update per trajectory, including sampling, in evaluations of the network.

    It is counted in the traced program, with a network that is one matrix product and an adapter that has none.
    """
    matrix, ids = jnp.eye(3), jnp.zeros(batch, jnp.int32)

    def predict(lora: Params | None, x: Points, level: Level, condition: PromptIds) -> Points:
        return (x if lora is None else x * lora["scale"]) @ matrix

    def vector(phi: Params, x: Points, level: Level, prompt_id: PromptIds) -> Points:
        return x * phi["scale"]

    heads = {"correction": vector, "flow": lambda *a, **b: vector(*a, **b).sum(axis=1)}
    model = Model(CHAIN, predict, lambda z, prompt_id: z.sum(axis=1), heads)
    params = {name: {"scale": jnp.ones(())} for name in ("lora", *algorithm.heads())}

    def rollout(params: Params, keys: Array) -> tuple[Any, dict[str, Array]]:
        trajectory = sample(predict, params["lora"], CHAIN, keys, (3,), ids)
        log_reward = model.log_reward(trajectory.samples, ids)
        made = algorithm.batch(params, model, Rollout(trajectory, log_reward, ids, keys), 1)
        return jax.tree.map(lambda a: a[0], made.data), {"log_reward": log_reward, **made.scalars}

    def update(params: Params, keys: Array) -> Params:
        return algorithm.value_and_grad(params, model, rollout(params, keys)[0], jnp.asarray(weight))[1]

    keys = keys_of(jax.random.key(0), batch)
    scalars = {name: np.zeros(a.shape, a.dtype) for name, a in jax.eval_shape(rollout, params, keys)[1].items()}
    weight, _ = algorithm.weigh(algorithm.first_stats(1), scalars, np.zeros(batch, int))  # its shape counts
    used = count_flops(update, params, keys)
    return sum(used.values()) / (2.0 * 3 * 3 * batch)


class Lane(NamedTuple):
    """One of the runs of a method that are trained simultaneously."""

    setting: str
    seed: int
    rate: float


class World(NamedTuple):
    """A setting as arrays, so that one compiled program serves all settings. Unused modes have negligible weight."""

    weights: Float[Array, " modes"]
    means: Float[Array, "modes 2"]
    base_means: Float[Array, "modes 2"]  # means of the distribution that the chain's steps sample
    k: Float[Array, "2"]

    @classmethod
    def of(cls, setting: Setting) -> "World":
        """The arrays of a setting. Raises `ValueError` unless its modes have the width that the programs assume."""
        if setting.data.std != STD:
            raise ValueError(f"modes have a standard deviation of {setting.data.std}, not {STD}")
        missing = MODES - len(setting.data.weights)
        weights = np.concatenate([setting.data.weights, np.full(missing, 1e-30)])
        means, base = (np.concatenate([m.means, np.zeros((missing, 2))]) for m in (setting.data, setting.base))
        return cls(*(jnp.asarray(a, jnp.float32) for a in (weights, means, base, setting.k)))

    def model(self, times_base: bool) -> Model:
        """The model of the setting, with log R = k·x, plus log P_base(x) if `times_base`."""
        data: Any = Mixture(self.weights, self.means, STD)  # type: ignore[arg-type]
        base: Any = Mixture(self.weights, self.base_means, BASE_STD)  # type: ignore[arg-type]
        model = make_model(self.k, data=data)  # type: ignore[arg-type]
        if not times_base:
            return model
        return replace(model, log_reward=lambda z, prompt_id: z @ self.k + base.log_density(z))


class Programs:
    """The functions of a method for `LANES` lanes, compiled once for all settings, seeds and rates."""

    def __init__(self, method: Method):
        self.method = method
        self.rollout, self.update = jax.jit(jax.vmap(self._rollout, (0, 0, 0, None))), jax.jit(jax.vmap(self._update))
        self.first = jax.vmap(self._first)

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.method.clip), optax.scale_by_adam())

    def _first(self, key: PRNGKey) -> tuple[Params, Params, Any]:
        lora_key, head_key = (jax.random.fold_in(key, i) for i in range(2))
        outputs = {"vector": 2, "scalar": 1}
        heads = {n: init_mlp(head_key, 2, outputs[kind], WIDTH) for n, kind in self.method.algorithm.heads().items()}
        params = {"lora": init_mlp(lora_key, 4, width=WIDTH)} | heads
        return params, params["lora"], {name: self._optimizer().init(part) for name, part in params.items()}

    def _rollout(self, params: Params, world: World, key: PRNGKey, index: Array) -> tuple[Any, dict[str, Array]]:
        model, algorithm = world.model(self.method.times_base), self.method.algorithm
        ids, keys = jnp.zeros(BATCH, jnp.int32), keys_of(jax.random.fold_in(key, index), BATCH)
        trajectory = sample(model.predict, params["lora"], model.chain, keys, (2,), ids)
        log_reward = model.log_reward(trajectory.samples, ids)
        batch = algorithm.batch(params, model, Rollout(trajectory, log_reward, ids, keys), 1)
        return jax.tree.map(lambda a: a[0], batch.data), {"log_reward": log_reward, **batch.scalars}

    def _update(self, state: Any, world: World, data: Any, weight: Array, rate: Array, share: Array) -> Any:
        params, average, moments = state
        model = world.model(self.method.times_base)
        _, gradient = self.method.algorithm.value_and_grad(params, model, data, weight)
        params, moments = dict(params), dict(moments)
        for name, part in gradient.items():
            with jax.numpy_dtype_promotion("standard"):  # optax mixes int counts and floats
                change, moments[name] = self._optimizer().update(part, moments[name])
            params[name] = jax.tree.map(lambda p, c: p - rate * c, params[name], change)
        average = jax.tree.map(lambda a, p: a + share * (p - a), average, params["lora"])
        return params, average, moments


class Training:
    """Trains the lanes of one method on-policy, with one update for each new batch."""

    def __init__(self, programs: Programs, lanes: Sequence[Lane]):
        self.programs, self.algorithm, self.made = programs, programs.method.algorithm, 0
        lanes = [*lanes, *[lanes[-1]] * (LANES - len(lanes))]  # padded to the number of the compiled program
        keys = jnp.stack([jax.random.key(lane.seed) for lane in lanes])
        self.keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
        self.rates = jnp.asarray([lane.rate for lane in lanes])
        worlds = [World.of(SETTINGS[lane.setting]) for lane in lanes]
        self.world = jax.tree.map(lambda *leaves: jnp.stack(leaves), *worlds)
        self.state, self.stats = programs.first(keys), [self.algorithm.first_stats(1) for _ in lanes]

    def train(self, updates: int) -> None:
        """Trains until `updates` updates have been made in total."""
        prompts = np.zeros(BATCH, int)
        for index in range(self.made, updates):
            data, scalars = self.programs.rollout(self.state[0], self.world, self.keys, jnp.int32(index))
            host = {name: np.asarray(value) for name, value in scalars.items()}
            weights = []
            for lane, stats in enumerate(self.stats):
                own = {name: value[lane] for name, value in host.items()}
                of_lane, self.stats[lane] = self.algorithm.weigh(stats, own, prompts)
                weights.append(of_lane)
            share, weight = jnp.full(LANES, WINDOW / (index + WINDOW)), np.stack(weights)
            self.state = self.programs.update(self.state, self.world, data, jnp.asarray(weight), self.rates, share)
        self.made = updates

    def policy(self, lane: int) -> Params:
        """The running mean of a lane's policy."""
        return jax.tree.map(lambda a: a[lane], self.state[1])


class Judge:
    """Evaluates policies, all with the same noise."""

    def __init__(self) -> None:
        ids, keys = jnp.zeros(JUDGED, jnp.int32), keys_of(jax.random.key(1234), JUDGED)

        def paths(policy: Params | World | None, world: World) -> Paths:
            base = world.model(False).predict

            def other(lora: Params | None, x: Points, level: Level, condition: PromptIds) -> Points:
                model = world if lora is None else lora
                return model.model(False).predict(None, x, level, condition)

            return sample_paths(other if isinstance(policy, World) else base, policy, CHAIN, keys, (2,), ids)

        self._paths = jax.jit(paths)

    def __call__(self, policy: Params | World | None, setting: Setting) -> dict[str, Any]:
        """Distances to the target and nats, of a policy, of the base model (None), or of another setting's exact
        network.

        log Z and needed are exact. The result is {} if a sample is not finite.
        """
        paths = self._paths(policy, World.of(setting))
        points = np.asarray(paths.latents, np.float64)
        if not np.isfinite(points).all():
            return {}
        near, spent = distance(points, setting.base.tilted(setting.k)), np.asarray(paths.spent, np.float64).sum(axis=1)
        reward = points @ setting.k
        needed, exponent = needed_for(float(reward.mean()), setting)
        excess = spent - reward
        return {
            "kl_policy_target": float(near.forward),
            "kl_target_policy": float(near.reverse),
            "weights": [round(w, 4) for w in near.weights],
            "log_reward": float(reward.mean()),
            "exponent": exponent,
            "needed": needed,
            "spent": float(spent.mean()),
            "efficiency": needed / float(spent.mean()) if spent.any() else None,
            "gap": float(excess.mean()) + setting.base.log_z(setting.k),
            "gap_error": float(excess.std() / np.sqrt(JUDGED)),
        }


def needed_for(reward: float, setting: Setting) -> tuple[float, float]:
    """The needed nats and the exponent of the base model tilted to the mean log R `reward`, in closed form."""
    base, k = setting.base, setting.k
    widest = (abs(reward) + np.abs(base.means @ k).max()) / (base.std**2 * (k @ k)) * 1.01 + 1.0
    exponent = brentq(lambda b: float(base.tilted(b * k).mean() @ k) - reward, -widest, widest)
    return exponent * reward - base.log_z(exponent * k), float(exponent)
