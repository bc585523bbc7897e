"""Finding a model's files, and reading them."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file

from nabla_gfn_jax.checkpoints import weights
from nabla_gfn_jax.errors import UserError


def unreachable(repo, file, revision):
    raise LocalEntryNotFoundError("no network")


def test_the_users_folder_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "hf_hub_download", unreachable)
    monkeypatch.setenv(weights.FOLDER, str(tmp_path))
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps/a.pt").write_bytes(b"")
    assert weights.find("hps", "a.pt", repo="x/y", revision="main") == tmp_path / "hps/a.pt"


def test_the_hub_comes_next(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "hf_hub_download", lambda repo, file, revision: f"{tmp_path}/{repo}/{revision}/{file}")
    assert weights.find("hps", "a.pt", repo="x/y", revision="r") == tmp_path / "x/y/r/a.pt"


def test_without_a_network(monkeypatch):
    monkeypatch.setattr(weights, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"`hf download x/y a\.pt --revision main`.*/hps/a\.pt"):
        weights.find("hps", "a.pt", repo="x/y", revision="main")


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
    with pytest.raises(UserError, match=r"none\.pt holds no state dict"):
        weights.read_state_dict(tmp_path / "none.pt")
