"""The folder of a run: one program claims it, only the same run resumes it, and its manifest describes the run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nabla_gfn_jax.checkpoints.lora_file import read_about
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.runs import loras, manifest, workdir
from nabla_gfn_jax.runs.workdir import claim

SETTINGS = {
    "seed": 0,
    "model": "emoji",
    "algorithm.beta": 80.0,
    "algorithm.credit_clip": float("inf"),
    "correction.block_out_channels": (32, 64),
    "training.num_epochs": 40,
    "training.remat": False,
}
FREE = {"training.num_epochs", "training.remat"}
ABOUT = {"model": "emoji", "prompts": "a_face", "reward": "valence", "algorithm": "ddpo", "beta": 80.0}
ABOUT |= {"sampler": "ddpm", "num_steps": 50, "guidance": 2.0}
LORA = {"attention": {"to_q": {"down": jnp.ones((4, 2)), "up": jnp.full((2, 3), 0.5)}}}


def leave_results(path):
    """Leaves results in the workdir, because a run without results can be replaced by another."""
    (path / "metrics.jsonl").touch()


HOLD = """
import sys, time
from pathlib import Path
from nabla_gfn_jax.runs.workdir import claim
with claim(Path(sys.argv[1]), {"seed": 0}):
    print("claimed", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path):
    """Another program that has claimed `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_program_is_refused_in_one_line_until_the_first_has_ended(holder, tmp_path):
    """A killed program leaves no lock. The error names the program that holds the lock."""
    with pytest.raises(UserError) as caught, claim(tmp_path / "run", {"seed": 0}):
        pass
    assert re.fullmatch(
        rf"workdir \S+/run is in use by process {holder.pid} on \S+, started 2\S+; .*", str(caught.value)
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claim(tmp_path / "run", {"seed": 0}):
        pass


def test_of_programs_that_start_at_once_one_has_the_workdir(tmp_path):
    """The other programs end with one line, whichever is first."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        while sum(process.poll() is not None for process in processes) < 3:
            time.sleep(0.02)
        (winner,) = (process for process in processes if process.poll() is None)
        assert winner.stdout.readline() == "claimed\n"
    finally:
        for process in processes:
            process.kill()
        ends = [process.communicate() for process in processes]
    last_lines = [error.strip().splitlines()[-1] for _, error in ends if error]
    assert len(last_lines) == 3
    assert all("UserError: workdir" in line and "is in use" in line for line in last_lines)
    with claim(tmp_path / "run", {"seed": 0}) as run:
        assert len(run.manifest.starts) == 1  # that of a run that left nothing is forgotten


def test_what_the_first_writes_is_not_touched_by_the_second(holder, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for settings in ({"seed": 0}, {"seed": 1}):
        with pytest.raises(UserError, match="in use"), claim(tmp_path / "run", settings):
            pass
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_the_other_processes_of_a_run_take_no_lock(holder, tmp_path):
    """They compare the settings and write nothing."""
    leave_results(tmp_path / "run")
    before = (tmp_path / "run/manifest.json").read_bytes()
    with claim(tmp_path / "run", {"seed": 0}, write=False) as other:
        other.save_lora(1, LORA)
        other.record_inputs({"prompts": ("a",)})
        assert not other.loras()
    assert (tmp_path / "run/manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="seed was 0 and is 1"), claim(tmp_path / "run", {"seed": 1}, write=False):
        pass


def test_the_lock_is_released_after_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path, SETTINGS):
        _ = 1 / 0
    with claim(tmp_path, SETTINGS), pytest.raises(UserError, match="in use"), claim(tmp_path, SETTINGS):
        pass


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path):
    with claim(tmp_path, SETTINGS):
        pass
    folders = [tmp_path / name for name in (".", "samples", "pictures", "lora/00004", "checkpoints/2")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (".a.png.1f.unfinished", "a.png"):
            (folder / name).write_text("")
    with claim(tmp_path, SETTINGS):
        assert not list(tmp_path.rglob("*.unfinished"))
        assert all((folder / "a.png").exists() for folder in folders)


def test_a_process_reads_the_manifest_while_another_writes_it(tmp_path):
    """This happens if all processes of a run are restarted simultaneously."""
    with claim(tmp_path, SETTINGS):
        pass
    stop = threading.Event()

    def write():
        while not stop.is_set():
            with claim(tmp_path, SETTINGS):
                pass

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            with claim(tmp_path, SETTINGS, write=False):
                pass
    finally:
        stop.set()
        writer.join()


def test_the_manifest_says_what_the_run_is(tmp_path):
    with claim(tmp_path, SETTINGS, FREE, ABOUT):
        pass
    text = (tmp_path / "manifest.json").read_text()
    contents = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert contents["config"]["algorithm"] == {"beta": 80.0, "credit_clip": "inf"}
    assert contents["config"]["correction"] == {"block_out_channels": [32, 64]}
    found = manifest.read(tmp_path)
    assert {name: getattr(found, name) for name in ABOUT} == ABOUT
    assert found.versions["jax"] == __import__("jax").__version__
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.versions.keys() >= {"nabla_gfn_jax", "jaxlib", "flax", "optax", "orbax-checkpoint"}
    assert found.devices == {"kind": "cpu", "count": 8, "processes": 1}
    assert found.starts[0]["process"] == os.getpid()
    assert re.fullmatch("[0-9a-f]{32}", found.id)


def test_infinite_numbers_come_back_as_numbers(tmp_path):
    with claim(tmp_path, SETTINGS, about={"beta": float("-inf")}):
        pass
    assert manifest.read(tmp_path).beta == float("-inf")


@pytest.mark.parametrize("change", [{"training.num_epochs": 80}, {"training.remat": True}, {}])
def test_a_resume_may_change_what_changes_no_number(tmp_path, change):
    """The run keeps its id; the manifest has the new values and both starts."""
    with claim(tmp_path, SETTINGS, FREE, ABOUT) as first:
        leave_results(tmp_path)
    with claim(tmp_path, SETTINGS | change, FREE, ABOUT) as second:
        pass
    assert second.manifest.id == first.manifest.id
    assert manifest.flatten(manifest.read(tmp_path).config) == manifest.flatten(
        json.loads(json.dumps(manifest.plain(manifest.unflatten(SETTINGS | change))))
    )
    assert len(manifest.read(tmp_path).starts) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"algorithm.beta": 7.0}, "algorithm.beta was 80.0 and is 7.0"),
        ({"algorithm.credit_clip": 1.0}, "algorithm.credit_clip was 'inf' and is 1.0"),
        ({"correction.block_out_channels": (32,)}, "correction.block_out_channels was [32, 64] and is [32]"),
        ({"lora.rank": 8}, "lora.rank was None and is 8"),
    ],
)
def test_a_resume_may_not_change_anything_else(tmp_path, change, named):
    with claim(tmp_path, SETTINGS, FREE):
        leave_results(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(UserError) as caught, claim(tmp_path, SETTINGS | change, FREE):
        pass
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_run_that_left_nothing_binds_nobody(tmp_path):
    """This happens if the first command had a mistake that was noticed before the first epoch."""
    with claim(tmp_path, SETTINGS, FREE, ABOUT) as first:
        first.record_inputs({"prompts": ("a",)})
        (tmp_path / "checkpoints").mkdir()
    with claim(tmp_path, SETTINGS | {"seed": 1}, FREE) as second:
        second.record_inputs({"prompts": ("b",)})
    found = manifest.read(tmp_path)
    assert (found.config["seed"], len(found.starts), found.model) == (1, 1, None)
    assert found.id != first.manifest.id


def test_many_changes_do_not_flood_the_screen(tmp_path):
    with claim(tmp_path, {f"a{i}": 0 for i in range(30)}):
        leave_results(tmp_path)
    with pytest.raises(UserError, match="and 25 more; choose"), claim(tmp_path, {f"a{i}": 1 for i in range(30)}):
        pass


def test_other_versions_are_told(tmp_path, monkeypatch, capsys):
    with claim(tmp_path, SETTINGS):
        leave_results(tmp_path)
    assert capsys.readouterr().err == ""
    real = workdir.versions()
    monkeypatch.setattr(workdir, "versions", lambda: real | {"jax": "9.9"})
    with claim(tmp_path, SETTINGS):
        pass
    assert re.fullmatch(r"the run resumes with other versions than before: jax \S+ → 9\.9\n", capsys.readouterr().err)


@pytest.mark.parametrize("older", ["config.json", "checkpoints", "metrics.jsonl"])
def test_a_run_without_a_manifest_is_refused(tmp_path, older):
    (tmp_path / older).touch()
    with pytest.raises(UserError, match="older version"), claim(tmp_path, SETTINGS):
        pass


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"id": "x"}', '{"id": "x", "config": {}, "starts": 3}'])
def test_a_damaged_manifest_is_named(tmp_path, damage):
    (tmp_path / "manifest.json").write_text(damage)
    leave_results(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"), claim(tmp_path, SETTINGS):
        pass


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no run: it has no manifest\.json"):
        manifest.read(tmp_path)


@pytest.fixture
def inputs(tmp_path):
    """Files with arbitrary contents, and the prompts."""
    (tmp_path / "model").mkdir()
    for name in ("unet.safetensors", "vocab.json"):
        (tmp_path / "model" / name).write_text(name)
    snapshot = tmp_path / f"hub/models--xswu--HPSv2/snapshots/{'a' * 40}"
    snapshot.mkdir(parents=True)
    (snapshot / "hps.pt").write_text("hps")
    return {
        "model/unet": tmp_path / "model/unet.safetensors",
        "model/vocab": tmp_path / "model/vocab.json",
        "reward/hps.pt": snapshot / "hps.pt",
        "prompts": ("a cat", "a dog"),
    }


def test_inputs_are_recorded_by_hash_and_revision(tmp_path, inputs):
    with claim(tmp_path / "run", SETTINGS) as run:
        run.record_inputs(inputs)
    found = manifest.read(tmp_path / "run").inputs
    assert found["reward/hps.pt"]["revision"] == f"xswu/HPSv2@{'a' * 40}"
    sums = subprocess.run(
        ["sha256sum", *map(str, (p for p in inputs.values() if isinstance(p, Path)))], capture_output=True
    )
    assert [line.split()[0] for line in sums.stdout.decode().splitlines()] == [
        found[name]["sha256"] for name in ("model/unet", "model/vocab", "reward/hps.pt")
    ]


def test_inputs_may_move_but_not_change(tmp_path, inputs):
    with claim(tmp_path / "run", SETTINGS) as run:
        run.record_inputs(inputs)
        moved = tmp_path / "elsewhere"
        inputs["model/unet"].rename(moved)
        run.record_inputs(inputs | {"model/unet": moved})


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("contents", r"model/vocab had SHA-256 [0-9a-f]{12}… and has [0-9a-f]{12}…; restore"),
        ("prompts", "prompts had SHA-256"),
        ("order of prompts", "prompts had SHA-256"),
        ("missing", "model/vocab is no longer read"),
        ("new", "lora.start_from was not read before"),
    ],
)
def test_a_resume_notices_changed_inputs(tmp_path, inputs, change, named, write):
    with claim(tmp_path / "run", SETTINGS) as run:
        run.record_inputs(inputs)
        leave_results(tmp_path / "run")
    if change == "contents":
        inputs["model/vocab"].write_text("vocab.jsoN")
    elif change == "prompts":
        inputs["prompts"] = ("a cat", "a cow")
    elif change == "order of prompts":
        inputs["prompts"] = inputs["prompts"][::-1]
    elif change == "missing":
        del inputs["model/vocab"]
    else:
        inputs["lora.start_from"] = inputs["model/vocab"]
    with claim(tmp_path / "run", SETTINGS, write=write) as run, pytest.raises(UserError, match=named) as caught:
        run.record_inputs(inputs)
    assert "\n" not in str(caught.value)


def test_loras_are_kept_by_updates_in_both_layouts(tmp_path):
    with claim(tmp_path, SETTINGS, about=ABOUT) as run:
        run.record_inputs({"prompts": ("a face",)})
        for updates in (0, 80, 160, 123_456):
            run.save_lora(updates, LORA)
        assert run.loras() == {n: tmp_path / f"lora/{n:05d}" for n in (0, 80, 160, 123_456)}
        assert run.latest_lora() == run.lora(123_456)
    folder = tmp_path / "lora/00080"
    for name, key in (
        ("diffusers", "unet.attention.to_q.lora_A.weight"),
        ("kohya", "lora_unet_attention_to_q.lora_down.weight"),
    ):
        file = folder / f"{name}.safetensors"
        np.testing.assert_array_equal(load_file(file)[key], np.ones((2, 4), np.float32))
        about = read_about(file)
        assert about == json.loads((folder / "about.json").read_text())
        assert about["updates"] == 80
        assert {name: about[name] for name in ABOUT} == ABOUT
        assert about["inputs"].keys() == {"prompts"}


def test_the_same_run_writes_the_same_bytes(tmp_path):
    """This also holds in another folder and at another time, so the hash of a file identifies the LoRA."""
    for name in ("a", "b"):
        with claim(tmp_path / name, SETTINGS, about=ABOUT) as run:
            run.save_lora(80, LORA)
    for file in ("diffusers.safetensors", "kohya.safetensors", "about.json"):
        assert (tmp_path / "a/lora/00080" / file).read_bytes() == (tmp_path / "b/lora/00080" / file).read_bytes()


@pytest.mark.parametrize(("keep", "left"), [(0, [10, 20, 30, 40]), (1, [40]), (3, [20, 30, 40]), (9, [10, 20, 30, 40])])
def test_only_the_newest_are_kept(tmp_path, keep, left):
    for updates in (10, 20, 30, 40):
        loras.save(tmp_path, updates, LORA, {}, keep)
    (tmp_path / "lora/mine").mkdir()
    loras.save(tmp_path, 40, LORA, {}, keep)  # repeated by a resumed run
    assert list(loras.saved(tmp_path)) == left
    assert (tmp_path / "lora/mine").is_dir()


def test_a_lora_that_was_cut_short_is_not_there(tmp_path, monkeypatch):
    """A LoRA without its last file counts as missing until it is written again."""

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(loras, "save_lora", fail)
    with pytest.raises(OSError, match="no space"):
        loras.save(tmp_path, 10, LORA, {})
    assert (tmp_path / "lora/00010/kohya.safetensors").is_file()
    assert loras.latest(tmp_path) is None
    monkeypatch.undo()
    loras.save(tmp_path, 10, LORA, {})
    assert loras.latest(tmp_path) == tmp_path / "lora/00010"
