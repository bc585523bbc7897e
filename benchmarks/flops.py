"""Compares the FLOPs of an update's gradient with the naive program's, at Stable Diffusion 1.5's size; nothing runs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from naive_program import naive_value_and_grad

from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.flops import count_flops
from nabla_gfn_jax.parallel import data_mesh
from nabla_gfn_jax.planning.phases import abstract_trainer
from nabla_gfn_jax.settings import Settings


def run() -> Iterator[tuple[str, str, str, str]]:
    """`configs/hps.py`, one trajectory's six transitions, without rematerialisation."""
    fields = {"remat": False, "images_at_once": 0, "trajectories": 1, "micro_batches": 1}
    config = load_settings(Settings, "hps", {f"training.{name}": value for name, value in fields.items()})
    mesh = data_mesh(1, 1, jax.local_devices()[:1])
    trainer = abstract_trainer(config, mesh)
    params = jax.eval_shape(lambda: trainer.first_state(0, config.lora.rank)).params
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    ids, weight = jax.ShapeDtypeStruct((1,), jnp.int32), jnp.ones(1)
    data = jax.eval_shape(trainer.rollout, trainer.frozen_params, params, keys, ids).data
    data = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), data)

    def ours(frozen: Any, params: Any, t: Any) -> Any:
        return trainer.algorithm.value_and_grad(params, trainer.model(frozen), t, weight)

    def naive(frozen: Any, params: Any, t: Any) -> Any:
        whole = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), flatten(t.ordinary), t.last)
        return naive_value_and_grad(trainer.algorithm, params, trainer.model(frozen), whole)

    counts: list[tuple[str, Callable[..., float]]] = [
        ("counted in the traced program", lambda f, *a: sum(count_flops(f, *a).values())),
        ("by XLA", lambda f, *a: jax.jit(f).lower(*a).cost_analysis()["flops"]),
    ]
    for how, count in counts:
        a, b = (count(f, trainer.frozen_params, params, data) / 1e12 for f in (naive, ours))
        yield f"(d) TFLOP of a trajectory's update, SD-1.5, {how}", f"{a:.1f} (naive)", f"{b:.1f}", f"here {b / a:.3f}"
