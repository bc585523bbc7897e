"""Numbers that are not finite: a sample is lost and not the run, and an update that they spoil is not applied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import without_images
from test_training import rows as read
from test_training import without_time
from tiny_run import flags, last_of_each

from nabla_gfn_jax import parallel, train
from nabla_gfn_jax.command_line import parse_run
from nabla_gfn_jax.rewards import REWARDS, Reward
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training import faults
from nabla_gfn_jax.training.build import build, length
from nabla_gfn_jax.training.loop import Programs

CREDIT = "--config.algorithm.credit=adjoint"


def gaps(chance: float) -> Reward:
    """The mean pixel, which is NaN for about one image in 1/`chance`, chosen by its low digits."""

    def score(params, images, features):
        value = images.mean(axis=(1, 2, 3))
        return jnp.where((value * 1e3) % 1.0 < params["chance"], jnp.nan, value)

    return Reward(params={"chance": jnp.float32(chance)}, encode_prompts=lambda prompts: {}, score=score)


@pytest.fixture(scope="module")
def programs(tiny_model, tmp_path_factory):
    """Rollout and update on 8 devices, with two micro-batches of one sample on each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "1.0", lambda: gaps(0.0))
        argv = ["train", *last_of_each([*flags(tiny_model, tmp_path_factory.mktemp("run")), CREDIT])]
        _, config = parse_run(argv, train.Options, Settings, "")
        trainer = build(config)
    state = parallel.place(trainer.first_state(0, config.lora.rank), trainer.mesh)
    made = Programs(trainer, length(config), state)
    return made, state, made.rollout(0, state.params)[0]


def host(tree):
    return jax.tree.map(np.asarray, jax.device_get(tree))


def spoil(data, sample, update):
    """The training data with one number of one sample in one update replaced by inf."""
    leaves, form = jax.tree.flatten(host(data))
    place = next(i for i, leaf in enumerate(leaves) if np.issubdtype(leaf.dtype, np.floating))
    leaves[place] = leaves[place].copy()
    leaves[place][update, sample].reshape(-1)[0] = np.inf
    return jax.tree.unflatten(form, leaves)


@pytest.mark.thorough
def test_an_update_that_is_not_finite_is_not_applied_and_names_term_and_samples(programs):
    """On 8 devices the second of two updates is spoilt by sample 5: the state is as after the first, bit by bit."""
    made, state, sampled = programs
    weight = np.ones(16, np.float32)
    data = host(sampled.data)
    good, _ = made.update(0, state, sampled.data, weight)
    after, steps = made.update(0, state, put(made, spoil(data, 5, 1)), weight)
    assert np.asarray(steps.applied).tolist() == [True, False]
    finite = np.asarray(steps.finite)
    assert finite.shape == (2, 16)
    assert finite[0].all()
    assert np.flatnonzero(~finite[1]).tolist() == [5]
    text = faults.describe_skipped(steps.metrics, np.asarray(steps.applied), finite, 16)
    assert {"grad_norm_lora", "loss"} <= set(text.removesuffix(" of sample 5").split(", "))
    assert distance(good.params, after.params) > 0  # the second update of the good data moved it
    again, steps = made.update(0, state, put(made, spoil(spoil(data, 5, 1), 3, 0)), weight)
    assert not np.asarray(steps.applied).any()
    for name in ("params", "optimizer"):
        same(getattr(again, name), getattr(state, name))
    assert int(again.step) == 2  # updates of the plan, as the names of the LoRAs say
    numbers = faults.mean_applied(steps.metrics, np.asarray(steps.applied))
    assert np.isnan(numbers["loss"])


def put(made, data):
    return parallel.place(data, made.trainer.mesh, jax.sharding.PartitionSpec(None, parallel.AXIS))


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, host(tree), host(other))


def distance(tree, other):
    pairs = zip(jax.tree.leaves(host(tree)), jax.tree.leaves(host(other)), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.thorough
def test_the_state_before_is_not_overwritten(programs):
    """A signal saves it while the update runs."""
    made, state, sampled = programs
    before = host(state)
    made.update(0, state, sampled.data, np.ones(16, np.float32))
    same(state, before)


def test_a_weight_that_is_not_finite_spoils_the_update(programs):
    """Also if the loss does not depend on it, as in residual ∇-DB."""
    made, state, sampled = programs
    weight = np.ones(16, np.float32)
    weight[9] = np.nan
    after, steps = made.update(0, state, sampled.data, weight)
    assert not np.asarray(steps.applied).any()
    same(after.params, state.params)
    finite = np.asarray(steps.finite)
    assert faults.describe_skipped(steps.metrics, np.asarray(steps.applied), finite, 16) == "weights of sample 9"


def test_the_samples_of_a_rollout_are_looked_at_one_by_one(programs):
    made, state, sampled = programs
    assert set(sampled.finite) == {"latents", "training data"}
    assert all(np.asarray(rows).all() for rows in sampled.finite.values())
    data = host(sampled.data)
    for sample in (0, 7, 15):
        found = np.asarray(faults.finite_rows(spoil(data, sample, 1), 1))
        assert np.flatnonzero(~found).tolist() == [sample]
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.inf), state.params)  # a policy whose samples are none
    assert not np.asarray(made.rollout(0, broken)[0].finite["latents"]).any()


def test_another_sample_takes_the_place_of_a_lost_one_on_any_device(programs):
    made, _, sampled = programs
    chosen = np.array([0, 15, *range(2, 16)])
    taken = made.trainer.take(sampled.data, chosen)
    for new, old in zip(jax.tree.leaves(taken), jax.tree.leaves(sampled.data), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old)[:, chosen])


def test_who_stands_in():
    """Of the same prompt if there is one, the lost ones in turn; otherwise any."""
    whole = np.array([True, False, True, False, True, False, False])
    prompt = np.array([0, 0, 0, 0, 1, 2, 1])
    assert faults.stand_ins(whole, prompt).tolist() == [0, 0, 2, 2, 4, 4, 4]
    assert faults.stand_ins(np.ones(7, bool), prompt).tolist() == list(range(7))


def test_what_is_lost_is_named():
    scalars = {"log_reward": np.array([0.0, np.nan, 1.0]), "log_reward_hps": np.ones(3), "clean": np.ones((3, 2, 2))}
    scalars["clean"][2, 1, 0] = -np.inf
    lost = faults.lost_by(scalars, {"latents": np.ones(3, bool), "training data": np.array([True, False, True])})
    assert faults.describe_lost(lost) == "training data of sample 1, reward of sample 1, clean of sample 2"
    assert faults.samples(range(3, 20)) == "samples 3, 4, 5, 6, 7, 8, 9, 10 and 9 more"


@pytest.mark.parametrize(
    ("before", "applied", "after"), [(0, [1, 1], 0), (0, [0, 0], 2), (2, [0], 3), (2, [1], 0), (2, [0, 1, 0], 1)]
)
def test_updates_in_a_row(before, applied, after):
    assert faults.in_a_row(before, np.array(applied, bool)) == after


@pytest.mark.thorough
def test_a_reward_that_is_nan_for_some_images_loses_these_and_not_the_run(command, tmp_path, monkeypatch, capsys):
    """The log's reward is the mean of the others, and says how many were lost. A resumed run has the same numbers."""
    without_images(monkeypatch)
    monkeypatch.setattr("tiny_run.brightness", lambda scale: gaps(0.1))
    seen = []
    weigh = faults.lost_by
    monkeypatch.setattr("nabla_gfn_jax.training.loop.lost_by", lambda s, f: seen.append(s["log_reward"]) or weigh(s, f))
    command(tmp_path / "whole", CREDIT)
    rows = read(tmp_path / "whole")
    lost = [int(np.isnan(rewards).sum()) for rewards in seen]
    assert 0 < sum(lost) < 40
    assert [row["lost_samples"] for row in rows] == lost
    for row, rewards in zip(rows, seen, strict=True):
        assert row["reward_mean"] == pytest.approx(np.nanmean(rewards), rel=1e-6)
    assert [row["skipped_updates"] for row in rows[1:-1]] == [0, 0, 0]
    assert all(np.isfinite(row["loss"]) for row in rows[1:-1])
    told = [line for line in capsys.readouterr().err.splitlines() if "loses" in line]
    assert len(told) == sum(n > 0 for n in lost)
    epoch = next(i for i, n in enumerate(lost) if n)
    of = faults.samples(np.flatnonzero(np.isnan(seen[epoch])))
    assert f"epoch {epoch} loses {lost[epoch]} of 16 samples; not finite: " in told[0]
    assert f"reward of {of}" in told[0]

    command(tmp_path / "parts", CREDIT, "--config.training.num_epochs=1")
    command(tmp_path / "parts", CREDIT)
    assert list(map(without_time, read(tmp_path / "parts"))) == list(map(without_time, rows))
    last = "lora/00006/diffusers.safetensors"
    assert (tmp_path / "parts" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
