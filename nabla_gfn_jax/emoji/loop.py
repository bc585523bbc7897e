"""The training loop of the VAE and the UNet: scanned steps, with a log and saves from which it resumes."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.checkpoints.files import write_whole
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Params, PRNGKey

Metrics = dict[str, Float[Array, ""]]
Loss = Callable[[Params, PRNGKey], tuple[Float[Array, ""], Metrics]]
_SECONDS_BETWEEN_SAVES = 120


@flax.struct.dataclass
class State:
    """Parameters, their exponential moving average, the optimizer's state, and the number of updates."""

    params: Params
    average: Params
    optimizer: optax.OptState
    step: Int[Array, ""]


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with gradients clipped to norm 1.

    The learning rate rises linearly over the first 200 updates (over half of all updates if there are fewer than 400)
    and then declines along a cosine to 1 % at `steps`.
    """
    warm_up = min(200, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, steps, 0.01 * learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))


def init_state(params: Params, transform: optax.GradientTransformation) -> State:
    """The state before the first update; the average starts at the parameters."""
    # Independent copies, because a donated buffer must not be passed twice.
    copy = jax.tree.map(jnp.copy, params)
    return State(params=params, average=copy, optimizer=transform.init(params), step=jnp.zeros((), jnp.int32))


def fit(
    name: str,
    state: State,
    loss: Loss,
    transform: optax.GradientTransformation,
    *,
    steps: int,
    seed: int,
    decay: float,
    workdir: Path,
    chunk: int = 50,
) -> State:
    """Minimises `loss(params, key)` until `state.step == steps`. Resumes from the last save in `workdir` if there is
    one.

    Step n uses only the key `fold_in(key(seed), n)`, so a resumed run gives the same result as an uninterrupted one.
    `decay` is the decay of the moving average. Every `chunk` steps, a row of means is written to
    `workdir/{name}.jsonl`. `workdir/{name}.msgpack` is saved every two minutes and at the end. Raises `UserError` if a
    mean is not finite; that state is not saved.
    """
    run = jax.jit(partial(_updates, loss, transform, seed, decay), static_argnums=1)
    file, log = workdir / f"{name}.msgpack", workdir / f"{name}.jsonl"
    if file.exists():
        state = _read(file, state)
    _keep_rows_up_to(log, int(state.step))
    start, begun, saved = time.time(), int(state.step), time.time()
    while (done := int(state.step)) < steps:
        state, metrics = run(state, min(chunk, steps - done))
        done = int(state.step)
        seconds = time.time() - start
        row: dict[str, Any] = {"step": done, "seconds": round(seconds, 1)}
        row |= {k: float(v) for k, v in metrics.items()}
        with log.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        if not np.isfinite(list(row.values())).all():
            raise UserError(f"{name}: the loss at step {done} is not finite; lower learning_rate in a new --workdir")
        left = seconds / (done - begun) * (steps - done)
        print(f"{name} {done}/{steps}  loss {row['loss']:.5f}  {left / 60:.1f} min left", flush=True)
        if time.time() - saved > _SECONDS_BETWEEN_SAVES:
            write_whole(file, flax.serialization.to_bytes(state))
            saved = time.time()
    write_whole(file, flax.serialization.to_bytes(state))
    return state


def _updates(
    loss: Loss, transform: optax.GradientTransformation, seed: int, decay: float, state: State, count: int
) -> tuple[State, Metrics]:
    """Makes `count` updates. Returns the new state and the means of the metrics."""

    def update(state: State, _: None) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
            updates, moments = transform.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # The decay grows with the step, as in TensorFlow's EMA, so that the average of a short run forgets the start.
        made = state.step.astype(jnp.float32)
        weight = jnp.minimum(decay, (1.0 + made) / (10.0 + made))
        average = jax.tree.map(lambda a, p: weight * a + (1.0 - weight) * p, state.average, params)
        new = State(params=params, average=average, optimizer=moments, step=state.step + 1)
        return new, {"loss": value, **metrics}

    state, metrics = jax.lax.scan(update, state, None, length=count)
    return state, jax.tree.map(jnp.mean, metrics)


def _keep_rows_up_to(log: Path, step: int) -> None:
    """Drops the rows of updates after the last save, which will be repeated."""
    if log.exists():
        rows = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(log, "".join(row for row in rows if json.loads(row)["step"] <= step).encode())


def _read(file: Path, state: State) -> State:
    try:
        read = flax.serialization.from_bytes(state, file.read_bytes())
        same = jax.tree.map(lambda a, b: jnp.shape(a) == jnp.shape(b), read, state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is not a save of this configuration; use another --workdir ({error})") from error
    if not all(jax.tree.leaves(same)):
        raise UserError(f"{file} was saved by another configuration; use another --workdir")
    return jax.tree.map(jnp.asarray, read)
