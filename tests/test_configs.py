"""Every config file with every variant is a run that the program accepts."""

from pathlib import Path

import pytest

from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.command_line import load_config, parse_flags
from nabla_gfn_jax.configuration import ALGORITHMS, DTYPES
from nabla_gfn_jax.data.prompts import PROMPT_SETS
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, make_schedule
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards import REWARDS

FOLDER = Path(__file__).parents[1] / "configs"
PAPER = {"hps": (500_000.0, 5000.0), "aesthetic": (10_000.0, 2000.0), "image_reward": (10_000.0, 5000.0)}
RUNS = [
    *((name, "") for name in ("emoji", "emoji_animals", "emoji_maximiser")),
    *((name, variant) for name in PAPER for variant in ("", "forward_only", "fast")),
]


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_every_field_is_understood(name, variant):
    config = load_config(FOLDER / f"{name}.py", variant)
    algorithm = ALGORITHMS[config.algorithm.name](**{k: v for k, v in config.algorithm.items() if k != "name"})
    if isinstance(algorithm, ResidualNablaDB):
        bins = algorithm.bins(config.sampling.num_steps)
        assert bins == round(config.sampling.num_steps * algorithm.transition_fraction)
    make_schedule(STABLE_DIFFUSION, config.sampling.num_steps, sampler=config.sampling.sampler)
    assert config.reward in REWARDS
    assert config.prompts in PROMPT_SETS
    assert config.model_dtype in DTYPES
    assert config.training.trajectories % (8 * config.training.micro_batches) == 0 or name.startswith("emoji")
    for group in ("lora", "flow", "training", "logging"):
        assert config[group].keys() == load_config(FOLDER / "emoji.py")[group].keys()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    config = load_config(FOLDER / f"{name}.py")
    assert (config.algorithm.beta, config.algorithm.output_regularisation) == PAPER[name]
    assert config.algorithm.credit == "lookahead"
    assert ResidualNablaDB(**{k: v for k, v in config.algorithm.items() if k != "name"}).uses_flow
    assert config.training.num_epochs * config.training.updates_per_epoch == 200
    fast = load_config(FOLDER / f"{name}.py", "fast")
    assert (fast.sampling.num_steps, fast.sampling.sampler, fast.algorithm.credit) == (20, "sde_dpm_solver", "guess")


def test_an_unknown_variant():
    with pytest.raises(UserError, match="there is no variant 'quick'; use none, or one of forward_only, fast"):
        parse_flags(["train", f"--config={FOLDER / 'hps.py'}:quick"], "", {})
    with pytest.raises(UserError, match="has no variant 'fast'"):
        parse_flags(["train", f"--config={FOLDER / 'emoji.py'}:fast"], "", {})
