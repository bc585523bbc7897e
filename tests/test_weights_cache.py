"""Programs that start at once and want the same pickled file, as a sweep's seeds do, or a node's processes."""

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
    """An empty cache folder of its own."""
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
    """What each program printed, or the last line of its errors; one for each fault, started at once."""
    commands = [[sys.executable, str(PROGRAM), *large, *fault] for fault in faults]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    ends = [process.communicate(timeout=100) for process in processes]
    return [(out + (err.strip().splitlines() or [""])[-1]).strip() for out, err in ends]


def test_one_converts_and_the_others_wait_for_it(large):
    assert sorted(run(large, (), (), (), ())) == ["converted", "kept", "kept", "kept"]


def test_where_there_are_no_locks_each_converts_for_itself(large, cache):
    """None reads what another is writing, and what they leave is whole."""
    assert run(large, *[("no lock",)] * 4) == ["converted"] * 4
    assert run(large, ()) == ["kept"]
    assert len(list(cache.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_one_that_is_killed_leaves_nothing_that_is_believed(large, cache, fault):
    assert run(large, (fault,)) == [""]
    assert sorted(run(large, (), ())) == ["converted", "kept"]
    assert not list(cache.glob(".*"))  # nor gigabytes that nobody would remove
