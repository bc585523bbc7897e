"""`evaluate` and `sample` on runs and LoRA files of the tiny model: which settings they use, and what they write."""

import csv
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import brightness

from nabla_gfn_jax import evaluate, sample
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import save_lora
from nabla_gfn_jax.inference.evaluation import Evaluator
from nabla_gfn_jax.inference.sampling import ImageSampler
from nabla_gfn_jax.inference.subject import hashes_of
from nabla_gfn_jax.inference.table import show
from nabla_gfn_jax.metrics import tilt
from nabla_gfn_jax.metrics.base import Released, Samples
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.reports import page, source
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.runs import evaluations
from nabla_gfn_jax.runs.workdir import claim

ABOUT = {"reward": "brightness", "algorithm": "residual_nabla_db", "beta": 30.0, "sampler": "sde_dpm_solver"}
ABOUT |= {"num_steps": 3, "guidance": 1.5}
SAID = {"sampler": "sde_dpm_solver", "steps": 3, "guidance": 1.5, "eta": 1.0, "seed": 0}
SAID |= {"negative": "", "lora_from_step": 1, "lora_until_step": None}


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    monkeypatch.setitem(REWARDS, "brightness", lambda: brightness(1.0))
    monkeypatch.setattr(tilt, "REPLICATES", 20)


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The workdir of a finished run with two LoRAs; no drawings are known for its prompts."""
    folder = tmp_path_factory.mktemp("run")
    prompts = folder / "prompts.txt"
    prompts.write_text("a sonnet\nan ode\n")
    fresh = init_lora(jax.random.key(0), load_folder(tiny_model).params["unet"], rank=2)
    about = ABOUT | {"model": str(tiny_model), "prompts": str(prompts)}
    with claim(folder / "run", {"model_dtype": "float32"}, about=about) as workdir:
        workdir.record_inputs({name: tiny_model / name.removeprefix("model/") for name in hashes_of(str(tiny_model))})
        for updates, scale in ((4, 0.3), (8, 1.0)):
            lora = jax.tree.map(lambda a, s=scale: s * jax.random.normal(jax.random.key(a.size), a.shape), fresh)
            workdir.save_lora(updates, lora)
    return folder / "run"


@pytest.fixture
def sampled(monkeypatch):
    """The arguments (has a LoRA, first, num) of each call that samples."""
    calls, images = [], ImageSampler.images

    def spy(self, lora, num, **options):
        calls.append((lora is not None, options.get("first", 0), num))
        return images(self, lora, num, **options)

    monkeypatch.setattr(ImageSampler, "images", spy)
    return calls


def picture(file):
    with Image.open(file) as opened:
        return np.asarray(opened)


@pytest.mark.thorough
def test_a_run_is_judged_as_it_was_trained(run, tmp_path, capsys, sampled):
    out = tmp_path / "out.json"
    evaluate.main(["evaluate", f"--workdir={run}", "--num=5", f"--out={out}", f"--csv={tmp_path}/out.csv"])
    printed = capsys.readouterr()
    first = printed.out.splitlines()[0]
    assert first == "not measured: coverage (only drawings of 64 x 64 are known, and the images are 8 x 8)"
    for text in ("gap, β = 30", "lora/00004", "lora/00008", "efficiency", "spent, from the first steps", "log R of "):
        assert text in printed.out
    assert "as given" not in printed.err
    assert sampled == [(False, 0, 5), (True, 0, 5), (True, 0, 5)]
    rows = evaluations.read(run)
    assert [row["model"] for row in rows] == ["base", "lora/00004", "lora/00008"]
    assert all(row["sampling"] == SAID for row in rows)
    assert all(row["prompts"] == ["a sonnet", "an ode"] for row in rows)
    base, small, large = (row["certificate"] for row in rows)
    assert base["spent"] == base["needed"] == base["exponent"] == {"value": 0.0, "std_error": 0.0}
    assert 0 < small["spent"]["value"] < large["spent"]["value"]
    assert large["needed"]["value"] <= large["spent"]["value"]
    assert len(large["spent_by_step"]) == 3
    assert sum(large["spent_by_step"]) == pytest.approx(large["spent"]["value"], rel=1e-5)
    assert large["at_beta"]["beta"] == 30.0
    assert json.loads(out.read_text())["lora/00008"]["certificate"] == large
    of_base, _, of_large = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert (of_base["model"], of_large["model"]) == ("base", "lora/00008")
    assert float(of_large["spent"]) == pytest.approx(large["spent"]["value"], rel=1e-5)
    assert float(of_large["gap_se"]) == pytest.approx(large["at_beta"]["gap"]["std_error"], rel=1e-5)
    curve = page.contents(source.read([run]))["plane"]["frontier"]  # of the base samples that the workdir kept
    assert curve["samples"] == 10
    for model in (small, large):
        needed = np.interp(model["log_reward"]["value"], curve["reward"], curve["needed"])
        assert needed == pytest.approx(model["needed"]["value"], rel=0.02, abs=1e-6)

    evaluate.main(["evaluate", f"--workdir={run}", "--num=4", "--base_num=7", "--lora_scale=0"])
    assert sampled[3:] == [(False, 5, 7), (True, 0, 4), (True, 0, 4)]  # of the base model, only what was not kept
    again = evaluations.read(run)[-1]
    assert again["model"] == "lora/00008 x 0"
    assert again["certificate"]["spent"]["value"] == 0.0
    assert (again["certificate"]["samples"], again["certificate"]["base_samples"]) == (8, 14)


@pytest.mark.thorough
def test_a_run_judges_itself_as_the_command_judges_it(command, tmp_path, monkeypatch, sampled):
    fields = {"evaluation.images": 3, "training.num_epochs": 1, "algorithm.beta": 7.0}
    command(tmp_path, *(f"--config.{name}={value}" for name, value in fields.items()))
    base, row = evaluations.read(tmp_path)
    assert (base["model"], row["model"]) == ("base", "lora/00002")
    assert base["certificate"]["spent"]["value"] == 0.0
    assert row["certificate"]["at_beta"]["beta"] == 7.0
    assert sampled == [(False, 0, 3), (True, 0, 3)]
    monkeypatch.setitem(REWARDS, "1.0", lambda: brightness(1.0))
    evaluate.main(["evaluate", f"--workdir={tmp_path}", "--num=3"])
    assert sampled[2:] == [(True, 0, 3)]  # the base model's samples were kept
    again = evaluations.read(tmp_path)[-1]
    assert {name: again[name] for name in ("inputs", "prompts", "sampling")} == {
        name: row[name] for name in ("inputs", "prompts", "sampling")
    }
    assert again["certificate"]["spent"]["value"] == pytest.approx(row["certificate"]["spent"]["value"], rel=1e-4)


@pytest.mark.thorough
def test_an_evaluation_that_was_cut_off_goes_on(run, tmp_path, monkeypatch, sampled):
    copy, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*_samples", "evaluations.jsonl"))
    states = Evaluator.states

    def cut(self, lora, num, **options):
        if options.get("progress") == "lora/00008":
            raise KeyboardInterrupt
        return states(self, lora, num, **options)

    flags = ["evaluate", f"--workdir={copy}", "--num=3"]
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "states", cut)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(flags)
    assert [row["model"] for row in evaluations.read(copy)] == ["base", "lora/00004"]
    sampled.clear()
    evaluate.main(flags)
    assert sampled == [(True, 0, 3)]  # only the last LoRA
    small, again = (row for row in evaluations.read(copy) if row["model"] == "lora/00004")
    assert small == again

    evaluate.main([*flags, f"--images={images}"])
    assert sampled[1:] == [(False, 0, 3), (True, 0, 3), (True, 0, 3)]
    assert sorted(folder.name for folder in images.iterdir()) == ["base", "lora_00004", "lora_00008"]
    assert [file.name for file in sorted((images / "base").iterdir())] == [f"{i:04d}.png" for i in range(6)]
    sample.main(["sample", f"--workdir={copy}", "--num=3", f"--out={tmp_path}/x.png", f"--each={tmp_path}/each"])
    for number in range(6):  # the run's last LoRA, the same prompts and noise
        name = f"{number:04d}.png"
        of_evaluation, of_sample = picture(images / "lora_00008" / name), picture(tmp_path / "each" / name)
        assert np.abs(of_evaluation.astype(int) - of_sample).max() <= 1
        with Image.open(images / "lora_00008" / name) as one:
            recipe = json.loads(one.text["nabla_gfn_jax"])
        assert (recipe["prompt_number"], recipe["image_number"]) == divmod(number, 3)
        assert recipe["loras"] == {"lora/00008": 1.0}


@pytest.mark.thorough
def test_what_the_user_says_goes_and_is_said(run, tmp_path, capsys):
    flags = ["--num=2", "--guidance=4", "--beta=0", "--reward=none", "--cross_rewards=jpeg,recognisability"]
    with pytest.raises(SystemExit):  # before any image is sampled
        evaluate.main(["evaluate", f"--workdir={run}", *flags])
    assert "recognisability cannot judge the prompt 'a sonnet'" in capsys.readouterr().err
    evaluate.main(["evaluate", f"--workdir={run}", *flags[:-1], "--cross_rewards=jpeg"])
    printed = capsys.readouterr()
    assert "guidance is 4.0, as given; in training it was 1.5" in printed.err
    assert "not measured: nats (no reward was named)" in printed.out
    row = evaluations.read(run)[-1]
    assert row["sampling"]["guidance"] == 4.0
    assert row["figures"].keys() == {"log_reward_jpeg"}
    assert -2 < row["figures"]["log_reward_jpeg"]["value"] < -0.1  # kilobytes
    with pytest.raises(SystemExit):
        evaluate.main(["evaluate", f"--workdir={run}", "--num=2", "--reward=none"])
    assert "error: there is nothing to measure (reward: no reward was named" in capsys.readouterr().err


@pytest.mark.thorough
def test_another_reward_judges_the_same_images(run, capsys):
    """The images and all figures of the trained reward are those without the other."""
    flags = ["evaluate", f"--workdir={run}", "--num=5", "--base_num=9", "--cross_rewards=jpeg"]
    evaluate.main(flags)
    row = evaluations.read(run)[-1]
    evaluate.main(flags[:-1])
    alone = evaluations.read(run)[-1]
    assert row["model"] == alone["model"] == "lora/00008"
    assert row["certificate"]["base_samples"] == alone["certificate"]["base_samples"] == 18
    for name in ("log_reward", "spent"):
        assert row["certificate"][name]["value"] == pytest.approx(alone["certificate"][name]["value"], rel=1e-4)
    assert row["figures"].keys() - alone["figures"].keys() == {"log_reward_jpeg"}
    worst, mean = (row["figures"][name] for name in ("log_reward_cvar", "log_reward"))
    assert worst["value"] == pytest.approx(alone["figures"]["log_reward_cvar"]["value"], rel=1e-4)
    assert worst["value"] < mean["value"]


@pytest.mark.thorough
def test_a_lora_file_says_how_it_was_trained(run, tmp_path, capsys, sampled):
    file = run / "lora/00008/kohya.safetensors"
    out = tmp_path / "pictures.png"
    sample.main(["sample", f"--lora={file}", "--num=3", f"--out={out}"])
    assert sampled == [(True, 0, 3)]
    assert "another base model" not in capsys.readouterr().err
    assert picture(out).shape[1] > 3 * 8
    sample.main(["sample", f"--workdir={run}", "--num=3", f"--out={tmp_path / 'same.png'}"])
    np.testing.assert_array_equal(picture(out), picture(tmp_path / "same.png"))


@pytest.mark.thorough
def test_files_that_contradict_each_other_need_a_word(run, tiny_model, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    lora = init_lora(jax.random.key(0), load_folder(tiny_model).params["unet"], rank=2)
    save_lora(other, lora, ABOUT | {"model": str(tiny_model), "guidance": 3.0, "inputs": {"model/unet": "0" * 64}})
    files = [f"--lora={run / 'lora/00004/diffusers.safetensors'}", f"--lora={other}"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["evaluate", *files, "--num=2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "differ in guidance: 1.5" in error
    assert "--guidance" in error
    sample.main(["sample", f"--lora={other}", "--prompt=an ode", "--num=1", f"--out={tmp_path / 'one.png'}"])
    assert "trained on another base model" in capsys.readouterr().err


class Redness:
    """A comparison: the difference of the mean red, with the images that were compared."""

    name = "redness"

    def prepare(self, prompts):
        pass

    def update(self, batch):
        return Samples(batch.prompt, {"red": batch.images[..., 0].mean(axis=(1, 2), dtype=np.float64)})

    def compare(self, state, base):
        red, other = state.values["red"], base.values["red"]
        assert state.prompt.tolist() == base.prompt.tolist() == [0] * 3 + [1] * 3
        assert not set(red.round(9)) & set(other.round(9))  # not of the same noise
        return {"redness": Estimate(float(red.mean() - other.mean()), 0.1)}


@pytest.mark.thorough
def test_a_comparison_has_other_noise_and_the_base_model_is_its_floor(run, capsys, sampled, monkeypatch, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"of the metric")
    monkeypatch.setitem(METRICS, "redness", lambda: Released(Redness(), (weights,)))
    evaluate.main(["evaluate", f"--workdir={run}", "--num=3", "--metrics=redness"])
    assert sampled == [(False, 0, 6), (True, 0, 3), (True, 0, 3)]
    printed = capsys.readouterr().out
    assert "redness" in printed
    base, _, large = evaluations.read(run)[-3:]
    kept = [dict(np.load(file)) for file in run.glob("base_samples/*.npz")]
    red = next(arrays for arrays in kept if "redness/red" in arrays)
    ordered = red["redness/red"][np.argsort(red["redness/prompt"], kind="stable")].reshape(2, 6)
    assert base["figures"]["redness"]["value"] == pytest.approx(ordered[:, :3].mean() - ordered[:, 3:].mean())
    assert large["figures"]["redness"]["value"] != base["figures"]["redness"]["value"]
    assert large["certificate"]["base_samples"] == 12
    assert large["inputs"]["redness/weights"] == hashlib.sha256(b"of the metric").hexdigest()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_prompts=1000"], "num_prompts"),
        (["--lora=/nowhere"], "/nowhere"),
        (["--workdir=/tmp"], "manifest.json"),
        (["--reward=beauty"], "beauty"),
        (["--metrics=fidd"], "dreamsim_dino"),
        (["--cross_rewards=valence"], "valence is measured already"),
        (["--cross_rewards=jpeg,beauty"], "beauty"),
        (["--cross_rewards=jpeg+recognisability"], "give its parts without weights"),
        (["--numbr=3"], "numbr"),
        (["--num=0"], "num"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["evaluate", *flags])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert named in lines[0]


def test_rows_survive_one_that_was_cut_short(tmp_path):
    evaluations.append(tmp_path, {"model": "base", "value": float("inf")})
    file = tmp_path / evaluations.NAME
    file.write_text(file.read_text() + '{"model": "lo')
    evaluations.append(tmp_path, {"model": "lora"})
    assert evaluations.read(tmp_path) == [{"model": "base", "value": "inf"}, {"model": "lora"}]


def test_figures_have_two_digits_of_their_error():
    shown = {Estimate(0.43219, 0.00712): "0.4322 ± 0.0071", Estimate(5.2211, 0.07): "5.221 ± 0.070"}
    shown |= {Estimate(123.4, 12.0): "123 ± 12", Estimate(0.0, 0.0): "0", Estimate(float("inf")): "beyond"}
    shown |= {Estimate(float("nan")): "-", Estimate(125.3): "125"}
    for estimate, text in shown.items():
        assert show(estimate) == text
