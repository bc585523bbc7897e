"""`plan` compiles runs for devices that are not attached. Tests are skipped if their compiler is not installed."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
from test_flops import sd15_forward_flops

from nabla_gfn_jax import plan
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.base_models.names import SHIPPED_MODELS, abstract_model
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.flops import FULL, count_flops
from nabla_gfn_jax.parallel import all_devices
from nabla_gfn_jax.planning import chips
from nabla_gfn_jax.planning.hlo import Traffic
from nabla_gfn_jax.planning.phases import Phase, Plan, abstract_trainer
from nabla_gfn_jax.planning.table import show
from nabla_gfn_jax.rewards import ABSTRACT, REWARDS
from nabla_gfn_jax.settings import Settings

CONFIGS = Path(__file__).parents[1] / "configs"
# The image towers of CLIP's ViT-H/14 and ViT-L/14, each with its projection; LAION's head; BLIP as ImageReward has it.
VIT_H, VIT_L = 632_076_800, 303_966_208
PARAMETERS = {"hps": VIT_H, "aesthetic": VIT_L + 927_969, "image_reward": 446e6}
LIBTPU = pytest.mark.skipif(find_spec("libtpu") is None, reason="pip install 'nabla_gfn_jax[tpu]'")


def settings(name: str, **training: int):
    return load_settings(Settings, name, {f"training.{field}": value for field, value in training.items()})


def here(config, *, full_effort: bool = False) -> Plan:
    """A plan for the CPU devices, treated as v5e devices."""
    return Plan(config, chips.CHIPS["v5e"], all_devices(), full_effort)


@pytest.mark.parametrize("name", ["hps", "aesthetic", "image_reward"])
@pytest.mark.thorough
def test_the_papers_configs_need_no_weights(name):
    """The numbers of parameters are those of the papers. The parameters are shapes with the dtypes of a run."""
    config = settings(name)
    trainer = abstract_trainer(config, all_devices())
    sizes = {part: sum(a.size for a in jax.tree.leaves(tree)) for part, tree in trainer.frozen_params["base"].items()}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863}
    dtypes = {part: {str(a.dtype) for a in jax.tree.leaves(tree)} for part, tree in trainer.frozen_params.items()}
    assert dtypes["base"] == {"bfloat16"}
    assert dtypes["reward"] == {"float32"}
    reward = sum(a.size for a in jax.tree.leaves(trainer.reward.params))
    assert reward == pytest.approx(PARAMETERS[name], rel=0 if name != "image_reward" else 0.01)


@pytest.mark.parametrize(("name", "tower"), [("pick_score", VIT_H), ("clip_h", VIT_H), ("clip", VIT_L)])
@pytest.mark.thorough
def test_a_score_by_clip_needs_no_weights(name, tower):
    """The parameters are the image tower and the scale of the cosine; prompt features are computed before a run."""
    assert sum(a.size for a in jax.tree.leaves(ABSTRACT[name]().params)) == tower + 1


def test_every_reward_that_is_not_in_the_package_can_be_planned_without_its_weights():
    assert set(ABSTRACT) == set(REWARDS) - {"valence", "recognisability", "jpeg"}


def sd15_decoder_flops() -> float:
    """FLOPs of Stable Diffusion 1.5's VAE decoder on one 64 x 64 latent, from the sizes of its architecture."""

    def resnet(size, before, after):
        return 2 * size**2 * (9 * (before + after) * after + (before * after) * (before != after))

    count = 2 * 64**2 * (4 * 4 + 9 * 4 * 512)  # post_quant_conv, conv_in
    count += 2 * resnet(64, 512, 512) + 2 * 64**2 * 512 * 512 * 4 + 4 * 64**4 * 512  # the middle and its attention
    size, width = 64, 512
    for level, after in enumerate((512, 512, 256, 128)):
        for _ in range(3):
            count += resnet(size, width, after)
            width = after
        if level < 3:
            size *= 2
            count += 2 * size**2 * 9 * width * width
    return count + 2 * size**2 * 9 * 128 * 3


@pytest.mark.thorough
def test_the_flops_of_a_rollout_at_full_size():
    """Counts 50 guided steps, one decoded image, and ViT-H/14 (256 patches and a token) in float32, within 1 %."""
    planned = here(settings("hps"))
    counted = count_flops(*program_of(planned, "rollout"))
    mine = 64 // planned.mesh.size
    expected = mine * (50 * 2 * sd15_forward_flops() + sd15_decoder_flops())
    assert counted["bfloat16"] == pytest.approx(expected, rel=0.01)
    layers = 32 * (2 * 257 * 12 * 1280**2 + 4 * 257**2 * 1280)
    vision = layers + 2 * 256 * 3 * 14**2 * 1280 + 2 * 1280 * 1024
    resizing = 2 * 3 * (224 * 512 * 512 + 224 * 512 * 224)
    assert counted[FULL] == pytest.approx(mine * (vision + resizing), rel=0.01)


def program_of(planned: Plan, name: str):
    function, arguments = planned.phase(name, planned.trainer)
    return function, *arguments


@pytest.mark.thorough
def test_shapes_of_a_folder_are_those_of_its_weights():
    config = settings("emoji")
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), abstract_model(config.model).params)
    loaded = jax.tree.map(lambda a: (a.shape, a.dtype), load_folder(SHIPPED_MODELS["emoji"]).params)
    assert shapes == loaded


@pytest.mark.thorough
def test_the_largest_micro_batch_is_found_by_bisection(monkeypatch):
    """Of the divisors of a device's 8 trajectories, 4 is the largest that fits; 3 compilations find it."""
    planned = here(settings("emoji", trajectories=64, micro_batches=2))
    asked = []

    def compile_for(name, trainer):
        size = 8 // trainer.micro_batches
        asked.append(size)
        return "too big" if size > 4 else Phase(name, 0, size * 3 * 2**30, 0, {}, Traffic(0, 0, {}, 0), 0.0)

    monkeypatch.setattr(planned, "compile", compile_for)
    assert planned.largest_micro_batch() == 4
    assert sorted(asked) == [2, 4, 8]


def test_the_table_says_what_fits_and_what_is_assumed():
    planned = here(settings("emoji"))
    gib = 2**30
    work = Traffic(3e9, 0, {"all-reduce": (4, 8e6)}, 0)
    fits = Phase("rollout", gib, 2 * gib, gib // 2, {"bfloat16": 197e12, FULL: 197e12 / 6}, work, 1.0)
    text = show(planned, {"rollout": fits, "update": Phase("update", gib, 15 * gib, 0, {}, work, 1.0)}, "title")
    assert "| rollout | 1.00 GiB | 2.00 GiB | 0.50 GiB | 3.50 GiB | 22% |" in text
    assert re.search(r"update .* 16\.00 GiB \| 102%, too big", text)
    assert "4 all-reduce, 8.0 MB" in text
    assert re.search(r"rollout \|.*\| 2 s \|", text)  # a second at each of the two rates
    assert "one epoch (4 updates): 5 s, 200 updates: 4.2 min, assuming 40%" in text
    assert "not measured" in text
    assert "does not fit: why" in show(planned, {"update": "why"}, "title")


def test_the_cost_models_time_is_its_cycles_by_the_clock():
    """3e9 cycles at v5e's 1.5 GHz take 2 seconds, for work that takes one second at the peak rate."""
    planned = here(settings("emoji"), full_effort=True)
    phase = Phase("rollout", 0, 0, 0, {"bfloat16": 197e12}, Traffic(0, 3e9, {}, 0), 1.0)
    text = show(planned, {"rollout": phase, "update": phase}, "title")
    assert "| 2 s, 50% of the peak | 1 s |" in text
    assert "one epoch (4 updates): 4 s, 200 updates: 3.3 min, by the compiler's cost model; estimated" in text


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--topology=v9:2x4", "v5e:2x4"), ("--phases=sampling", "rollout"), ("--config.training.micro_batches=5", "5")],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, flag, named, monkeypatch):
    monkeypatch.setattr(plan, "devices_of", lambda topology: all_devices().devices)
    with pytest.raises(SystemExit) as stop:
        plan.main(["plan", f"--config={CONFIGS / 'hps.py'}", flag])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    def missing(**_):
        raise RuntimeError("no plugin\nfor cuda")

    monkeypatch.setattr(chips.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"no plugin for cuda.*nabla_gfn_jax\[plan\]"):
        chips.devices_of("a100:8")


@LIBTPU
def test_a_tpu_that_is_not_here(tiny_model):
    """Runs the whole command in a separate process, for eight chips of a v5e."""
    fields = {
        "model": tiny_model,
        "sampling.num_steps": 10,
        "algorithm.transition_fraction": 0.2,
        "training.trajectories": 16,
        "training.micro_batches": 2,
    }
    flags = [f"--config={CONFIGS / 'emoji.py'}", *(f"--config.{name}={value}" for name, value in fields.items())]
    command = [sys.executable, "-m", "nabla_gfn_jax.plan", "--topology=v5e:2x4", "--fit", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 devices, each 15.75 GiB" in done.stdout
    assert re.search(r"\| 4 updates \|.* 4 all-reduce, \d", done.stdout), done.stdout  # one an update, four an epoch
    assert "loops counted once" not in done.stdout
    assert "largest micro-batch of an update that fits: 2 trajectories per device" in done.stdout
