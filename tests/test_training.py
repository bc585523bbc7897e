"""A finetuning run on a model of a few thousand parameters: bit-exact resume, bad input, failure."""

import io
import json
import logging
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event
from test_parallel import without_images

REWARD = "30.0"  # times brightness: a loss that rounding to bfloat16 leaves within a tenth
COSTS = ("seconds", "images_per_second", "flops_per_second", "device_memory_gib")


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in COSTS}


@dataclass(frozen=True)
class Run:
    """A finished one: where it wrote, and what it printed."""

    workdir: Path
    printed: str
    compiled: tuple[str, ...]  # programs by name, each time one was


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled meanwhile, in whatever thread, as JAX logs them."""
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
    """Runs by credit, three epochs uninterrupted, with all that can be asked to be written. Made once each."""
    made: dict[str, Run] = {}

    def run(credit: str = "adjoint") -> Run:
        if credit not in made:
            workdir, printed = tmp_path_factory.mktemp(credit), io.StringIO()
            with redirect_stdout(printed), compilations() as compiled:
                more = (f"--config.algorithm.credit={credit}", "--config.logging.tensorboard=True", "--profile")
                command(workdir, *more, reward=REWARD)
            made[credit] = Run(workdir, printed.getvalue(), tuple(compiled))
        return made[credit]

    return run


@pytest.mark.parametrize("credit", ["adjoint", pytest.param("lookahead", marks=pytest.mark.slow)])
def test_a_run_leaves_everything_it_promises_and_resumes_bit_for_bit(whole, command, tmp_path, credit):
    """The lookahead trains g_φ too; compiling its update takes a minute."""
    run = whole(credit)
    assert "lora" in run.printed.lower()
    for name in ("metrics.jsonl", "config.json", "samples/update_00000.png", "samples/update_00006.png"):
        assert (run.workdir / name).is_file(), name
    for name in ("lora/diffusers.safetensors", "lora/kohya.safetensors"):
        assert (run.workdir / name).is_file(), name
    log = rows(run.workdir)
    assert [(row["epoch"], row["step"], row["updates"]) for row in log] == [
        (0, 0, 0), (1, 0, 2), (2, 2, 4), (3, 4, 6), (4, 6, 6)
    ]  # fmt: skip
    assert {"reward_mean", "loss_forward", "loss_reverse", "loss_terminal", "loss_reg"} <= set(log[1])
    assert "loss" not in log[4]  # the last policy is sampled once more, and not trained

    command(tmp_path, f"--config.algorithm.credit={credit}", "--config.training.num_epochs=1", reward=REWARD)
    command(tmp_path, f"--config.algorithm.credit={credit}", reward=REWARD)
    assert list(map(without_time, rows(tmp_path))) == list(map(without_time, rows(run.workdir)))
    lora = [(folder / "lora/diffusers.safetensors").read_bytes() for folder in (run.workdir, tmp_path)]
    assert lora[0] == lora[1]


def test_each_program_is_compiled_once(whole):
    """The first two at once, the update from the shapes of a batch that is not yet there."""
    counts = Counter(name for name in whole().compiled if re.search("rollout|update|images", name))
    assert counts == {"jit(_rollout)": 1, "jit(_update)": 1, "jit(_images)": 1}


def test_a_run_starts_from_a_lora(whole, command, tmp_path, capsys):
    """Its first grid is the last of the run that made the LoRA, and not the base model's. Another rank is refused."""
    first, second = whole().workdir, tmp_path / "second"
    file = first / "lora/kohya.safetensors"
    command(second, "--config.training.num_epochs=2", f"--config.lora.start_from={file}")
    base, made = ((first / f"samples/update_0000{n}.png").read_bytes() for n in (0, 6))
    assert (second / "samples/update_00000.png").read_bytes() == made != base
    before, after = (load_file(folder / "lora/diffusers.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    with pytest.raises(SystemExit):
        command(tmp_path / "third", f"--config.lora.start_from={file}", "--config.lora.rank=4")
    assert "has rank 8 and lora.rank is 4" in capsys.readouterr().err


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
    lora = load_file(tmp_path / "lora/diffusers.safetensors")
    assert {a.dtype for a in lora.values()} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_the_reward_is_climbed(command, tmp_path):
    """By over 4 standard errors: the mean of the last ten epochs against the first two, which the base model drew."""
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
    """The later epochs do the same work, the first, which only samples, less of it."""
    run = whole()
    log = rows(run.workdir)
    for row in log:
        assert row["images_per_second"] == pytest.approx(16 / row["seconds"])
        assert row["device_memory_gib"] > 0.05  # on a CPU the process's
    work = [row["flops_per_second"] * row["seconds"] for row in log]
    assert work[0] < work[1] == pytest.approx(work[2], rel=1e-6)  # the first epoch only samples
    traces = list((run.workdir / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert b"rollout" in traces[0].read_bytes()
    assert "trace of epochs 2 to 3" in run.printed


def test_tensorboard_has_every_number_of_the_log(whole):
    workdir = whole().workdir
    (file,) = (workdir / "tensorboard").iterdir()
    found = {(s.tag, event.step): s.simple_value for event in events(file) for s in event.summary.value}
    expected = {(name, row["epoch"]): value for row in rows(workdir) for name, value in row.items()}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6)


def events(file: Path) -> list[Event]:
    """The records of a TensorBoard file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, start, found = file.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        found.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += length + 16
    return found


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


def test_a_workdir_of_another_config_is_refused(command, tmp_path, capsys):
    command(tmp_path, "--config.training.num_epochs=0")
    with pytest.raises(SystemExit):
        command(tmp_path, "--config.algorithm.beta=7.0")
    assert "algorithm.beta" in capsys.readouterr().err


def test_an_unwritable_workdir_is_named(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        command(tmp_path / "file")
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_truncated_weights_file_is_named(command, tiny_model, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        command(tmp_path / "run", f"--config.model={broken}")
    assert str(weights) in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(command, tmp_path, capsys):
    command(tmp_path, "--config.training.num_epochs=1")
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(SystemExit):
        command(tmp_path, "--config.reward=nan", "--config.training.num_epochs=1", reward="1.0")
    capsys.readouterr()
    nan = tmp_path / "nan"
    with pytest.raises(SystemExit) as stop:
        command(nan, reward="nan")
    assert stop.value.code == 2
    assert "reward_mean" in capsys.readouterr().err
    assert rows(nan)[0]["reward_mean"] is None
    assert not any((nan / "checkpoints").glob("[0-9]*"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before
