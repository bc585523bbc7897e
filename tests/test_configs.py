"""Every config file with every variant is a valid run."""

from pathlib import Path

import pytest

from nabla_gfn_jax.command_line import load_config, load_settings, shipped_configs
from nabla_gfn_jax.data.prompts import PROMPT_SETS
from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.emoji.settings import Pretraining
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import leaves
from nabla_gfn_jax.settings import Settings

FOLDER = Path(__file__).parents[1] / "configs"
PAPER = {"hps": (500_000.0, 5000.0), "aesthetic": (10_000.0, 2000.0), "image_reward": (10_000.0, 5000.0)}
RUNS = [
    *((name, "") for name in ("emoji", "emoji_animals")),
    *((name, variant) for name in ("ddpo", "draft", "refl") for variant in ("", "emoji")),
    *((name, variant) for name in ("plain_nabla_db", "terminal", "residual_db", "dag_db") for variant in ("", "emoji")),
    *((name, variant) for name in ("eam", "ram", "awm", "nft") for variant in ("", "emoji")),
    ("draft", "lv"),
    *(("path_regression", variant) for variant in ("", "innovation")),
    *(("emoji_exact", variant) for variant in ("", "network")),
    *((name, variant) for name in PAPER for variant in ("", "forward_only", "fast")),
]


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_every_field_is_understood_and_stated(name, variant):
    run = load_settings(Settings, f"{name}:{variant}")
    if hasattr(run.algorithm, "bins"):
        steps = run.sampling.num_steps * run.algorithm.transition_fraction
        assert run.algorithm.bins(run.sampling.num_steps) == round(steps)
    stable_diffusion_chain(STABLE_DIFFUSION, run.sampling.num_steps, sampler=run.sampling.sampler)
    assert run.prompts in PROMPT_SETS
    assert run.training.trajectories % (8 * run.training.micro_batches) == 0 or "emoji" in (
        name[:5],
        variant,
        run.model,
    )


def test_no_run_or_base_of_runs_is_left_out():
    """`paper` has the common settings of the paper's three configs; `emoji_base` makes the emoji model."""
    assert set(shipped_configs()) == {*(name for name, _ in RUNS), "paper", "emoji_base"}
    load_settings(Pretraining, "emoji_base")


@pytest.mark.parametrize("name", ["emoji", "paper"])
def test_a_config_that_others_are_made_of_states_every_field(name):
    """Such a config states all fields for the reader, except those that no experiment varies."""
    tree = load_config(name).to_dict()
    stated = {f"{group}.{field}" for group, fields in tree.items() if isinstance(fields, dict) for field in fields}
    stated |= {field for field, value in tree.items() if not isinstance(value, dict)}
    assert set(leaves(Settings, tree)) - stated == {"algorithm.correction_from_forward", "training.skipped_updates"}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    run = load_settings(Settings, name)
    assert (run.algorithm.beta, run.algorithm.output_regularisation) == PAPER[name]
    assert run.algorithm.credit == "lookahead"
    assert run.algorithm.heads() == {"correction": "vector"}
    assert run.training.num_epochs * run.training.updates_per_epoch == 200
    fast = load_settings(Settings, f"{name}:fast")
    assert (fast.sampling.num_steps, fast.sampling.sampler, fast.algorithm.credit) == (20, "sde_dpm_solver", "guess")


def test_an_unknown_variant():
    with pytest.raises(UserError, match="there is no variant 'quick'; use none, or one of forward_only, fast"):
        load_settings(Settings, f"{FOLDER / 'hps.py'}:quick")
    with pytest.raises(UserError, match="has no variants; leave out :fast"):
        load_settings(Settings, f"{FOLDER / 'emoji.py'}:fast")
