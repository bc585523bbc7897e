"""Files are written completely or not at all, and JSON files are valid JSON."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.checkpoints import files, hashes
from nabla_gfn_jax.errors import UserError


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_file_is_as_before_when_writing_fails(tmp_path, monkeypatch, fails):
    file = tmp_path / "folder/file.json"
    files.write_json(file, {"step": 1})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no space"):
        files.write_json(file, {"step": 2})
    assert files.read_json(file) == {"step": 1}
    assert [path.name for path in file.parent.iterdir()] == ["file.json"]


def test_contents_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """The name is on the disk before the function returns, so a power cut leaves the old or the new file."""
    done = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def rename(old, new):
        done.append(("rename", Path(old)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    files.write_whole(tmp_path / "a", b"contents")
    (flushed, unfinished), (renamed, source), (flushed_too, folder) = done
    assert (flushed, renamed, flushed_too) == ("flush", "rename", "flush")
    assert unfinished == source
    assert folder == tmp_path


def test_many_writers_and_a_reader(tmp_path):
    """Each writer has its own contents, and the reader always finds the complete contents of one of them."""
    file = tmp_path / "a.json"
    stop = threading.Event()

    def write(letter):
        while not stop.is_set():
            files.write_json(file, {"letters": letter * 50_000})

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for writer in writers:
        writer.start()
    try:
        while not file.exists():
            time.sleep(0.001)
        seen = {"".join(sorted(set(files.read_json(file)["letters"]))) for _ in range(200)}
        sizes = {len(files.read_json(file)["letters"]) for _ in range(50)}
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert seen <= {"a", "b", "c"}
    assert sizes == {50_000}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_program_was_writing_can_be_removed(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from nabla_gfn_jax.checkpoints import files
with files.replacing(Path({str(tmp_path / "a.json")!r})) as unfinished:
    unfinished.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    files.remove_unfinished(tmp_path, "b.json")
    assert len(list(tmp_path.iterdir())) == 1
    files.remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_any_new_file(tmp_path):
    """Other users may read the file if the user's mask allows it."""
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_is_what_every_reader_takes(tmp_path):
    values = {
        "floats": [math.inf, -math.inf, math.nan, 1.5],
        "tuple": (1, (2,)),
        "path": Path("a/b"),
        "arrays": (np.float32(0.5), jnp.float32(jnp.inf), np.int64(3), np.bool_(True)),
        "none": None,
    }
    files.write_json(tmp_path / "a.json", values)

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert read == {
        "floats": ["inf", "-inf", "nan", 1.5],
        "tuple": [1, [2]],
        "path": "a/b",
        "arrays": [0.5, "inf", 3, True],
        "none": None,
    }
    assert [float(x) for x in read["floats"]] == pytest.approx(values["floats"], nan_ok=True)


def test_a_place_that_cannot_be_written_is_told_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_can_write(tmp_path / "new/folder/results.json")
    files.check_can_write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
    assert not list((tmp_path / "new/folder").iterdir())
    for bad in (tmp_path / "file/results.json", tmp_path):
        with pytest.raises(UserError, match=r"cannot be written .*; choose another place"):
            files.check_can_write(bad)


def test_headers_carry_metadata(tmp_path):
    tensors = {"a": np.arange(3.0), "b": np.ones((2, 3), np.float16).T}
    files.write_safetensors(tmp_path / "a", tensors)
    files.write_safetensors(tmp_path / "b", tensors, {"about": "all"})
    for name, expected in (("a", {"format": "pt"}), ("b", {"about": "all"})):
        read, metadata = files.read_safetensors(tmp_path / name)
        assert metadata == expected
        assert read.keys() == tensors.keys()
        for key, array in read.items():
            np.testing.assert_array_equal(array, tensors[key])


class TestHashes:
    EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

    @pytest.fixture(autouse=True)
    def reads(self, tmp_path, monkeypatch):
        """The files whose contents were read. All files count as large, and the cache is empty."""
        reads = []
        read = hashes.read_sha256
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(hashes, "_LARGE", 0)
        monkeypatch.setattr(hashes, "read_sha256", lambda file: (reads.append(file), read(file))[1])
        return reads

    @staticmethod
    def old(file, contents=b"", age=100.0):
        file.write_bytes(contents)
        then = time.time() - age
        os.utime(file, (then, then))
        return file

    def test_a_large_file_is_read_once(self, tmp_path, reads):
        file = self.old(tmp_path / "a")
        assert [hashes.sha256(file) for _ in range(3)] == [self.EMPTY] * 3
        assert len(reads) == 1

    def test_a_file_that_changed_is_read_again(self, tmp_path, reads):
        first = hashes.sha256(self.old(tmp_path / "a", b"x"))
        assert hashes.sha256(self.old(tmp_path / "a", b"y", age=99)) != first
        assert hashes.sha256(self.old(tmp_path / "a", b"x", age=98)) == first
        assert len(reads) == 3

    def test_a_file_that_is_being_written_is_not_remembered(self, tmp_path, reads):
        """Its next write may keep the size and, with a coarse clock, the time."""
        file = self.old(tmp_path / "a", b"x", age=0)
        status = file.stat()
        first = hashes.sha256(file)
        file.write_bytes(b"y")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert hashes.sha256(file) != first

    def test_the_hubs_cache_names_files_by_their_hash(self, tmp_path, reads):
        """This holds for large files. Small files have git's hash as their name."""
        (tmp_path / "blobs").mkdir()
        for name in (self.EMPTY, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"):
            (tmp_path / "blobs" / name).touch()
            (tmp_path / "link").symlink_to(tmp_path / "blobs" / name)
            assert hashes.sha256(tmp_path / "link") == self.EMPTY
            (tmp_path / "link").unlink()
        assert len(reads) == 1

    def test_a_cache_that_is_damaged_or_cannot_be_written(self, tmp_path, monkeypatch):
        file = self.old(tmp_path / "a")
        hashes.sha256(file)
        (note,) = (tmp_path / "cache").rglob("*.json")
        for damaged in ("{", "[]", "{}"):
            note.write_text(damaged)
            assert hashes.sha256(file) == self.EMPTY
        (tmp_path / "no folder").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
        assert hashes.sha256(file) == self.EMPTY
