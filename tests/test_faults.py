"""A run on a tiny model that is stopped, whose newest checkpoint is damaged, or whose disk is full, loses nothing."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import SafetensorError
from test_parallel import without_images
from test_training import rows, without_time
from tiny_run import flags

from nabla_gfn_jax.checkpoints import files
from nabla_gfn_jax.runs import loras, metrics_log
from nabla_gfn_jax.runs.checkpoints import Checkpoints

pytestmark = pytest.mark.thorough

HERE = Path(__file__).parent
LAST = "lora/00006/diffusers.safetensors"
CREDIT = "--config.algorithm.credit=adjoint"


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """An undisturbed run of three epochs."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        without_images(patch)
        command(workdir, CREDIT)
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_images(monkeypatch)


def same_results(workdir: Path, whole: Path) -> None:
    """The log has each row once, all numbers but times are the same, and so are the LoRAs of both layouts."""
    assert list(map(without_time, rows(workdir))) == list(map(without_time, rows(whole)))
    assert loras.saved(workdir).keys() >= loras.saved(whole).keys()
    for folder in loras.saved(whole).values():
        for file in folder.iterdir():
            assert (workdir / "lora" / folder.name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("keep", [0, 1])
def test_the_checkpoint_before_a_damaged_one_is_used_without_being_asked(command, copy, whole, capsys, keep):
    """Also if the LoRA of the checkpoint that is used was removed, because only the newest is kept."""
    newest = max((copy / "checkpoints/3").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    newest.write_bytes(newest.read_bytes()[:-1])
    if keep:
        shutil.rmtree(copy / "lora/00002")
        shutil.rmtree(copy / "lora/00004")
    log = copy / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # killed before its last epoch
    hours = rows(copy)[2]["device_hours"]
    command(copy, CREDIT, f"--config.logging.keep_loras={keep}")
    assert "checkpoints/3 is damaged" in capsys.readouterr().err
    if not keep:
        same_results(copy, whole)
    assert (copy / LAST).read_bytes() == (whole / LAST).read_bytes()
    assert list(map(without_time, rows(copy))) == list(map(without_time, rows(whole)))
    assert rows(copy)[3]["device_hours"] > hours  # of all starts


def test_a_checkpoint_of_another_version_is_named_and_nothing_is_lost(command, copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    with Checkpoints(copy / "checkpoints") as saves:
        saves.save(2, {"weights": np.zeros(3)})
    log = copy / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # killed before its last epoch
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file() and file.name != "manifest.json"}
    with pytest.raises(SystemExit) as stop:
        command(copy, CREDIT)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "checkpoints/2 is of another version of the program" in line
    assert line.endswith("; choose another --workdir")
    assert {file: file.read_bytes() for file in before} == before


def test_a_clock_that_jumps_changes_nothing(command, tmp_path, whole, monkeypatch):
    """It goes a year ahead or back with every question, also between a run and its resume."""
    turn, year, real = itertools.count(), 365 * 86400, time.time
    jumping = lambda: real() + (year, -year, 0, 3 * year)[next(turn) % 4]  # noqa: E731
    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    command(tmp_path, CREDIT, "--config.training.num_epochs=2")
    command(tmp_path, CREDIT)
    same_results(tmp_path, whole)
    assert next(turn) > 10
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    hours = [row["device_hours"] for row in rows(tmp_path)]
    assert hours == sorted(hours)
    assert all(0 < row["seconds"] < 3600 for row in rows(tmp_path))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(calls: int, function: Callable, then: Callable = full) -> Callable:
    """`function`, of which all but the first `calls` calls do `then`."""
    counted = []

    def call(*given, **named):
        counted.append(1)
        return (function if len(counted) <= calls else then)(*given, **named)

    return call


# What the libraries raise on a full disk, by the part of a save.
NO_SPACE = {
    "LoRA": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "checkpoint": ValueError("DATA_LOSS: Failed writing: \"x\": No space left on device [os_error_code='28']"),
}


@pytest.mark.parametrize("part", NO_SPACE)
def test_a_full_disk_ends_a_run_with_one_line_and_the_same_command_goes_on(
    command, tmp_path, whole, capsys, monkeypatch, part
):
    def fail(*_, **__):
        raise NO_SPACE[part]

    with monkeypatch.context() as patch:
        if part == "LoRA":
            patch.setattr(files, "save_file", after(3, files.save_file, fail))  # the second file of the second LoRA
        else:
            save = ocp.CheckpointManager.save
            patch.setattr(ocp.CheckpointManager, "save", after(1, save, fail))
        with pytest.raises(SystemExit) as stop:
            command(tmp_path, CREDIT)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "cannot be written (No space left on device); make space or allow writing, then run the same" in line
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1"]
    command(tmp_path, CREDIT)
    same_results(tmp_path, whole)


def test_a_full_disk_never_stops_a_run_because_of_a_picture_or_a_log_line(
    command, tmp_path, whole, capsys, monkeypatch
):
    """The rows are in the checkpoint, and the next start writes them."""
    with monkeypatch.context() as patch:
        patch.setattr(metrics_log, "append", after(1, metrics_log.append))
        patch.setattr("nabla_gfn_jax.images.Image.Image.save", full)
        with pytest.raises(SystemExit) as stop:
            command(tmp_path, CREDIT)
    assert stop.value.code == 2  # at its end
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl cannot be written (No space left on device); the run goes on") == 1
    assert "update_00006.png cannot be written" in told
    assert "error: 4 rows of" in told
    assert (tmp_path / LAST).is_file()
    assert len(rows(tmp_path)) == 1
    command(tmp_path, CREDIT)
    same_results(tmp_path, whole)


def test_a_row_that_was_written_in_part_is_taken_back(tmp_path, monkeypatch):
    log = metrics_log.MetricsLog(tmp_path, 0, run_id="a", config={})
    log.write({"epoch": 0})
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        log.write({"epoch": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
    log.write({"epoch": 2})
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1, 2]
    assert not log.unwritten


def test_a_resume_on_a_full_disk_with_nothing_to_change_in_the_log(tmp_path, monkeypatch):
    log = metrics_log.MetricsLog(tmp_path, 0, run_id="a", config={})
    log.write({"epoch": 0})
    monkeypatch.setattr(files.os, "replace", full)
    metrics_log.MetricsLog(tmp_path, 1, run_id="a", config={})
    with pytest.raises(files.WriteError, match=r"metrics\.jsonl cannot be written \(No space left"):
        metrics_log.MetricsLog(tmp_path, 0, run_id="a", config={})


@pytest.mark.parametrize("how", ["fails", "hangs", "is not there"])
def test_a_logger_never_stops_or_slows_a_run(tmp_path, capsys, monkeypatch, how):
    def write(row):
        if how == "hangs":
            time.sleep(1000)
        full()

    def opened(*_):
        if how == "is not there":
            raise RuntimeError("the network is unreachable")
        return write, lambda: None

    monkeypatch.setattr("nabla_gfn_jax.runs.sinks.wandb", opened)
    start = time.monotonic()
    log = metrics_log.MetricsLog(tmp_path, 0, run_id="a", config={}, wandb=True)
    for epoch in range(1000):
        log.write({"epoch": epoch})
    log.close(0.2)
    assert time.monotonic() - start < 60
    assert len(rows(tmp_path)) == 1000
    said = {"fails": "no more rows (No space", "hangs": "not taken all rows in 0.2 s", "is not there": "unreachable"}
    (line,) = capsys.readouterr().err.splitlines()
    assert said[how] in line


def start(model: Path, workdir: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    command = [sys.executable, str(HERE / "tiny_process.py"), *flags(model, workdir), CREDIT, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_ends_in_15_s_and_goes_on_to_the_same_numbers(tiny_model, tmp_path):
    """SIGTERM after the second of five epochs, and Ctrl-C after the third, none of which the run would have saved."""
    more = (
        "--config.training.num_epochs=40",
        "--config.logging.checkpoint_every=100",
        "--config.logging.samples_every=9",
    )
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    process = start(tiny_model, whole, *more)
    _, error = process.communicate(timeout=3600)
    assert process.returncode == 0, error
    for number, code, at_least in ((signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 6)):
        process = start(tiny_model, workdir, *more)
        deadline = time.monotonic() + 3600
        while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < at_least:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        sent = time.monotonic()
        _, error = process.communicate(timeout=60)
        seconds = time.monotonic() - sent
        print(f"ended {seconds:.1f} s after the signal")
        assert (process.returncode, seconds < 15) == (code, True), error
        last = error.strip().splitlines()[-1]
        assert last.startswith("this command resumes the run: python -m nabla_gfn_jax.train --config")
        assert f"--workdir={workdir}" in last
        assert (workdir / f"checkpoints/{len(rows(workdir)) - 1}").is_dir()
    process = start(tiny_model, workdir, *more)
    _, error = process.communicate(timeout=3600)
    assert process.returncode == 0, error
    same_results(workdir, whole)
