"""Finding a model's files in the user's folder, in the hub's cache or by download, and the errors without them."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.base_models.names import SHIPPED_MODELS, resolve_model
from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.data.prompts import PROMPT_SETS
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.rewards import ABSTRACT, REWARDS

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UNPINNED = ("zhwang/HPDv2", "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"


def unreachable(*arguments, **options):
    raise LocalEntryNotFoundError("no network")


def test_the_users_folder_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    monkeypatch.setenv(hub.FOLDER, str(tmp_path))
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps/a.pt").write_bytes(b"")
    assert hub.find("hps", "a.pt", repo="x/y") == tmp_path / "hps/a.pt"
    assert hub.find("hps", "somewhere/a.pt", repo="x/y") == tmp_path / "hps/a.pt"


def test_the_hub_comes_next(monkeypatch, tmp_path):
    """A cached file of a commit is used without asking the hub.

    For a branch, the newest file is used if there is a network.
    """
    cached, asked = set(), []

    def download(repo, file, *, revision, repo_type, local_files_only=False):
        if local_files_only and revision not in cached:
            raise LocalEntryNotFoundError("not cached")
        asked.append(local_files_only)
        return f"{tmp_path}/{repo_type}/{repo}/{revision}/{file}"

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "_listing", lambda *arguments: [])
    assert hub.find("hps", "a.pt", repo="x/y", revision="r") == tmp_path / "model/x/y/r/a.pt"
    cached |= {"r", COMMIT}
    for revision in ("r", COMMIT):
        hub.find("hps", "a.pt", repo="x/y", revision=revision)
    assert asked == [False, True, False, True]
    monkeypatch.setattr(hub, "_listing", unreachable)
    assert hub.find("hps", "a.pt", repo="x/y", revision="r") == tmp_path / "model/x/y/r/a.pt"


def test_without_a_network(monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(hub, "_listing", unreachable)
    with pytest.raises(UserError, match=r"`hf download x/y a\.pt --revision main`.*/hps/a\.pt"):
        hub.find("hps", "a.pt", repo="x/y")
    with pytest.raises(UserError, match=r"`hf download x/y b/a\.csv --revision main --repo-type dataset`.*/hps/a\.csv"):
        hub.find("hps", "b/a.csv", repo="x/y", repo_type="dataset")


# What the repository of Stable Diffusion 1.5 holds, beside its pictures.
LISTING = [
    "feature_extractor/preprocessor_config.json",
    "model_index.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    *(f"text_encoder/{f}" for f in ("config.json", "model.fp16.safetensors", "model.safetensors", "pytorch_model.bin")),
    *(f"tokenizer/{f}" for f in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
    *(
        f"unet/{f}"
        for f in (
            "config.json",
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.non_ema.safetensors",
            "diffusion_pytorch_model.safetensors",
        )
    ),
    *(f"vae/{f}" for f in ("config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors")),
    "v1-5-pruned-emaonly.ckpt",
]
WANTED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def test_only_what_is_read_is_chosen():
    assert set(hub.choose_files(LISTING)) == WANTED


def test_shards_and_pickles_are_chosen_where_there_is_nothing_better():
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    chosen = hub.choose_files([*shards, *half, index, "unet/diffusion_pytorch_model.bin"])
    assert chosen == [index, *shards]
    older = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    half_index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    assert hub.choose_files([*shards, *older, half_index]) == [half_index, *older]
    assert hub.choose_files([*shards, *half, half_index]) == [half_index, *half]
    assert hub.choose_files(["text_encoder/pytorch_model.bin"]) == ["text_encoder/pytorch_model.bin"]


class FakeHub:
    """A fake hub: a folder as the repository, and a cache beside it."""

    def __init__(self, source, cache):
        self.source, self.cache, self.calls = source, cache, []

    def repo_info(self, repo, *, revision, repo_type, timeout):
        assert timeout < 10
        self.calls.append(("list", repo, revision))
        names = [p.relative_to(self.source).as_posix() for p in self.source.rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, repo, *, revision, allow_patterns=None, local_files_only=False):
        folder = self.cache / revision
        if local_files_only:
            if not folder.exists():
                raise LocalEntryNotFoundError("not cached")
            return str(folder)
        self.calls.append(("download", repo, revision))
        for file in allow_patterns:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / file, folder / file)
        return str(folder)


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    source = tmp_path / "source"
    pipe = oracle.pipeline(source, **oracle.ONE_LEVEL)
    pipe.save_pretrained(source)
    (source / "unet/diffusion_pytorch_model.bin").write_bytes(b"a second copy")
    fake = FakeHub(source, tmp_path / "cache")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_of_the_hub_is_downloaded_once_and_loads(fake_hub, sharded):
    if sharded:
        shard(fake_hub.source, "unet/diffusion_pytorch_model.safetensors")
    folder = resolve_model(SD15)
    assert fake_hub.calls == [("list", SD15, COMMIT), *[("download", SD15, COMMIT)] * 2]  # the small files come first
    assert not (folder / "unet/diffusion_pytorch_model.bin").exists()
    load_folder(folder)
    assert resolve_model(SD15) == folder
    assert len(fake_hub.calls) == 3  # the second time the hub was not asked


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "diffusion_pytorch_model.non_ema.safetensors",
            "only non-EMA weights, .* rename the file to diffusion_pytorch_model",
        ),
        ("diffusion_flax_model.msgpack", "has only diffusion_flax_model.msgpack, which is not supported; save"),
    ],
)
def test_weights_that_are_not_read_are_named(fake_hub, file, said):
    weights = fake_hub.source / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name(file))
    (fake_hub.source / "unet/diffusion_pytorch_model.bin").unlink()
    for ask in (lambda: resolve_model(SD15), lambda: load_folder(fake_hub.source)):
        with pytest.raises(UserError, match=said):
            ask()


def test_pickled_shards_load(fake_hub):
    """Older versions of transformers and diffusers wrote large models as .bin files with an index."""
    file = fake_hub.source / "unet/diffusion_pytorch_model.safetensors"
    expected = load_folder(fake_hub.source).params["unet"]
    state = {name: torch.tensor(array) for name, array in load_file(file).items()}
    names, weight_map = sorted(state), {}
    for i, some in enumerate((names[::2], names[1::2]), 1):
        piece = f"diffusion_pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: state[name] for name in some}, file.with_name(piece))
        weight_map |= dict.fromkeys(some, piece)
    (file.parent / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (file.parent / "diffusion_pytorch_model.bin").unlink()
    file.unlink()
    read = load_folder(resolve_model(SD15)).params["unet"]
    jax.tree.map(np.testing.assert_array_equal, read, expected)


def test_another_revision(fake_hub):
    resolve_model(f"{SD15}@refs/pr/4")
    assert fake_hub.calls[0] == ("list", SD15, "refs/pr/4")
    resolve_model("somebody/something")
    assert fake_hub.calls[-1] == ("download", "somebody/something", "main")


def shard(folder, file):
    """Splits the weights of a part into two shards with an index, as in large models."""
    state = load_file(folder / file)
    names = sorted(state)
    weight_map = {}
    for i, some in enumerate((names[::2], names[1::2]), 1):
        piece = f"{Path(file).stem}-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, (folder / file).with_name(piece), {"format": "pt"})
        weight_map |= dict.fromkeys(some, piece)
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / file).unlink()


@pytest.mark.parametrize(
    "missing",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/*.safetensors",
        "unet/*",
        "unet/*.index.json",
        "text_encoder/config.json",
    ],
)
def test_a_download_that_was_cut_short_is_finished(fake_hub, missing):
    shard(fake_hub.source, "unet/diffusion_pytorch_model.safetensors")
    folder = resolve_model(SD15)
    everything = sorted(folder.rglob("*"))
    downloads = len(fake_hub.calls)
    for file in list(folder.glob(missing)):
        file.unlink()
    assert sorted(folder.rglob("*")) != everything
    resolve_model(SD15)
    assert len(fake_hub.calls) > downloads
    assert sorted(folder.rglob("*")) == everything


def test_a_damaged_index_of_shards_is_downloaded_again(fake_hub):
    shard(fake_hub.source, "unet/diffusion_pytorch_model.safetensors")
    index = resolve_model(SD15) / "unet/diffusion_pytorch_model.safetensors.index.json"
    whole = index.read_text()
    for damaged in (whole[:50], "[]", '{"weight_map": 3}'):
        index.write_text(damaged)
        resolve_model(SD15)
        assert index.read_text() == whole


def test_a_download_that_ends_among_the_weights_has_all_else(fake_hub, monkeypatch):
    """A missing small file cannot be noticed, so small files are downloaded before the weights."""
    download = fake_hub.snapshot_download

    def without_network(repo, *, revision, allow_patterns=None, local_files_only=False):
        if not local_files_only and any(file.endswith(".safetensors") for file in allow_patterns):
            raise LocalEntryNotFoundError("the network is gone")
        return download(repo, revision=revision, allow_patterns=allow_patterns, local_files_only=local_files_only)

    monkeypatch.setattr(hub, "snapshot_download", without_network)
    with pytest.raises(UserError, match="cannot be downloaded"):
        resolve_model(SD15)
    folder = fake_hub.cache / COMMIT
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = hub.choose_files(hub._listing(SD15, COMMIT))
    assert written == {file for file in wanted if not file.endswith(".safetensors")}


def test_what_is_read_is_what_is_named(fake_hub):
    """The folder has sharded and other weights beside those that are read."""
    shard(fake_hub.source, "unet/diffusion_pytorch_model.safetensors")
    (fake_hub.source / "unet/diffusion_pytorch_model-00007-of-00009.safetensors").write_bytes(b"of another model")
    named = {path.relative_to(fake_hub.source).as_posix() for path in hub.files_read(fake_hub.source)}
    shards = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    weights = {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert {name for name in named if name.endswith((".safetensors", ".bin"))} == shards | weights
    for name in named:  # without any of them the model does not load, or loads as another
        assert (fake_hub.source / name).is_file()


def test_every_repository_that_is_read_is_pinned_but_three(monkeypatch, tmp_path):
    """The commits of these three are unknown; the manifest of a run records the one that was read."""
    asked = {}

    def download(repo, file, *, revision, repo_type, local_files_only=False):
        asked[repo] = revision
        (tmp_path / Path(file).name).touch()
        return str(tmp_path / Path(file).name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "_listing", lambda *arguments: [])
    monkeypatch.delenv(hub.FOLDER, raising=False)
    for load in [*(REWARDS[name] for name in ABSTRACT), METRICS["cmmd"], *PROMPT_SETS.values()]:
        with suppress(UserError):  # the files are empty
            load()
    assert asked == {name: commit for name, commit in hub.PINNED.items() if name != SD15} | dict.fromkeys(
        UNPINNED, "main"
    )
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in hub.PINNED.values())


def test_a_model_without_a_network(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub, "HfApi", unreachable)
    with pytest.raises(UserError) as caught:
        resolve_model(SD15)
    message = str(caught.value)
    assert f"`hf download {SD15} model_index.json " in message
    assert f"vae/diffusion_pytorch_model.safetensors text_encoder/model.safetensors --revision {COMMIT}`" in message
    assert "\n" not in message


def test_a_shipped_model_and_a_folder(tmp_path):
    assert resolve_model("emoji") == SHIPPED_MODELS["emoji"]
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(
        UserError, match=r"'emojo' does not exist; give a file of weights .*, or a shipped model \(emoji\)"
    ):
        resolve_model("emojo")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./model.ckpt", "there is no file"),
        ("models/v1-5.safetensors", "there is no file"),
        ("~/none.bin", "there is no file"),
        ("./model", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("owner/na--me", "does not exist"),
    ],
)
def test_a_path_is_not_asked_for_on_the_hub(name, said, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)
    with pytest.raises(UserError, match=said):
        resolve_model(name)


def test_a_model_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_model("~/mine") == tmp_path / "mine"
