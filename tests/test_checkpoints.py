"""Checkpoints that are damaged, of another version, or written to a full disk."""

import json
import re
import resource
import shutil
import signal
import threading
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.checkpoints.files import WriteError
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.runs.checkpoints import ABOUT, Checkpoints


def tree(step: int) -> dict:
    """About 80 kB that do not compress."""
    numbers = np.random.default_rng(step).normal(size=10_000)
    return {"policy": {"down": numbers}, "step": np.array(step, np.int32), "data": numbers[:7].astype(np.float32)}


LIKE = {"policy": {"down": np.zeros(10_000)}, "step": np.array(0, np.int32), "data": np.zeros(7, np.float32)}


def same(found, step: int) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(found), leaves(tree(step)), strict=True))


def leaves(of: dict) -> list:
    return [of["policy"]["down"], of["step"], of["data"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "checkpoints"
    with Checkpoints(folder) as saves:
        for step in (1, 2, 3):
            saves.save(step, tree(step), {"seconds": 1.5 * step})
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "checkpoints")


def contents(folder):
    """The files of the newest save with array data, the largest first."""
    files = [f for f in (folder / "3").rglob("*") if f.is_file() and f.name != ABOUT]
    return sorted(files, key=lambda f: -f.stat().st_size)


def test_the_newest_whole_save_is_restored_with_what_was_said_about_it(folder, capsys):
    with Checkpoints(folder) as saves:
        step, found, about = saves.restore(LIKE)
    assert (step, about) == (3, {"seconds": 4.5})
    assert same(found, 3)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(2, 0, [11, 12]), (1, 0, [12]), (3, 0, [10, 11, 12]), (2, 4, [4, 8, 11, 12]), (99, 5, list(range(1, 13)))],
)
def test_the_newest_saves_and_every_nth_are_kept(tmp_path, keep, every, left):
    small = {"step": np.array(0)}
    with Checkpoints(tmp_path, keep, every) as saves:
        for step in range(1, 9):
            saves.save(step, small)
    with Checkpoints(tmp_path, keep, every) as saves:  # a resumed run
        for step in range(9, 13):
            saves.save(step, small)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == left


def test_a_resumed_run_may_keep_fewer(folder):
    with Checkpoints(folder, keep=1) as saves:
        saves.save(4, tree(4))
    assert [p.name for p in folder.iterdir()] == ["4"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a bit": (flip, "has changed"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "has changed"),
    "empty": (lambda file: file.write_bytes(b""), "has changed"),
    "gone": (lambda file: file.unlink(), "is missing"),
    "half": (lambda file: shutil.rmtree(file.parents[1]), "is missing, and"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_save_is_reported_in_one_line_and_the_one_before_is_used(folder, capsys, damage):
    do, said = DAMAGES[damage]
    do(contents(folder)[0])
    with Checkpoints(folder) as saves:
        step, found, about = saves.restore(LIKE)
        assert (step, about, saves.latest) == (2, {"seconds": 3.0}, 2)
        assert same(found, 2)
        saves.save(3, tree(3))  # the run repeats what was lost
        saves.wait()
        assert same(saves.restore(LIKE).tree, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder / '3'} is damaged (")
    assert said in line
    assert line.endswith("): it is now 3.damaged, and 2 is used")
    assert (folder / "3.damaged").is_dir()


def test_a_flipped_bit_in_a_large_or_a_small_file_is_noticed(folder, tmp_path):
    for file in [*contents(folder)[:2], *contents(folder)[-2:]]:
        copy = shutil.copytree(folder, tmp_path / "copy")
        flip(copy / file.relative_to(folder))
        with Checkpoints(copy) as saves:
            assert saves.restore(LIKE).step == 2, file.name
        shutil.rmtree(copy)


@pytest.mark.parametrize("about", [b"", b"{", b"[]", b'{"files": 3}', b"\xff"])
def test_damaged_hashes_are_damage(folder, about):
    (folder / "3" / ABOUT).write_bytes(about)
    with Checkpoints(folder) as saves:
        assert saves.restore(LIKE).step == 2


def test_a_save_without_hashes_is_used_if_it_can_be_read(folder, capsys):
    """An older version wrote none, and a kill may come just before they are written."""
    (folder / "3" / ABOUT).unlink()
    with Checkpoints(folder) as saves:
        assert saves.restore(LIKE)[::2] == (3, {})
    assert capsys.readouterr().err == ""
    shutil.rmtree(folder / "3/default/d")
    with Checkpoints(folder) as saves:
        assert saves.restore(LIKE).step == 2


def test_if_no_save_is_whole_nothing_is_moved_and_the_error_names_all(folder):
    for step in (2, 3):
        flip(next((folder / str(step)).rglob("manifest.ocdbt")))
    with Checkpoints(folder) as saves, pytest.raises(UserError) as caught:
        saves.restore(LIKE)
    assert re.fullmatch(
        r"no save in \S+ can be restored \(3: .* has changed; 2: .* has changed\); .*", str(caught.value)
    )
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_a_whole_save_of_another_structure_is_not_called_damaged(folder):
    with Checkpoints(folder) as saves, pytest.raises(UserError, match="is of another version of the program") as caught:
        saves.restore({"another": np.zeros(3)})
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


@contextmanager
def files_of_at_most(size: int):
    """The system refuses to make a file larger, as if the disk were full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 200, 20_000])
def test_a_full_disk_is_one_line_the_saves_before_stay_and_the_next_try_succeeds(folder, capfd, size):
    """With room for nothing, for Orbax's small files alone, and for no array."""
    with Checkpoints(folder) as saves:
        with files_of_at_most(size):
            saves.save(4, tree(4))
            with pytest.raises(WriteError) as caught:
                saves.wait()
        assert re.fullmatch(
            rf"{folder}/4 cannot be written \(File too large\); make space or allow writing, .*", str(caught.value)
        )
        assert capfd.readouterr().err == ""
    with Checkpoints(folder) as saves:
        assert saves.restore(LIKE).step == 3
        saves.save(4, tree(4))
        saves.wait()
        assert same(saves.restore(LIKE).tree, 4)
        assert "files" in json.loads((folder / "4" / ABOUT).read_text())


def test_a_full_disk_when_the_hashes_are_written(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, Checkpoints(folder) as saves:
        patch.setattr("nabla_gfn_jax.checkpoints.files.os.replace", full)
        saves.save(4, tree(4))
        with pytest.raises(WriteError, match="No space left on device"):
            saves.wait()
    with Checkpoints(folder) as saves:
        assert saves.restore(LIKE).step in (3, 4)


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing begins when this event is set."""
    may_write, write = threading.Event(), Checkpoints._write

    def slowly(*given):
        assert may_write.wait(60)
        write(*given)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    yield may_write
    may_write.set()


def test_training_goes_on_while_a_save_is_written_and_may_change_or_donate_what_is_saved(tmp_path, slow_disk):
    changed, kept = tree(1), tree(1)
    donated = jnp.asarray(kept["policy"]["down"])
    expected = np.array(donated)
    with Checkpoints(tmp_path) as saves:
        saves.save(1, {"host": changed, "device": donated})
        assert not [p for p in tmp_path.iterdir() if p.name == "1"]
        changed["policy"]["down"] *= 2
        jax.jit(lambda a: a + 1, donate_argnums=0)(donated).block_until_ready()
        slow_disk.set()
        saves.wait()
        assert (tmp_path / "1" / ABOUT).exists()
        found = saves.restore({"host": LIKE, "device": np.zeros(10_000, expected.dtype)}).tree
    assert same(found["host"], 1)
    np.testing.assert_array_equal(found["device"], expected)


def test_saves_are_written_in_turn_and_all_of_them_before_the_end(tmp_path, slow_disk):
    with Checkpoints(tmp_path) as saves:
        saves.save(1, tree(1))
        threading.Timer(0.2, slow_disk.set).start()
        saves.save(2, tree(2))  # waits for 1
        assert (tmp_path / "1" / ABOUT).exists()
    with Checkpoints(tmp_path) as saves:
        assert same(saves.restore(LIKE).tree, 2)


def test_an_error_in_the_background_is_raised_once_by_whatever_asks_next(folder):
    for ask in (lambda saves: saves.save(5, tree(5)), lambda saves: saves.latest, lambda saves: saves.__exit__(None)):
        with Checkpoints(folder) as saves, files_of_at_most(200):
            saves.save(4, tree(4))
            with pytest.raises(WriteError, match="4 cannot be written"):
                ask(saves)
            saves.wait()


def test_an_error_that_ends_the_run_is_not_hidden_by_one_in_the_background(folder):
    def run():
        with files_of_at_most(200), Checkpoints(folder) as saves:
            saves.save(4, tree(4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
