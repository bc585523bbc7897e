"""Several programs that read the same pickled file simultaneously, such as the seeds of a sweep."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PROGRAM = Path(__file__).with_name("cache_process.py")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/nabla_gfn_jax/weights"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pickled file of 8 MiB, and its tensor's hash."""
    file = tmp_path_factory.mktemp("large") / "a.pt"
    a = np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32)
    torch.save({"a": torch.tensor(a)}, file)
    return str(file), hashlib.sha256(a.tobytes()).hexdigest()


def run(large, *faults):
    """The output of each program, or the last line of its errors. One program per fault, started simultaneously."""
    commands = [[sys.executable, str(PROGRAM), *large, *fault] for fault in faults]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    ends = [process.communicate(timeout=100) for process in processes]
    return [(out + (err.strip().splitlines() or [""])[-1]).strip() for out, err in ends]


def test_one_converts_and_the_others_wait_for_it(large):
    assert sorted(run(large, (), (), (), ())) == ["converted", "kept", "kept", "kept"]


def test_where_there_are_no_locks_each_converts_for_itself(large, cache):
    """No program reads a file that another is writing, and the final copy is complete."""
    assert run(large, *[("no lock",)] * 4) == ["converted"] * 4
    assert run(large, ()) == ["kept"]
    assert len(list(cache.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_one_that_is_killed_leaves_nothing_that_is_believed(large, cache, fault):
    assert run(large, (fault,)) == [""]
    assert sorted(run(large, (), ())) == ["converted", "kept"]
    assert not list(cache.glob(".*"))  # nor gigabytes that nobody would remove
