"""Finds files that are published outside the hub: in the user's folder, in the user's cache, or by download.

A published archive is unpacked file by file, so that only files with known names are written.
"""

import os
import shutil
import zipfile
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from nabla_gfn_jax.checkpoints.files import WriteError, reason_of, replacing
from nabla_gfn_jax.checkpoints.hashes import read_sha256
from nabla_gfn_jax.checkpoints.hub import FOLDER
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.user_cache import user_cache

_PATIENCE = 10.0  # seconds to wait for an answer
_CHUNK = 2**20


def find(name: str, file: str, *, url: str, sha256: str = "") -> Path:
    """The path of `file` of the model `name`, which is downloaded from `url` if it is not here.

    A `url` that ends in .zip is an archive that contains `file`. `sha256` is the beginning of the hash that a
    downloaded file must have. Raises `UserError` if the file cannot be found; the error says how to get it.
    """
    folder = user_cache("downloads") / name
    if os.environ.get(FOLDER):
        folder = Path(os.environ[FOLDER]) / name
        if (folder / file).is_file():
            return folder / file
    kept = user_cache("downloads") / name / file
    if kept.is_file():
        return kept
    is_archive = url.endswith(".zip")
    archive = user_cache("downloads") / name / Path(url).name
    try:
        if is_archive and not archive.is_file():
            _download(url, archive)
        if is_archive:
            _unpack(archive, file, kept)
        else:
            _download(url, kept, sha256)
        return kept
    except WriteError:
        raise
    except (OSError, HTTPException, ValueError, KeyError, zipfile.BadZipFile) as error:
        to = folder / (Path(url).name if is_archive else file)
        command = f"curl -L --create-dirs -o {to} {url}" + f" && unzip {to} -d {folder}" * is_archive
        missing = f"{file} is not here and cannot be downloaded ({_reason(error)})"
        raise UserError(f"{missing}; run `{command}` where there is a network") from error


def _reason(error: BaseException) -> str:
    """An error as a phrase. An error of the network is inside another one."""
    inner = getattr(error, "reason", None)
    return reason_of(inner if isinstance(inner, BaseException) else error)


def _download(url: str, file: Path, sha256: str = "") -> None:
    with urlopen(url, timeout=_PATIENCE) as answer, replacing(file) as unfinished:
        with open(unfinished, "wb") as stream:
            while chunk := _read(answer):
                stream.write(chunk)
        promised = answer.headers.get("Content-Length")
        if promised is not None and int(promised) != unfinished.stat().st_size:
            raise ValueError("the download ended early")
        if not read_sha256(unfinished).startswith(sha256):
            raise ValueError(f"the file at {url} does not have the SHA-256 {sha256}…")


def _read(answer: object) -> bytes:
    """The next bytes. An error of the network is no `OSError`, which would look like one of the disk."""
    try:
        chunk: bytes = answer.read(_CHUNK)  # type: ignore[attr-defined]
        return chunk
    except OSError as error:
        raise HTTPException(reason_of(error)) from error


def _unpack(archive: Path, member: str, file: Path) -> None:
    with (
        zipfile.ZipFile(archive) as opened,
        opened.open(member) as source,
        replacing(file) as unfinished,
        open(unfinished, "wb") as stream,
    ):
        shutil.copyfileobj(source, stream)
