"""Files published outside the hub: in the user's folder or cache, downloaded, unpacked, or asked for in one line."""

import hashlib
import zipfile
from email.message import Message
from io import BytesIO

import pytest

from nabla_gfn_jax.checkpoints import release
from nabla_gfn_jax.checkpoints.hub import FOLDER
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.registry import METRICS

NOBODY = "http://127.0.0.1:9"  # a port on which nobody listens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache/nabla_gfn_jax/downloads"


@pytest.fixture
def published(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"weights")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("lora/a.bin", b"of the archive")
        archive.writestr("../outside", b"never written")
    return tmp_path


def test_a_file_is_downloaded_once(published, cache):
    url, digest = (published / "a.bin").as_uri(), hashlib.sha256(b"weights").hexdigest()
    found = release.find("net", "a.bin", url=url, sha256=digest[:8])
    assert found == cache / "net/a.bin"
    assert found.read_bytes() == b"weights"
    assert release.find("net", "a.bin", url=NOBODY) == found


def test_the_users_folder_comes_first(published, monkeypatch):
    (published / "own/net/lora").mkdir(parents=True)
    (published / "own/net/lora/a.bin").write_bytes(b"mine")
    monkeypatch.setenv(FOLDER, str(published / "own"))
    url = (published / "all.zip").as_uri()
    assert release.find("net", "lora/a.bin", url=url).read_bytes() == b"mine"


def test_only_what_is_asked_for_is_unpacked(published, cache):
    url = (published / "all.zip").as_uri()
    assert release.find("net", "lora/a.bin", url=url).read_bytes() == b"of the archive"
    assert sorted(p.name for p in cache.rglob("*") if p.is_file()) == ["a.bin", "all.zip"]
    (published / "all.zip").unlink()
    (cache / "net/lora/a.bin").unlink()
    assert release.find("net", "lora/a.bin", url=url).read_bytes() == b"of the archive"  # of the kept archive
    with pytest.raises(UserError, match=r"other\.bin is not here"):
        release.find("net", "other.bin", url=url)


def test_another_file_is_not_kept(published, cache):
    with pytest.raises(UserError, match="does not have the SHA-256 12345678"):
        release.find("net", "a.bin", url=(published / "a.bin").as_uri(), sha256="12345678")
    assert not list(cache.rglob("*.bin"))


def test_a_connection_that_breaks_leaves_nothing(monkeypatch, cache):
    class Answer(BytesIO):
        headers = Message()

    Answer.headers["Content-Length"] = "10"
    monkeypatch.setattr(release, "urlopen", lambda url, timeout: Answer(b"short"))
    with pytest.raises(UserError, match="the download ended early"):
        release.find("net", "a.bin", url=NOBODY)

    class Reset(Answer):
        def read(self, size):
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(release, "urlopen", lambda url, timeout: Reset(b""))
    with pytest.raises(UserError, match=r"Connection reset by peer\); run `curl"):
        release.find("net", "a.bin", url=NOBODY)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_without_a_network_the_command_is_said(monkeypatch, tmp_path, cache):
    with pytest.raises(UserError) as said:
        release.find("net", "a.bin", url=f"{NOBODY}/a.bin")
    command = f"run `curl -L --create-dirs -o {cache}/net/a.bin {NOBODY}/a.bin` where there is a network"
    assert str(said.value).endswith(command)
    assert "a.bin is not here and cannot be downloaded (Connection refused)" in str(said.value)
    monkeypatch.setenv(FOLDER, str(tmp_path / "own"))
    with pytest.raises(UserError) as said:
        release.find("net", "lora/a.bin", url=f"{NOBODY}/all.zip")
    archive = tmp_path / "own/net/all.zip"
    assert f"-o {archive} {NOBODY}/all.zip && unzip {archive} -d {archive.parent}`" in str(said.value)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_without_its_weights_is_one_line(name, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(release, "urlopen", unreachable)
    for function in ("hf_hub_download", "_listing"):
        monkeypatch.setattr(f"nabla_gfn_jax.checkpoints.hub.{function}", unreachable)
    with pytest.raises(UserError, match=r"is not here and cannot be downloaded .*; run `(curl|hf download) ") as said:
        METRICS[name]()
    assert "\n" not in str(said.value)
