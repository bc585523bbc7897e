"""The training loop that the VAE and the UNet share: scanned steps, resumable, logged."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Params, PRNGKey


@flax.struct.dataclass
class State:
    """Parameters, their exponential moving average, the optimizer's state, the number of updates made."""

    params: Params
    average: Params
    optimizer: optax.OptState
    step: Int[Array, ""]


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a linear warm-up over 200 updates, cosine decay to 1 % at `steps`, gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 200, steps, 0.01 * learning_rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))


def init_state(params: Params, transform: optax.GradientTransformation) -> State:
    """The state before the first update; the average starts at the parameters."""
    # Independent copies: a donated buffer may not be passed twice.
    copy = jax.tree.map(jnp.copy, params)
    return State(params=params, average=copy, optimizer=transform.init(params), step=jnp.zeros((), jnp.int32))


def fit(
    name: str,
    state: State,
    loss: Callable[[Params, PRNGKey], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]],
    transform: optax.GradientTransformation,
    *,
    steps: int,
    seed: int,
    decay: float,
    workdir: Path,
    chunk: int = 50,
) -> State:
    """Minimises `loss(params, key)` until `state.step == steps`, from the workdir's last save if there is one.

    Step `n` draws from `fold_in(key(seed), n)` alone, so a resumed run repeats an uninterrupted one. `decay` is the
    moving average's. Appends to `workdir/{name}.jsonl`; saves `workdir/{name}.msgpack` every two minutes and last.
    """

    def update(state: State, _: None) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, key)
        updates, moments = transform.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A short run must not average in its random start: the decay grows with the step, as in TensorFlow's EMA.
        count = state.step.astype(jnp.float32)
        weight = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
        average = jax.tree.map(lambda a, p: weight * a + (1.0 - weight) * p, state.average, params)
        new = State(params=params, average=average, optimizer=moments, step=state.step + 1)
        return new, {"loss": value, **metrics}

    @jax.jit
    def run(state: State) -> tuple[State, dict[str, Array]]:
        state, metrics = jax.lax.scan(update, state, None, length=chunk)
        return state, jax.tree.map(jnp.mean, metrics)

    file = workdir / f"{name}.msgpack"
    if file.exists():
        state = _read(file, state)
    start, begun, saved = time.time(), int(state.step), time.time()
    while (done := int(state.step)) < steps:
        state, metrics = run(state)
        seconds = time.time() - start
        row: dict[str, Any] = {"step": done + chunk, "seconds": round(seconds, 1)}
        row |= {k: float(v) for k, v in metrics.items()}
        with (workdir / f"{name}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        left = seconds / (done + chunk - begun) * (steps - done - chunk)
        print(f"{name} {done + chunk}/{steps}  loss {row['loss']:.5f}  {left / 60:.1f} min left", flush=True)
        if time.time() - saved > 120:
            _write(file, state)
            saved = time.time()
    _write(file, state)
    return state


def _write(file: Path, state: State) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(flax.serialization.to_bytes(state))
    partial.replace(file)


def _read(file: Path, state: State) -> State:
    try:
        read = flax.serialization.from_bytes(state, file.read_bytes())
        same = jax.tree.map(lambda a, b: jnp.shape(a) == jnp.shape(b), read, state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is not a save of this configuration; use another --workdir ({error})") from error
    if not all(jax.tree.leaves(same)):
        raise UserError(f"{file} was saved by another configuration; use another --workdir")
    return jax.tree.map(jnp.asarray, read)
