"""Grid files: the shipped ones, what a run takes from base and method, the order of the runs, and mistakes."""

import dataclasses
import math

import pytest

from nabla_gfn_jax import reproduce
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.reproduction.cells import in_order, planned
from nabla_gfn_jax.reproduction.grid import read
from nabla_gfn_jax.reproduction.progress import Progress, duration
from nabla_gfn_jax.settings import Settings

SMALL = """
updates = 8
seeds = [4, 5]

[bases.face]
config = "emoji"
fields.algorithm.beta = 8.0

[bases.animals]
config = "emoji_animals"

[methods.shipped]

[methods.ddpo]
config = "ddpo:emoji"
rates = [0.1, 0.2, 0.3]
fields.training.updates_per_epoch = 2
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("grid") / "small.toml"
    file.write_text(SMALL)
    return read(str(file))


def test_the_shipped_grid_of_the_emoji_model_is_fair():
    grid = read("emoji")
    assert len(grid.shared.seeds) == 3
    assert {base.config for base in grid.bases.values()} == {"emoji", "emoji_animals"}
    equal = {
        (s.training.trajectories, s.training.updates_per_epoch, s.training.num_epochs, s.sampling.num_steps)
        for s in grid.whole.values()
    }
    assert equal == {(32, 4, 40, 50)}
    assert {base: beta for base, beta in grid.betas.items()} == {"face": 8.0, "animals": 8.0}
    assert all(len(grid.rates(*pair)) >= 3 for pair in grid.whole)
    algorithms = {type(s.algorithm).__name__ for s in grid.whole.values()}
    assert len(algorithms) == 14  # all of the package's


def test_the_shipped_grid_of_the_paper():
    grid = read("sd15")
    assert (len(grid.methods), len(grid.bases), len(grid.shared.seeds)) == (7, 3, 3)
    for base, config in (("aesthetic", "aesthetic"), ("hps", "hps"), ("image_reward", "image_reward")):
        paper = load_settings(Settings, config)
        assert grid.whole[base, "residual"] == dataclasses.replace(paper, logging=grid.whole[base, "residual"].logging)
        for method in grid.methods:
            s = grid.whole[base, method]
            assert (s.model, s.reward, s.prompts) == (paper.model, paper.reward, paper.prompts)
            assert s.training.trajectories == 64
        assert grid.whole[base, "plain"].algorithm.output_regularisation == paper.algorithm.output_regularisation


def test_a_run_is_asked_for_what_the_base_says_and_trained_as_the_method_says(small):
    animals, ddpo = (load_settings(Settings, name) for name in ("emoji_animals", "ddpo:emoji"))
    found = small.whole["animals", "ddpo"]
    assert (found.reward, found.prompts) == (animals.reward, animals.prompts)
    assert found.algorithm == ddpo.algorithm
    assert (found.training.learning_rate, found.training.updates_per_epoch, found.training.num_epochs) == (0.1, 2, 4)
    assert small.whole["face", "shipped"].algorithm.beta == 8.0
    assert small.whole["animals", "shipped"].algorithm.beta == animals.algorithm.beta == 100.0
    assert small.betas == {"face": 8.0, "animals": 100.0}
    assert small.rates("face", "shipped") == (1e-3,)


def test_one_seed_of_all_methods_comes_first_and_the_other_seeds_have_the_best_rate(small):
    worst_is = {0.1: 3.0, 0.2: 1.0, 0.3: math.nan}  # the run with .3 has failed
    order = [(c.base, c.method, c.rate, c.seed) for c in in_order(small, lambda cell: worst_is[cell.rate])]
    first = [("face", "shipped", 1e-3, 4), ("face", "ddpo", 0.1, 4)]
    first += [("animals", "shipped", 1e-3, 4), ("animals", "ddpo", 0.1, 4)]
    tuning = [(base, "ddpo", rate, 4) for base in ("face", "animals") for rate in (0.2, 0.3)]
    assert order == [*first, *tuning, *((b, m, 0.2 if m == "ddpo" else r, 5) for b, m, r, _ in first)]
    assert len(planned(small)) == len(order)
    assert len({c.folder for c in in_order(small, lambda cell: worst_is[cell.rate])}) == len(order)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("updates = 8", "", "updates is missing; it must be a whole number of 1 or more"),
        ("updates = 8", "updates = 8\nsedes = [1]", "sedes is unknown (did you mean seeds?)"),
        ("updates = 8", "updates = 9", "training.updates_per_epoch = 4 does not divide updates = 9"),
        (
            "[methods.ddpo]",
            '[methods."../ddpo"]',
            "methods.../ddpo is not allowed; a name has letters, digits, - and _",
        ),
        ('"ddpo:emoji"', '"dpo:emoji"', "config dpo does not exist (did you mean ddpo?)"),
        ("rates = [0.1, 0.2, 0.3]", "rates = [0.0]", "methods.ddpo.rates = [0.0] is not allowed"),
        ("rates = [0.1, 0.2, 0.3]", 'variant = "x"', "variant = 'x' is of the base config"),
        ("training.updates_per_epoch = 2", "training.clap = 2", "--config.training.clap is unknown"),
        ("[methods.shipped]", "[methods]\nshipped = 3", "methods.shipped = 3 is not allowed; it must be a group"),
        ('config = "emoji_animals"', "", "bases.animals.config is missing"),
        ("seeds = [4, 5]", "seeds = [4, 5", "is no TOML file"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_the_file(tmp_path, before, after, said):
    file = tmp_path / "wrong.toml"
    assert before in SMALL
    file.write_text(SMALL.replace(before, after))
    with pytest.raises(UserError) as told:
        read(str(file))
    assert str(told.value).startswith(f"grid {file}")
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_grid_that_does_not_exist(capsys):
    for argv, said in ((["emojy"], "did you mean emoji?"), ([], "name one grid"), (["emoji", "sd15"], "name one grid")):
        with pytest.raises(SystemExit) as stop:
            reproduce.main(["nabla-gfn reproduce", *argv])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error


def test_the_time_left_is_that_of_the_methods_so_far(small, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nabla_gfn_jax.reproduction.progress.time.monotonic", lambda: now[0])
    cells = planned(small)
    progress = Progress(cells)
    assert progress.left() is None
    progress.passes(cells[0], 40.0)  # shipped: 4 epochs, 10 s each
    progress.begins(cells[1])
    for _ in range(cells[1].epochs):
        now[0] += 3.0
        progress.epoch()
    progress.ends(cells[1], cells[1].epochs)
    rest = cells[2:]
    expected = sum(c.epochs * (10.0 if c.method == "shipped" else 3.0) for c in rest)
    assert progress.left() == pytest.approx(expected)
    progress.begins(rest[0])
    now[0] += 5.0
    assert progress.left() == pytest.approx(expected - 5.0)
    progress.close()


@pytest.mark.parametrize(("seconds", "text"), [(7, "7 s"), (600, "10 min"), (9000, "2.5 h"), (360000, "4.2 days")])
def test_durations(seconds, text):
    assert duration(seconds) == text
