"""A run gives the same numbers on any number of devices, with one all-reduce per update."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_run import brightness, flags, last_of_each

from nabla_gfn_jax import parallel, train
from nabla_gfn_jax.command_line import parse_run
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.runs.checkpoints import Checkpoints
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training import loop
from nabla_gfn_jax.training.build import build, length

pytestmark = pytest.mark.thorough


@pytest.fixture
def saved(monkeypatch):
    """The saves of a run by epoch, on the host."""
    trees = {}
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, tree, about: trees.update({step: jax.device_get(tree)}))
    return trees


def without_images(monkeypatch):
    """Skips the images, which would be a third program to compile, with the operations of the rollout."""
    none = (np.zeros((16, 8, 8, 3), np.float32), {"log_reward": np.zeros(16, np.float32)})
    monkeypatch.setattr(loop.Programs, "images", lambda self, policy: none)


def use_devices(monkeypatch, number):
    monkeypatch.setattr(parallel, "all_devices", lambda: Mesh(jax.devices()[:number], (parallel.AXIS,)))


def fields(credit: str, parts: int) -> list[str]:
    chosen = {"algorithm.credit": credit, "algorithm.beta": 3000.0}
    chosen |= {"training.micro_batches": parts, "training.learning_rate": 0.001}
    return [f"--config.{name}={value}" for name, value in chosen.items()]


def distance(tree, other) -> float:
    """‖a − b‖ / ‖b‖ over all leaves."""
    flat, reference = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)]) for t in (tree, other)
    )
    return float(np.linalg.norm(flat - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("credit", ["adjoint", pytest.param("lookahead", marks=pytest.mark.slow)])
def test_devices_and_accumulation_change_no_number(command, saved, monkeypatch, tmp_path, credit):
    """Three epochs on 1, 2 and 8 devices, and with the batch accumulated in 1 and 2 parts.

    At the learning rate of the configs we ship: the gradients agree to 1e-6, but Adam moves a parameter whose gradient
    is round-off by up to the learning rate, whichever its sign. As g_φ starts at zero, most of its gradients are small
    at first: under the lookahead an epoch makes one update, as in the paper's configs. After six, g_φ on 1 and on 8
    devices differs by 1.1e-5, LoRA by 2.5e-6 and the optimizer's state by 3e-7 (on a CPU without AVX-512).
    """
    without_images(monkeypatch)
    results = {}
    updates = {"adjoint": 2, "lookahead": 1}[credit]
    for devices, parts in [(1, 2), (2, 1), (8, 2)]:
        use_devices(monkeypatch, devices)
        settings = [*fields(credit, parts), f"--config.training.updates_per_epoch={updates}"]
        command(tmp_path / f"{devices}x{parts}", *settings)
        results[devices] = dict(saved)
        saved.clear()
    alone = results.pop(1)
    for other in results.values():
        assert other.keys() == alone.keys() == {1, 2, 3}
        for epoch, tree in other.items():
            state, data = tree["state"], tree["data"]
            for group in ("lora", *(["correction"] if credit == "lookahead" else [])):
                assert distance(state.params[group], alone[epoch]["state"].params[group]) < 1e-5
            assert distance(state.optimizer, alone[epoch]["state"].optimizer) < 1e-5
            assert distance(data.last.y, alone[epoch]["data"].last.y) < 1e-5
            assert distance(data.ordinary.x, alone[epoch]["data"].ordinary.x) < 1e-5


@pytest.mark.parametrize("credit", ["adjoint", pytest.param("lookahead", marks=pytest.mark.slow)])
def test_one_all_reduce_an_update_and_none_in_sampling(tiny_model, monkeypatch, tmp_path, credit):
    """In the program of several updates an epoch on 8 devices: one, of LoRA and g_φ gradients, outside the loop over
    the micro-batches."""
    monkeypatch.setitem(REWARDS, "1.0", lambda: brightness(1.0))
    argv = ["train", *last_of_each([*flags(tiny_model, tmp_path), *fields(credit, 2)])]
    _, config = parse_run(argv, train.Options, Settings, "")
    trainer = build(config)
    state = parallel.place(trainer.first_state(0, config.lora.rank), trainer.mesh)
    compiled = loop.Programs(trainer, length(config), state).compiled
    assert "all-reduce" not in compiled["rollout"].as_text()
    update = compiled["update"].as_text()
    (where,) = loops_around(update, "all-reduce")
    assert where == 1  # the loop over the epoch's updates; the one over micro-batches is inside it
    reduced = re.search(r"f32\[(\d+)\]\S* all-reduce\(", update)
    assert reduced is not None
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert numbers <= int(reduced.group(1)) < numbers + 10  # and a few metrics
    assert max(loops_around(update, "dot")) > 1  # the count of loops sees nested ones


def loops_around(program: str, operation: str) -> list[int]:
    """For each `operation` of a compiled program, the number of loops around it."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    parent = {}
    for name, body in bodies.items():
        for line in body.splitlines():
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                parent[called] = (name, " while(" in line)

    def depth(name: str) -> int:
        if name not in parent:
            return 0
        outer, loop = parent[name]
        return depth(outer) + loop

    return [depth(name) for name, body in bodies.items() for _ in re.findall(rf" {operation}(?:-start)?\(", body)]


@pytest.mark.parametrize(
    ("trajectories", "parts", "advice"),
    [(12, 2, "use 8 or 16"), (4, 1, "use 8 "), (48, 5, "use 40 or 80"), (16, 0, "micro_batches = 0")],
)
def test_a_batch_that_does_not_divide_the_devices(monkeypatch, trajectories, parts, advice):
    use_devices(monkeypatch, 4 if parts == 2 else 8)
    with pytest.raises(UserError, match=advice):
        parallel.data_mesh(trajectories, parts)


@pytest.mark.parametrize("batch", [1, 6, 7, 16])
def test_a_device_for_each_core_that_the_batch_can_use(monkeypatch, batch):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    set_to = {}
    monkeypatch.setattr(parallel.jax.config, "update", set_to.__setitem__)
    parallel.use_cpu_cores(batch)
    assert not set_to  # as many as the tests ask for
    monkeypatch.setattr(type(parallel.jax.config), "jax_num_cpu_devices", -1, raising=False)
    parallel.use_cpu_cores(batch)
    assert set_to == {"jax_num_cpu_devices": {1: 1, 6: 6, 7: 1, 16: 4}[batch]}


def test_the_distance_that_these_tests_bound_sees_a_difference_of_1e_4():
    tree = {"a": jnp.ones(3), "b": jnp.zeros(2)}
    assert distance(jax.tree.map(lambda x: x * 1.0001, tree), tree) == pytest.approx(1e-4, rel=1e-2)
