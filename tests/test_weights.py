"""Reading weights: safetensors one tensor at a time, pickles converted once, and the memory that it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from safetensors.numpy import save_file

from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints import weights
from nabla_gfn_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/nabla_gfn_jax/weights"


def test_state_dicts(tmp_path):
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"a": a}, tmp_path / "a.safetensors")
    torch.save({"a": torch.tensor(a)}, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": {"a": torch.tensor(a)}}, tmp_path / "nested.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name in ("a.safetensors", "a.pt", "nested.pt"):
        state = weights.read_state_dict(tmp_path / name)
        assert state.keys() == {"a"}
        np.testing.assert_array_equal(state["a"], a)
    with pytest.raises(UserError, match=r"none\.pt has no state dict"):
        weights.read_state_dict(tmp_path / "none.pt")


def test_a_file_that_does_not_exist(tmp_path):
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(UserError, match=rf"{name} (does not exist|is missing)"):
            weights.read_state_dict(tmp_path / name)


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """A pickled file, its tensor, and the number of times that a pickle was read."""
    counts = []
    read = weights.torch_pickle.read
    monkeypatch.setattr(weights.torch_pickle, "read", lambda file: (counts.append(file), read(file))[1])
    a = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    torch.save({"a": torch.tensor(a)}, tmp_path / "a.pt")
    return tmp_path / "a.pt", a, counts


def test_a_pickle_is_converted_once(pickled, cache):
    file, a, counts = pickled
    for _ in range(3):
        np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a)
    assert len(counts) == 1
    (note,) = cache.glob("*.json")
    assert json.loads(note.read_text())["source"] == str(file.resolve())


def test_a_copy_that_nobody_touched_is_not_read_to_check_it(pickled, monkeypatch):
    """Otherwise every start would read gigabytes; only the tensors are read."""
    file, a, _ = pickled
    weights.read_state_dict(file)
    monkeypatch.setattr(weights, "read_sha256", lambda path: pytest.fail("was read"))
    np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a)


def test_a_copy_that_was_moved_is_read_once_to_check_it(pickled, cache, monkeypatch):
    """A copy that was moved to another machine has another time but the same contents."""
    file, a, counts = pickled
    weights.read_state_dict(file)
    (copy,) = cache.glob("*.safetensors")
    os.utime(copy, (0, 0))
    read, hashed = weights.read_sha256, []
    monkeypatch.setattr(weights, "read_sha256", lambda path: (hashed.append(path), read(path))[1])
    for _ in range(2):
        np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a)
    assert hashed == [copy]
    assert len(counts) == 1


def test_a_changed_source_is_converted_again(pickled, cache):
    """The new copy has another name, so a program that still reads the old tensors gets an error, not new tensors."""
    file, a, counts = pickled
    weights.read_state_dict(file)
    old = weights.read_state_dict(file)
    torch.save({"a": torch.tensor(a + 1)}, file)
    np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a + 1)
    assert len(counts) == 2
    assert len(list(cache.glob("*.safetensors"))) == 1
    with pytest.raises(FileNotFoundError):
        old["a"]


@pytest.mark.parametrize("damage", ["flip", "cut", "note", "other note"])
def test_a_damaged_copy_is_made_anew(pickled, cache, damage):
    file, a, counts = pickled
    weights.read_state_dict(file)
    (copy,) = cache.glob("*.safetensors")
    contents = bytearray(copy.read_bytes())
    if damage == "flip":
        contents[-7] ^= 1
        copy.write_bytes(contents)
    elif damage == "cut":
        copy.write_bytes(contents[:-10])
    else:
        copy.with_suffix(".json").write_text("{" if damage == "note" else "[]")
    np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a)
    assert len(counts) == 2
    np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a)
    assert len(counts) == 2


def test_a_cache_that_cannot_be_written(pickled, tmp_path, monkeypatch):
    file, a, _ = pickled
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    np.testing.assert_array_equal(weights.read_state_dict(file)["a"], a)


class Hostile:
    def __reduce__(self):
        return (print, ("run!",))


def test_a_model_with_pickled_weights(tmp_path, capsys):
    """Older repositories have pickled weights. A hostile pickle is refused by name and not executed."""
    oracle.pipeline(tmp_path, **oracle.ONE_LEVEL).save_pretrained(tmp_path)
    expected = load_folder(tmp_path).params
    for part, old in {"unet": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}.items():
        (file,) = (tmp_path / part).glob("*.safetensors")
        state = {name: torch.tensor(a) for name, a in weights.TensorFiles(file).items()}
        torch.save(state, file.with_name(f"{old}.bin"), _use_new_zipfile_serialization=part == "unet")
        file.unlink()
    jax.tree.map(np.testing.assert_array_equal, load_folder(tmp_path).params, expected)
    torch.save({"a": Hostile()}, tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.bin asks for (builtins|__builtin__)\.print"):
        load_folder(tmp_path)
    assert "run!" not in capsys.readouterr().out


MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.checkpoints.weights import read_state_dict
shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
expected = {f"layer.{i}": {"kernel": shape} for i in range(100)}
jax.block_until_ready(jnp.zeros(8) + 1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
state = read_state_dict(Path(sys.argv[1]))
params = from_state_dict(state, expected, "file", place=lambda a: jnp.asarray(a, jnp.float32))
jax.block_until_ready(params)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux states it")
@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.thorough
def test_memory_is_that_of_the_weights(tmp_path, stored):
    """With 400 MiB of float32 weights, the process grows by less than 1.3 times that."""
    rng = np.random.default_rng(0)
    state = {f"layer.{i}.weight": rng.normal(size=(1024, 1024)).astype(stored) for i in range(100)}
    save_file(state, tmp_path / "a.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1.0 * 400 <= float(done.stdout) < 1.3 * 400
