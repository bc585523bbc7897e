"""Tests whether algorithms sample from the right distribution, on a problem in the plane with an exact target.

    python -m nabla_gfn_jax.studies.mixture2d --out=runs/mixture2d

The base "model" is the closed-form noise prediction of a Gaussian mixture, sampled in Stable Diffusion's 50 DDPM steps.
With --base=flow, it is the velocity field of a rectified flow, sampled by the memoryless process. The reward is log
R(x) = k·x, so the target P_base(x) R(x) is a mixture too. The policy adds an MLP to the base, and the algorithms are
the same as for images.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import Algorithm, Model, Rollout
from nabla_gfn_jax.algorithms.draft import Draft
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.path_regression import PathRegression
from nabla_gfn_jax.algorithms.value_gradient import ValueGradient
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.chain import Level, expand, rectified_flow_chain, stable_diffusion_chain
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.studies.mixture import Distance, Mixture, Points, cell_kl, distance, sampled
from nabla_gfn_jax.typing import Params, PerSample, PRNGKey, PromptIds, Timesteps

DATA = Mixture(np.array([0.4, 0.4, 0.2]), np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), 0.3)
REWARDS = {"mild": np.array([0.5, 0.25]), "doubled": np.array([1.0, 0.5])}
CHAINS = {"diffusion": stable_diffusion_chain(STABLE_DIFFUSION, 50), "flow": rectified_flow_chain(50)}
BASES = {name: sampled(DATA, chain) for name, chain in CHAINS.items()}  # sampled by 50 steps with the exact output
BASE = BASES["diffusion"]
WIDTH, FREQUENCIES = 128, 8
SYMBOLS: dict[Any, str] = {"alpha_bar": "ᾱ", "sqrt_alpha_bar": "√ᾱ", "one": "1"}
AVERAGE = 0.99  # decay of the running mean of policy parameters, which is evaluated
CREDITS: tuple[Any, ...] = ("adjoint", "innovation")  # of the path regression
CHUNK = 5  # updates between two checks of the mean reward


@dataclass(frozen=True, kw_only=True)
class Run:
    """An algorithm and its training, for one line of the table."""

    name: str
    algorithm: Algorithm
    batch: int = 128
    updates: int = 3000
    learning_rate: float = 1e-3
    gradient_clip: float = float("inf")
    stop_at_target_reward: bool = False


class Result(NamedTuple):
    """One line of the table: the distances of a policy's samples to the target, in nats, and its mean log R."""

    name: str
    reward: str
    updates: int
    seconds: float
    kl_policy_target: float
    kl_target_policy: float
    kl_cells: float
    weights: tuple[float, ...]
    mean_reward: float


def make_model(k: Float[np.ndarray, "2"], base: str = "diffusion", data: Mixture = DATA) -> Model:
    """The exact base plus an MLP of (x, x̂_#, t), which is scaled to outputs of order 1 at every time; log R = k·x."""
    direction = jnp.asarray(k, jnp.float32)

    def exact(x: Points, level: Level) -> Points:
        if base == "flow":
            return data.velocity(expand(level.input_scale, x) * x, level.time / 1000)
        return data.noise_prediction(x, level.signal)

    def predict(lora: Params | None, x: Points, level: Level, condition: PromptIds) -> Points:
        output = exact(x, level)
        if lora is None:
            return output
        inputs = jnp.concatenate([x, level.clean(output, x)], axis=1)
        return output + expand(jnp.sqrt(1 - level.signal) / level.clean_o, x) * mlp(lora, inputs, level.time)

    def correction(phi: Params, x: Points, level: Level, prompt_id: PromptIds) -> Points:
        return mlp(phi, x, level.time)

    def flow(phi: Params, x: Points, level: Level, prompt_id: PromptIds) -> PerSample:
        return mlp(phi, x, level.time)[:, 0]

    heads = {"correction": correction, "flow": flow}
    return Model(CHAINS[base], predict, lambda z, prompt_id: z @ direction, heads)


def init_mlp(key: PRNGKey, inputs: int, outputs: int = 2, width: int = WIDTH) -> Params:
    """Parameters of an MLP with three hidden layers.

    The last layer is zero: training starts from the base and g_φ = 0.
    """
    sizes = [inputs + 2 * FREQUENCIES, width, width, width, outputs]
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        scale = fan_in**-0.5 if i < len(sizes) - 2 else 0.0
        kernel = scale * jax.random.normal(jax.random.fold_in(key, i), (fan_in, fan_out))
        params[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
    return params


def mlp(params: Params, inputs: Float[Array, "batch width"], t: Timesteps) -> Float[Array, "batch outputs"]:
    """The MLP of the inputs and of sinusoidal features of the time `t`, 0 to 1000."""
    phase = t.astype(jnp.float32)[:, None] / 1000 * (np.pi * 2.0 ** np.arange(-1, FREQUENCIES - 1))[None].astype("f4")
    hidden = jnp.concatenate([inputs, jnp.sin(phase), jnp.cos(phase)], axis=1)
    layers = list(params.values())
    for layer in layers[:-1]:
        hidden = jax.nn.silu(hidden @ layer["kernel"] + layer["bias"][None])
    return hidden @ layers[-1]["kernel"] + layers[-1]["bias"][None]


def keys_of(key: PRNGKey, number: int) -> Array:
    """`number` keys derived from `key`."""

    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(number))


def draw(lora: Params | None, model: Model, number: int, key: PRNGKey) -> Points:
    """`number` samples of the policy, (number, 2); `lora` None is the base model."""
    ids = jnp.zeros(number, jnp.int32)
    run = jax.jit(lambda lora, keys: sample(model.predict, lora, model.chain, keys, (2,), ids).samples)
    return run(lora, keys_of(key, number))


def train(run: Run, model: Model, target_reward: float, seed: int = 0) -> tuple[Params, int]:
    """Makes on-policy updates, each on a new batch. Returns the averaged policy and the number of updates."""
    lora_key, head_key, sample_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(3))
    params = {"lora": init_mlp(lora_key, 4)} | {name: init_mlp(head_key, 2) for name in run.algorithm.heads()}
    rate = optax.cosine_decay_schedule(run.learning_rate, run.updates)
    one = optax.chain(optax.clip_by_global_norm(run.gradient_clip), optax.adam(rate))
    optimizer = optax.partition(dict.fromkeys(params, one), {name: name for name in params})
    ids, prompts = jnp.zeros(run.batch, jnp.int32), np.zeros(run.batch, int)

    @jax.jit
    def rollout(params: Params, index: Array) -> tuple[Any, dict[str, Array]]:
        keys = keys_of(jax.random.fold_in(sample_key, index), run.batch)
        trajectory = sample(model.predict, params["lora"], model.chain, keys, (2,), ids)
        log_reward = model.log_reward(trajectory.samples, ids)
        batch = run.algorithm.batch(params, model, Rollout(trajectory, log_reward, ids, keys), 1)
        return jax.tree.map(lambda a: a[0], batch.data), {"log_reward": log_reward, **batch.scalars}

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, data: Any, weight: Array) -> Any:
        params, average, optimizer_state = state
        _, gradient = run.algorithm.value_and_grad(params, model, data, weight)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int counts and floats
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params["lora"], average, 1 - AVERAGE), optimizer_state

    state = (params, jax.tree.map(jnp.copy, params["lora"]), optimizer.init(params))
    stats, rewards = run.algorithm.first_stats(1), list[float]()
    for index in range(run.updates):
        data, scalars = rollout(state[0], jnp.int32(index))
        host = {name: np.asarray(value) for name, value in scalars.items()}
        weight, stats = run.algorithm.weigh(stats, host, prompts)
        state = update(state, data, weight)
        rewards.append(float(host["log_reward"].mean()))
        looks = run.stop_at_target_reward and len(rewards) % CHUNK == 0
        if looks and np.mean(rewards[-CHUNK:]) >= target_reward:
            return state[0]["lora"], len(rewards)
    return state[1], run.updates


def judge(points: np.ndarray, target: Mixture) -> tuple[Distance, float]:
    """Distances of samples to the target. They are infinite if a sample is not finite."""
    if not np.isfinite(points).all():
        nothing = Distance(float("inf"), float("inf"), (float("nan"),) * len(target.weights))
        return nothing, float("inf")
    return distance(points, target), cell_kl(points, target)


def study(
    run: Run, reward: str, samples: int = 20_000, seed: int = 0, base: str = "diffusion"
) -> tuple[Result, np.ndarray]:
    """Trains one variant towards one reward. Returns the measurements and the samples."""
    model, target = make_model(REWARDS[reward], base), BASES[base].tilted(REWARDS[reward])
    start = time.time()
    lora, updates = train(run, model, float(target.mean() @ REWARDS[reward]), seed)
    seconds = time.time() - start
    points = np.asarray(draw(lora, model, samples, jax.random.key(1234)), np.float64)
    return summary(run.name, reward, target, points, updates, seconds), points


def summary(
    name: str, reward: str, target: Mixture, points: np.ndarray, updates: int = 0, seconds: float = 0.0
) -> Result:
    """The line of the table for these samples."""
    near, cells = judge(points, target)
    mean_reward = float((points @ REWARDS[reward]).mean())
    return Result(
        name, reward, updates, round(seconds, 1), near.forward, near.reverse, cells, near.weights, mean_reward
    )


def references(reward: str, samples: int = 20_000, base: str = "diffusion") -> list[tuple[Result, np.ndarray]]:
    """The reference rows: exact samples of the target, which show the bias of the estimates, and the base model."""
    target, model = BASES[base].tilted(REWARDS[reward]), make_model(REWARDS[reward], base)
    exact = target.sample(np.random.default_rng(0), samples)
    points = np.asarray(draw(None, model, samples, jax.random.key(1234)), np.float64)
    return [
        (summary("exact draws", reward, target, exact), exact),
        (summary("base model", reward, target, points), points),
    ]


def runs(updates: int) -> list[Run]:
    """The runs of the table."""
    lookahead = [
        Run(
            name=f"lookahead, γ = {SYMBOLS[gamma]}" + (", φ from the forward loss too" if forward else ""),
            algorithm=ResidualNablaDB(beta=1.0, gamma=gamma, correction_from_forward=forward),
            gradient_clip=1.0,
            updates=updates,
        )
        for gamma in SYMBOLS
        for forward in (True, False)
    ]
    guess = [
        Run(
            name=f"guess, γ = {SYMBOLS[gamma]}",
            algorithm=ResidualNablaDB(beta=1.0, credit="guess", gamma=gamma),
            gradient_clip=1.0,
            updates=updates,
        )
        for gamma in SYMBOLS
    ]
    adjoint = ResidualNablaDB(beta=1.0, credit="adjoint")
    return [
        *lookahead,
        *guess,
        Run(name="adjoint", algorithm=adjoint, updates=updates),
        Run(name="adjoint, gradient clip 1", algorithm=adjoint, gradient_clip=1.0, updates=updates),
        Run(
            name="adjoint, credit clip 3",
            algorithm=ResidualNablaDB(beta=1.0, credit="adjoint", credit_clip=3.0),
            updates=updates,
        ),
        Run(name="adjoint, batch 512", algorithm=adjoint, batch=512, updates=updates),
        *(
            Run(
                name=f"path regression, {credit}, batch 512",
                algorithm=PathRegression(beta=1.0, credit=credit),
                batch=512,
                updates=updates,
            )
            for credit in CREDITS
        ),
        *(
            Run(
                name="value gradient" + ("" if guess else ", no gradient of the reward"),
                algorithm=ValueGradient(beta=1.0, guess=guess, steps=6, states=10),
                batch=256,
                updates=updates,
            )
            for guess in (True, False)
        ),
        Run(
            name="DRaFT-10, stopped at the target reward",
            algorithm=Draft(last_steps=10),
            batch=512,
            learning_rate=3e-5,
            updates=updates,
            stop_at_target_reward=True,
        ),
    ]


def table(results: Sequence[Result]) -> str:
    """A Markdown table with one line per result. p is the policy, q the target."""
    lines = [
        "| reward | variant | updates | KL(p‖q) | KL(q‖p) | KL, cells | weights | mean reward | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        weights = " / ".join(f"{w:.3f}" for w in r.weights)
        kl = " | ".join(f"{v:.4f}" for v in (r.kl_policy_target, r.kl_target_policy, r.kl_cells))
        head = f"| {r.reward} | {r.name} | {r.updates} |"
        lines.append(f"{head} {kl} | {weights} | {r.mean_reward:.3f} | {r.seconds:.0f} |")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The runs to make, and the folder for their results."""

    out: Path = option(meaning="folder for results.json, table.md and samples.npz")
    updates: int = option(3000, "updates of each run", minimum=1)
    base: Literal["diffusion", "flow"] = option("diffusion", "the prediction type of the exact network, and its chain")
    only: str = option("", "only the runs whose name contains this text", empty=True)
    seed: int = option(0, "seed of every random number", minimum=0, maximum=LARGEST_SEED)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Trains and measures the chosen runs for each reward. Writes the results after each reward."""
    arguments = parse(argv, Options, __doc__)
    chosen = [run for run in runs(arguments.updates) if arguments.only in run.name]
    if not chosen:
        names = "; ".join(run.name for run in runs(1))
        raise UserError(f"--only={arguments.only!r} names no run; the runs are: {names}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    samples: dict[str, np.ndarray] = {}
    for reward in REWARDS:
        done = references(reward, base=arguments.base)
        for run in chosen:
            done.append(study(run, reward, seed=arguments.seed, base=arguments.base))
            print(table([done[-1][0]]).splitlines()[-1], flush=True)
        results += [result for result, _ in done]
        samples |= {f"{reward}: {result.name}": points.astype(np.float32) for result, points in done}
        (arguments.out / "results.json").write_text(json.dumps([r._asdict() for r in results], indent=1))
        (arguments.out / "table.md").write_text(table(results) + "\n")
        np.savez_compressed(arguments.out / "samples.npz", allow_pickle=False, **samples)
    print(table(results))


if __name__ == "__main__":
    main(sys.argv)
