"""Finding a model's files: the user's folder, the hub's cache, a download; and what to do without any."""

import shutil

import pytest
import torch_oracle as oracle
from huggingface_hub.errors import LocalEntryNotFoundError

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.checkpoints.diffusers_folder import load_folder
from nabla_gfn_jax.configuration import SHIPPED_MODELS, resolve_model
from nabla_gfn_jax.errors import UserError

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
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
    def download(repo, file, *, revision, repo_type):
        return f"{tmp_path}/{repo_type}/{repo}/{revision}/{file}"

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub.find("hps", "a.pt", repo="x/y", revision="r") == tmp_path / "model/x/y/r/a.pt"


def test_without_a_network(monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
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
    half_index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    assert hub.choose_files([*shards, *half, half_index]) == [half_index, *half]
    assert hub.choose_files(["text_encoder/pytorch_model.bin"]) == ["text_encoder/pytorch_model.bin"]


class FakeHub:
    """A repository in a folder, and a cache beside it."""

    def __init__(self, source, cache):
        self.source, self.cache, self.calls = source, cache, []

    def list_repo_files(self, repo, *, revision):
        self.calls.append(("list", repo, revision))
        return [p.relative_to(self.source).as_posix() for p in self.source.rglob("*") if p.is_file()]

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


def test_a_model_of_the_hub_is_downloaded_once_and_loads(fake_hub):
    folder = resolve_model(SD15)
    assert fake_hub.calls == [("list", SD15, COMMIT), ("download", SD15, COMMIT)]
    assert not (folder / "unet/diffusion_pytorch_model.bin").exists()
    load_folder(folder)
    assert resolve_model(SD15) == folder
    assert len(fake_hub.calls) == 2  # the second time the hub was not asked


def test_another_revision(fake_hub):
    resolve_model(f"{SD15}@refs/pr/4")
    assert fake_hub.calls[0] == ("list", SD15, "refs/pr/4")
    resolve_model("somebody/something")
    assert fake_hub.calls[-1] == ("download", "somebody/something", "main")


def test_a_download_that_was_cut_short_is_finished(fake_hub):
    folder = resolve_model(SD15)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    load_folder(resolve_model(SD15))
    assert [kind for kind, *_ in fake_hub.calls].count("download") == 2


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
    with pytest.raises(UserError, match=r"'emojo' is no folder, no model of the hub .* \(emoji\)"):
        resolve_model("emojo")
