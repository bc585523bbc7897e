"""A finetuning run on a model of a few thousand parameters: bit-exact resume, bad input, and failures."""

import io
import json
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file
from test_metrics_log import scalars
from test_parallel import without_images
from tiny_run import brightness

from nabla_gfn_jax import train
from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.runs.metrics_log import COLUMNS
from nabla_gfn_jax.runs.workdir import claim
from nabla_gfn_jax.training import loop

CREDIT = "adjoint"
LORA = Path("lora/00006/diffusers.safetensors")

REWARD = "30.0"  # times brightness: a loss that rounding to bfloat16 leaves within a tenth
COSTS = ("seconds", "images_per_second", "flops_per_second", "device_memory_gib", "device_hours")


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in COSTS}


@dataclass(frozen=True)
class Run:
    """A finished run: its workdir, and its output."""

    workdir: Path
    printed: str
    compiled: tuple[str, ...]  # programs by name, each time one was
    seconds: float


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled within the context, in any thread, from JAX's log."""
    log, names = logging.getLogger("jax._src.dispatch"), list[str]()
    listener = logging.Handler()
    listener.emit = lambda record: names.extend(re.findall(r"XLA compilation of (\S+)", record.getMessage()))
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(listener)
    try:
        yield names
    finally:
        log.removeHandler(listener)
        log.setLevel(level)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Uninterrupted runs of three epochs by credit, with all optional outputs. Each is made once."""
    made: dict[str, Run] = {}

    def run(credit: str = CREDIT) -> Run:
        if credit not in made:
            workdir, printed, start = tmp_path_factory.mktemp(credit), io.StringIO(), time.monotonic()
            with redirect_stdout(printed), compilations() as compiled:
                more = (f"--config.algorithm.credit={credit}", "--config.logging.tensorboard=True", "--profile")
                command(workdir, *more, reward=REWARD)
            made[credit] = Run(workdir, printed.getvalue(), tuple(compiled), time.monotonic() - start)
        return made[credit]

    return run


@pytest.mark.parametrize("credit", ["adjoint", pytest.param("lookahead", marks=pytest.mark.slow)])
def test_a_run_leaves_everything_it_promises_and_resumes_bit_for_bit(whole, command, tmp_path, credit):
    """The lookahead also trains g_φ; its update takes a minute to compile."""
    run = whole(credit)
    assert "lora" in run.printed.lower()
    pictures = ("pictures/00000.png", "pictures/00006.png")
    for name in ("metrics.jsonl", "manifest.json", "samples/update_00000.png", "samples/update_00006.png", *pictures):
        assert (run.workdir / name).is_file(), name
    assert '"policies":[[[0,0],[6,1]]]' in (run.workdir / "report.html").read_text()  # both have pictures in it
    for name in ("diffusers.safetensors", "kohya.safetensors", "about.json"):
        assert (run.workdir / LORA.with_name(name)).is_file(), name
    assert sorted(p.name for p in (run.workdir / "lora").iterdir()) == ["00002", "00004", "00006"]
    log = rows(run.workdir)
    assert [(row["epoch"], row["step"], row["updates"]) for row in log] == [
        (0, 0, 0), (1, 0, 2), (2, 2, 4), (3, 4, 6), (4, 6, 6)
    ]  # fmt: skip
    assert {"reward_mean", "loss_forward", "loss_reverse", "loss_terminal", "loss_reg"} <= set(log[1])
    assert "loss" not in log[4]  # the last policy is sampled once more, and not trained

    command(tmp_path, f"--config.algorithm.credit={credit}", "--config.training.num_epochs=1", reward=REWARD)
    command(tmp_path, f"--config.algorithm.credit={credit}", reward=REWARD)
    assert list(map(without_time, rows(tmp_path))) == list(map(without_time, rows(run.workdir)))
    for name in (LORA, *pictures):
        assert (run.workdir / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_remembers_paths_resumes_bit_for_bit(command, tmp_path):
    """The fitted value's memory is a part of the checkpoint; the ring of 24 places is full in the second epoch."""
    fields = {
        "algorithm.after": 0,
        "algorithm.memory": 24,
        "algorithm.width": 8,
        "algorithm.fit_batch": 64,
        "algorithm.components": 4,
        "sampling.lora_until_step": 8,
        "lora.layers": "attention",
        "lora.rank": 2,
        "training.decline": "constant",
        "logging.checkpoint_every": 1,
    }
    more = ["--config=emoji_exact", *(f"--config.{name}={value}" for name, value in fields.items())]
    command(tmp_path / "whole", *more, "--config.training.num_epochs=2")
    command(tmp_path / "parts", *more, "--config.training.num_epochs=1")
    command(tmp_path / "parts", *more, "--config.training.num_epochs=2")
    log = rows(tmp_path / "whole")
    assert all(row["loss_steps"] != 0 for row in log[:2])
    assert list(map(without_time, rows(tmp_path / "parts"))) == list(map(without_time, log))
    last = Path("lora/00004/diffusers.safetensors")
    assert (tmp_path / "parts" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


@pytest.mark.thorough
def test_a_policy_that_waited_begins_as_adam_begins(command, tmp_path, monkeypatch):
    """Its first step has the full rate in every element with a gradient: the updates before it do not count."""
    without_images(monkeypatch)
    fields = {
        "algorithm.after": 16,
        "algorithm.width": 8,
        "algorithm.fit_batch": 64,
        "algorithm.components": 4,
        "sampling.lora_until_step": 8,
        "lora.layers": "attention",
        "lora.rank": 2,
        "training.decline": "cosine",
        "training.average": 0,
        "training.weight_decay_lora": 0,
        "training.updates_per_epoch": 1,
        "training.num_epochs": 2,
        "training.learning_rate": 0.005,
    }
    command(tmp_path, "--config=emoji_exact", *(f"--config.{name}={value}" for name, value in fields.items()))
    files = (tmp_path / f"lora/0000{number}/diffusers.safetensors" for number in (1, 2))
    waiting, moved = map(load_file, files)
    steps = np.concatenate([np.abs(np.asarray(moved[name]) - np.asarray(waiting[name])).ravel() for name in moved])
    assert steps.max() == pytest.approx(0.005, rel=1e-3)
    assert (steps > 0.004).mean() > 0.1
    assert [row["grad_norm_lora"] > 0 for row in rows(tmp_path)[:2]] == [False, True]


@pytest.mark.thorough
def test_a_rows_reward_is_that_of_the_policy_with_its_step(whole, command, tmp_path, monkeypatch):
    """A run that starts from the LoRA after 4 updates with the noise of epoch 3 has the reward of epoch 3 first."""
    of_epoch = {row["epoch"]: row for row in rows(whole().workdir)}
    keys = loop.sample_keys
    monkeypatch.setattr(loop, "sample_keys", lambda key, epoch, count: keys(key, epoch + 3, count))
    without_images(monkeypatch)
    file = whole().workdir / LORA.parent.with_name("00004") / LORA.name
    command(tmp_path, "--config.training.num_epochs=0", f"--config.lora.start_from={file}", reward=REWARD)
    row, _ = rows(tmp_path)
    assert of_epoch[3]["step"] == 4
    assert row["reward_mean"] == pytest.approx(of_epoch[3]["reward_mean"], rel=1e-6)
    assert row["reward_mean"] != pytest.approx(of_epoch[2]["reward_mean"], rel=1e-5)


def test_every_column_of_the_log_is_documented(whole):
    """No other column is documented. New columns must be declared in `COLUMNS` or in the algorithm's class."""
    found = {name for row in rows(whole().workdir) for name in row}
    others = {name for cls in ALGORITHMS.values() if cls is not ResidualNablaDB for name in cls.columns}
    others -= ResidualNablaDB.columns.keys()
    heads = {"grad_norm_correction", "grad_norm_flow"}
    assert found == {column.name for column in COLUMNS} - others - heads - {"reward_mean_PART"}
    assert not any(value is None for row in rows(whole().workdir) for value in row.values())
    assert "nan" not in whole().printed


def test_a_finished_run_is_not_built_again(whole, command, tmp_path, monkeypatch):
    shutil.copytree(whole().workdir, tmp_path / "run")
    monkeypatch.setattr(train, "build", lambda settings: pytest.fail("is built"))
    command(tmp_path / "run", f"--config.algorithm.credit={CREDIT}", reward=REWARD)
    assert rows(tmp_path / "run") == rows(whole().workdir)


@pytest.mark.thorough
def test_a_finished_run_whose_lora_and_last_row_are_missing_writes_them(whole, command, tmp_path):
    """This happens if the run is killed after its last checkpoint."""
    shutil.copytree(whole().workdir, tmp_path / "run")
    shutil.rmtree((tmp_path / "run" / LORA).parent)
    log = tmp_path / "run/metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    command(tmp_path / "run", f"--config.algorithm.credit={CREDIT}", reward=REWARD)
    assert (tmp_path / "run" / LORA).read_bytes() == (whole().workdir / LORA).read_bytes()
    assert list(map(without_time, rows(tmp_path / "run"))) == list(map(without_time, rows(whole().workdir)))


@pytest.mark.thorough
def test_a_lora_is_there_before_the_checkpoint_that_says_so(whole, command, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("killed")

    monkeypatch.setattr(train.Checkpoints, "save", fail)
    with pytest.raises(SystemExit):
        command(tmp_path, reward=REWARD)
    first = LORA.parent.with_name("00002") / LORA.name
    assert (tmp_path / first).read_bytes() == (whole().workdir / first).read_bytes()


def test_each_program_is_compiled_once(whole):
    """Rollout and update compile simultaneously, the update from the shapes of a batch that does not exist yet."""
    counts = Counter(name for name in whole().compiled if re.search("rollout|update|images", name))
    assert counts == {"jit(_rollout)": 1, "jit(_update)": 1, "jit(_images)": 1}


@pytest.mark.thorough
def test_a_run_starts_from_a_lora(whole, command, tmp_path):
    """Its first grid equals the last grid of the run that made the LoRA, and its ranks are kept."""
    first, second = whole().workdir, tmp_path / "second"
    file = first / LORA.with_name("kohya.safetensors")
    command(second, "--config.training.num_epochs=2", f"--config.lora.start_from={file}", "--config.lora.rank=4")
    base, made = ((first / f"samples/update_0000{n}.png").read_bytes() for n in (0, 6))
    assert (second / "samples/update_00000.png").read_bytes() == made != base
    before, after = load_file(first / LORA), load_file(second / LORA.parent.with_name("00004") / LORA.name)
    assert before.keys() == after.keys()


@pytest.mark.thorough
def test_bfloat16(whole, command, tmp_path, monkeypatch):
    """Numbers near float32's, LoRA and optimizer still in float32.

    Not under strict promotion: the gradient of JAX's own attention mixes bfloat16 and float32.
    """
    without_images(monkeypatch)
    with jax.numpy_dtype_promotion("standard"):
        command(tmp_path, "--config.training.num_epochs=1", "--config.model_dtype=bfloat16", reward=REWARD)
    full, half = rows(whole().workdir)[:2], rows(tmp_path)
    for a, b in zip(full, half[:2], strict=True):
        assert a["reward_mean"] != b["reward_mean"]
        assert abs(a["reward_mean"] - b["reward_mean"]) < 0.02 * abs(a["reward_mean"])
    assert abs(full[1]["loss"] - half[1]["loss"]) < 0.1 * full[1]["loss"]
    lora = load_file(tmp_path / LORA.parent.with_name("00002") / LORA.name)
    assert {a.dtype for a in lora.values()} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_the_reward_is_climbed(command, tmp_path):
    """The mean of the last ten epochs is over 4 standard errors above that of the first two, the base model's."""
    flags = {
        "algorithm.beta": "30000.0",
        "algorithm.credit_clip": "1.0",
        "training.trajectories": 64,
        "training.updates_per_epoch": 8,
        "training.learning_rate": "1e-2",
        "training.num_epochs": 20,
        "logging.samples_every": 100,
        "logging.checkpoint_every": 100,
    }
    command(tmp_path, *(f"--config.{name}={value}" for name, value in flags.items()))
    log = rows(tmp_path)
    first, last = ([row["reward_mean"] for row in part] for part in (log[:2], log[-10:]))
    error = log[0]["reward_std"] * (1 / (2 * 64) + 1 / (10 * 64)) ** 0.5
    assert np.mean(last) > np.mean(first) + 4 * error, (first, last, error)


def test_the_log_says_what_an_epoch_cost_and_the_trace_what_took_it(whole):
    """The later epochs do the same work; the first, which only samples, does less."""
    run = whole()
    log = rows(run.workdir)
    for row in log:
        assert row["images_per_second"] * row["seconds"] == pytest.approx(16)
        assert row["device_memory_gib"] > 0.05  # on a CPU the process's
    assert 0 < sum(row["seconds"] for row in log) < run.seconds
    work = [row["flops_per_second"] * row["seconds"] for row in log]
    assert work[0] < work[1] == pytest.approx(work[2], rel=1e-6)
    assert work[-1] == pytest.approx(work[0], rel=1e-6)  # the first and the last only sample
    traces = list((run.workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert b"rollout" in traces[0].read_bytes()
    assert "trace of epochs 2 to 3" in run.printed


def test_tensorboard_has_every_number_of_the_log(whole):
    workdir = whole().workdir
    expected = [(name, row["epoch"], value) for row in rows(workdir) for name, value in row.items()]
    for (name, epoch, value), found in zip(sorted(expected), scalars(workdir / "tensorboard"), strict=True):
        assert found == (name, epoch, pytest.approx(value, rel=1e-6))


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.training.epochs=1", "epochs"),
        ("--config.sampling.num_steps=11", "num_steps|steps"),
        ("--config.training.micro_batches=3", "micro_batches"),
        ("--config.training.updates_per_epoch=0", "updates_per_epoch"),
        ("--config.model=/nowhere", "/nowhere"),
        ("--config.algorithm.name=ppo", "ppo"),
        ("--config.prompts=poems", "poems"),
        ("--config.training.num_epochs=many", "num_epochs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, capsys, flag, named):
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, flag)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert any(name in error[0] for name in named.split("|"))


def test_a_workdir_of_another_config_is_refused(whole, command, capsys):
    with pytest.raises(SystemExit):
        command(whole().workdir, "--config.algorithm.beta=7.0", reward=REWARD)
    assert "algorithm.beta" in capsys.readouterr().err


def test_a_workdir_in_use_is_one_line_and_exit_code_2(command, tmp_path, capsys):
    with claim(tmp_path, {}), pytest.raises(SystemExit) as stop:
        command(tmp_path)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: workdir {tmp_path} is in use by process")


def test_a_resume_may_use_less_memory(whole, command, tmp_path, capsys, monkeypatch):
    """A resume may change the fields that change numbers only by rounding."""
    shutil.copytree(whole().workdir, tmp_path / "run")
    less = {"micro_batches": 1, "remat": True, "images_at_once": 1, "num_epochs": 5}

    def stop(settings):
        raise UserError(f"a run of {settings.training.num_epochs} epochs is built")

    monkeypatch.setattr(train, "build", stop)
    fields = [f"--config.training.{name}={value}" for name, value in less.items()]
    with pytest.raises(SystemExit):
        command(tmp_path / "run", f"--config.algorithm.credit={CREDIT}", *fields, reward=REWARD)
    assert "a run of 5 epochs is built" in capsys.readouterr().err


def test_a_resume_with_other_prompts_in_the_same_file_is_refused(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a face\n")
    prompts = f"--config.prompts={tmp_path / 'prompts.txt'}"

    def end(*_):
        (tmp_path / "run/metrics.jsonl").touch()  # a run that left nothing binds nobody
        raise UserError("ended after its first epoch")

    with monkeypatch.context() as patch:
        patch.setattr(train, "Programs", end)
        with pytest.raises(SystemExit):
            command(tmp_path / "run", prompts)
    assert "ended" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("an animal\n")
    with pytest.raises(SystemExit):
        command(tmp_path / "run", prompts)
    assert re.search(r"prompts had SHA-256 \w+… and has \w+…; restore them or", capsys.readouterr().err)


def test_an_unwritable_workdir_is_named(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        command(tmp_path / "file")
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_truncated_weights_file_is_named(command, tiny_model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        command(tmp_path / "run", f"--config.model={broken}")
    assert str(weights) in capsys.readouterr().err


@pytest.mark.thorough
def test_numbers_that_are_none_stop_a_run_and_keep_its_last_checkpoint(command, tmp_path, capsys, monkeypatch):
    """Tests a run with a checkpoint whose reward then fails, and a run without a checkpoint."""
    command(tmp_path, "--config.training.num_epochs=1")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(tiny_run, "brightness", lambda scale: brightness(float("nan")))
        with pytest.raises(SystemExit) as stop:
            command(tmp_path, "--config.training.num_epochs=3", "--config.training.skipped_updates=0")
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert "epoch 2 loses 16 of 16 samples; not finite: " in "".join(told)
    assert re.search("error: 2 updates in a row, up to epoch 3, are not finite .*loss.* of samples 0, 1, ", told[-1])
    assert [row["reward_mean"] is None for row in rows(tmp_path)] == [False, False, True, True]
    assert [row.get("skipped_updates") for row in rows(tmp_path)] == [None, 0, 0, 2]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    with pytest.raises(SystemExit):
        command(tmp_path / "new", "--config.training.skipped_updates=1", reward="nan")
    assert not any((tmp_path / "new/checkpoints").glob("[0-9]*"))
