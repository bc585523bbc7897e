"""A run in two processes of four devices each equals a run in one, resumes after one is killed, and never hangs."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from test_training import without_time
from tiny_run import flags

HERE = Path(__file__).parent
EPOCHS = 6
COMPILING = 400  # seconds at most, in two processes, on a slow and busy machine
SLURM_PORTS = range(2**16 - 2**12, 2**16)  # a job's coordinator has the one of its number modulo 2^12


def free_port(ports: Iterable[int] = (0,)) -> int:
    """The first of `ports` that is free, 0 being any."""
    for port in ports:
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return s.getsockname()[1]
    raise OSError("no port is free")


def start(
    model: Path, workdir: Path, *more: str, slurm: bool = False, within: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts both processes of a run, identified by flags or by Slurm. `within` is a command that runs another."""
    port = free_port(SLURM_PORTS if slurm else (0,))
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_COMPILATION_CACHE_DIR": cache}

    def process(i: int) -> subprocess.Popen:
        who = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        job = {"JOB_ID": port - SLURM_PORTS[0], "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": i, "LOCALID": i}
        env = environment | {f"SLURM_{name}": str(value) for name, value in job.items() if slurm}
        who = ["--distributed"] if slurm else who
        command = [*within, sys.executable, str(HERE / "tiny_process.py"), *flags(model, workdir), *who, *more]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return [process(i) for i in range(2)]


def wait_for(file: Path, processes: list[subprocess.Popen]) -> None:
    """Waits until the run has written the file. Fails if a process ends before."""
    deadline = time.time() + COMPILING
    while not file.exists():
        assert time.time() < deadline
        if any(p.poll() is not None for p in processes):
            codes = [p.poll() for p in processes]
            for p in processes:
                p.kill()
            pytest.fail("\n\n".join(f"{c}: {p.communicate()[1]}" for c, p in zip(codes, processes, strict=True)))
        time.sleep(0.01)


def stop(processes: list[subprocess.Popen]) -> None:
    for p in processes:
        p.kill()
        if p.stdout and not p.stdout.closed:
            p.communicate()


def end(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process. Fails if a process has not ended in time."""
    try:
        found = [p.communicate(timeout=seconds) for p in processes]
    finally:
        stop(processes)
    return [(p.returncode, *texts) for p, texts in zip(processes, found, strict=True)]


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.thorough
def test_two_processes_one_is_killed_and_both_resume(tiny_model, command, tmp_path):
    """The run is started with flags and resumed with Slurm. Numbers, LoRA and images equal those of one process."""
    single, pair = tmp_path / "single", tmp_path / "pair"
    longer = f"--config.training.num_epochs={EPOCHS}"
    command(single, longer)

    processes = start(tiny_model, pair, longer)
    wait_for(pair / "checkpoints/2", processes)
    processes[1].send_signal(signal.SIGKILL)
    killed_at = time.time()
    (code, _, error), (killed, _, _) = end(processes, 90)
    print(f"the other process ended after {time.time() - killed_at:.1f} s:", error.splitlines()[-1])
    assert killed == -signal.SIGKILL
    assert code == 2, error
    assert "another process is gone" in error
    assert len(rows(pair)) < EPOCHS

    ended = end(start(tiny_model, pair, longer, slurm=True), COMPILING)
    assert [code for code, _, _ in ended] == [0, 0], [error for _, _, error in ended]
    assert [row["epoch"] for row in rows(pair)] == list(range(EPOCHS + 2)) == [row["epoch"] for row in rows(single)]
    for ours, theirs in zip(rows(pair), rows(single), strict=True):
        for name in ("reward_mean", "reward_std", "loss", "grad_norm_lora"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours["epoch"])
    last = f"lora/{2 * EPOCHS:05d}/diffusers.safetensors"
    ours, theirs = (load_file(folder / last) for folder in (pair, single))
    flat = [np.concatenate([lora[name].ravel() for name in sorted(theirs)]) for lora in (ours, theirs)]
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-5 * np.linalg.norm(flat[1])
    grids = sorted(path.name for path in (single / "samples").iterdir())
    assert grids == sorted(path.name for path in (pair / "samples").iterdir())
    for name in grids:
        ours, theirs = (np.asarray(Image.open(folder / "samples" / name), np.int16) for folder in (pair, single))
        assert np.abs(ours - theirs).max() <= 1  # of 255: where rounding falls
        assert theirs.std() > 10  # a picture


@pytest.mark.slow
def test_either_of_two_processes_is_killed_at_random_instants_and_the_bits_are_the_same(tiny_model, tmp_path):
    """Each time the other ends within a minute. `KILLS` is the number of kills, and `SEED` chooses the instants."""
    kills, chance = int(os.environ.get("KILLS", "10")), random.Random(int(os.environ.get("SEED", "0")))
    longer, seconds = f"--config.training.num_epochs={2 * EPOCHS}", []
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    for folder in (tmp_path / "compiles", whole):
        begun = time.monotonic()
        assert [code for code, _, _ in end(start(tiny_model, folder, longer), COMPILING)] == [0, 0]
        duration = time.monotonic() - begun
    while len(seconds) < kills:
        processes, who = start(tiny_model, workdir, longer), len(seconds) % 2
        try:
            processes[who].wait(chance.uniform(0.2, 0.9) * duration)
        except subprocess.TimeoutExpired:
            processes[who].send_signal(signal.SIGKILL)
            begun = time.monotonic()
            (code, _, error) = end(processes, 60)[1 - who]
            seconds.append(time.monotonic() - begun)
            assert code != 0, error
            print(f"process {who} killed; the other ended after {seconds[-1]:.1f} s", flush=True)
        else:  # the run had ended before
            end(processes, 60)
            shutil.rmtree(workdir)
    assert [code for code, _, _ in end(start(tiny_model, workdir, longer), COMPILING)] == [0, 0]
    assert list(map(without_time, rows(workdir))) == list(map(without_time, rows(whole)))
    for file in (whole / "lora").rglob("*.safetensors"):
        assert (workdir / file.relative_to(whole)).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("who", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_no_process_hangs_when_the_coordinator_dies_or_another_freezes(tiny_model, tmp_path, who, how):
    """The coordination service notices a process that freezes without closing its connection."""
    workdir = tmp_path / "run"
    processes = start(tiny_model, workdir, "--config.training.num_epochs=1000")
    wait_for(workdir / "checkpoints/1", processes)
    processes[who].send_signal(how)
    other, start_of_wait = processes[1 - who], time.time()
    try:
        _, error = other.communicate(timeout=100)
    finally:
        stop(processes)
    print(f"ended after {time.time() - start_of_wait:.1f} s with {other.returncode}: {error[-600:]}")
    assert other.returncode != 0
    assert re.search("another process is gone|distributed service detected fatal errors", error), error


@pytest.fixture
def network():
    """A network of the test's own, as a command that runs another in it, and a function that sets it up or down."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("a network of its own needs unshare, nsenter and ip")
    holder = subprocess.Popen(["unshare", "--map-root-user", "--net", "sleep", "3600"])
    within = ("nsenter", f"--target={holder.pid}", "--user", "--net", "--preserve-credentials")

    def put(where: str) -> None:
        subprocess.run([*within, "ip", "link", "set", "lo", where], check=True)

    time.sleep(1)
    try:
        put("up")
    except (subprocess.CalledProcessError, OSError) as error:
        holder.kill()
        pytest.skip(f"there is no network namespace here ({error})")
    yield within, put
    holder.kill()
    holder.wait()


@pytest.mark.slow
def test_a_network_that_is_cut_ends_both_and_the_run_goes_on_to_the_same_bits(tiny_model, tmp_path, network):
    """The coordination service notices it: no process waits for the other for more than 100 s."""
    within, put = network
    longer = f"--config.training.num_epochs={2 * EPOCHS}"
    whole, workdir = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _, _ in end(start(tiny_model, whole, longer, within=within), COMPILING)] == [0, 0]
    processes = start(tiny_model, workdir, longer, within=within)
    wait_for(workdir / "checkpoints/1", processes)
    put("down")
    begun = time.monotonic()
    ended = end(processes, 100)
    print(f"both ended after {time.monotonic() - begun:.1f} s:", [(code, error[-300:]) for code, _, error in ended])
    for code, _, error in ended:
        assert code != 0
        assert re.search("another process is gone|distributed service detected fatal errors", error), error
    assert len(rows(workdir)) < 2 * EPOCHS
    put("up")
    assert [code for code, _, _ in end(start(tiny_model, workdir, longer, within=within), COMPILING)] == [0, 0]
    assert list(map(without_time, rows(workdir))) == list(map(without_time, rows(whole)))
    for file in (whole / "lora").rglob("*.safetensors"):
        assert (workdir / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_processes_that_do_not_say_who_they_are(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, "--coordinator=127.0.0.1:1")
    assert stop.value.code == 2
    assert "--num_processes" in capsys.readouterr().err
