"""Finds the files of pretrained models in the user's folder or in the hub's cache, or downloads them to the cache."""

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from nabla_gfn_jax.checkpoints.files import read_json
from nabla_gfn_jax.checkpoints.hub_errors import explain
from nabla_gfn_jax.errors import UserError

FOLDER = "NABLA_GFN_JAX_WEIGHTS"  # environment variable: a folder that has NAME/FILE
STABLE_DIFFUSION_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# The pinned commit of each repository, so that later runs read the same files. For other repositories the newest commit
# is read. The manifest of a run records the commit, and a resume refuses another one.
PINNED = {
    STABLE_DIFFUSION_1_5: "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "openai/clip-vit-large-patch14-336": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "trl-lib/ddpo-aesthetic-predictor": "cf4bd10345610935a80a5d3be9a3133c50f121e4",
    "sayakpaul/drawbench": "ad794cba698c253ffdb6d18eff3fc87b004c1135",
    "huggingface/label-files": "998629752167c60819e6295813eda1c2db248fd4",
}
_NAME = r"(?![\w.-]*(?:--|\.\.))\w(?:[\w.-]*\w)?"  # the names of owners and models that the hub allows
_MODEL_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[\w./-]+))?")

# The files that are read from a diffusers repository: configs, tokenizer, and for each part one weights file or shards.
_CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_WEIGHTS_SUFFIXES = (".safetensors", ".bin")
_IN_CACHE = re.compile(r"/(?:models|datasets)--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/")
_SHARD = re.compile(r"(?P<part>\w+)/(?P<stem>.+)-\d+-of-\d+(?P<ending>(?:\.fp16)?\.(?:safetensors|bin))")
_COMMIT = re.compile("[0-9a-f]{40}")
_PATIENCE = 5.0  # seconds to wait for the hub's answer
PICKLED = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}


def find(name: str, file: str, *, repo: str, revision: str | None = None, repo_type: str = "model") -> Path:
    """The path of `file` of the model `name`: in the user's folder, else in the hub's cache, else downloaded to it.

    Without a `revision`, the pinned commit is used, or the newest if the repository is not pinned. Raises `UserError`
    within seconds if the file cannot be found; the error says how to get it.
    """
    revision = revision or PINNED.get(repo, "main")
    own = own_file(name, file)
    if own is not None:
        return own
    where: dict[str, Any] = {"revision": revision, "repo_type": repo_type}
    cached = None
    with suppress(Exception):  # an error is reported below
        cached = Path(hf_hub_download(repo, file, **where, local_files_only=True))
        if _COMMIT.fullmatch(revision):
            return cached
    try:
        _listing(repo, revision, repo_type)
        return Path(hf_hub_download(repo, file, **where))
    except Exception as error:  # of any HTTP library
        if cached is not None:
            return cached
        kind = "" if repo_type == "model" else f" --repo-type {repo_type}"
        raise UserError(
            f"{file} of {repo} is not here and cannot be downloaded ({explain(error, repo)}); run `hf download {repo} "
            f"{file} --revision {revision}{kind}` where there is a network, or put it at "
            f"${FOLDER}/{name}/{Path(file).name}"
        ) from error


def own_file(name: str, file: str) -> Path | None:
    """The path of `file` of the model `name` in the user's folder; None if it is not there."""
    own = Path(os.environ.get(FOLDER, "")) / name / Path(file).name
    return own if os.environ.get(FOLDER) and own.is_file() else None


def model_folder(model: str) -> Path | None:
    """The snapshot of the model `OWNER/NAME` or `OWNER/NAME@REVISION` with the needed files; None for other texts.

    A complete snapshot in the hub's cache is used without asking the hub. Raises `UserError` within seconds if files
    are missing; the error says what to do.
    """
    match = _MODEL_ID.fullmatch(model)
    if match is None:
        return None
    repo = match["repo"]
    revision = match["revision"] or PINNED.get(repo, "main")
    try:
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        if _is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        listing = _listing(repo, revision)
        wanted = choose_files(listing)
        for part in WEIGHTS if "model_index.json" in listing else ():
            if not any(file.startswith(f"{part}/") and file.endswith(_WEIGHTS_SUFFIXES) for file in wanted):
                inside = [file.removeprefix(f"{part}/") for file in listing if file.startswith(f"{part}/")]
                raise UserError(f"model {repo}: {no_weights(part, inside)}")
        small = [file for file in wanted if not file.endswith(_WEIGHTS_SUFFIXES)]
        # Weights are downloaded last, so that weights in the cache imply that everything else is there.
        snapshot_download(repo, revision=revision, allow_patterns=small)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # of any HTTP library
        usual = [*_CONFIGS, *(f"tokenizer/{file}" for file in ("merges.txt", "tokenizer_config.json", "vocab.json"))]
        files = " ".join([*usual, *(f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items())])
        raise UserError(
            f"model {repo} is not here and cannot be downloaded ({explain(error, repo)}); run `hf download {repo} "
            f"{files} --revision {revision}` where there is a network, or name a folder"
        ) from error


def _listing(repo: str, revision: str, repo_type: str = "model") -> list[str]:
    """The names of a repository's files.

    Without a network it fails immediately, whereas a download retries for long.
    """
    found: Any = HfApi().repo_info(repo, revision=revision, repo_type=repo_type, timeout=_PATIENCE)
    return [file.rfilename for file in found.siblings or []]


def choose_files(listing: Sequence[str]) -> list[str]:
    """The files of a diffusers repository that `load_folder` reads.

    Safetensors are preferred to pickles, and full precision to fp16. If a part has no weights, nothing is chosen for
    it, and `load_folder` reports the part.
    """
    there = set(listing)
    chosen = [file for file in _CONFIGS if file in there]
    chosen += [f"tokenizer/{file}" for file in _TOKENIZER if f"tokenizer/{file}" in there]
    for part in WEIGHTS:
        for file in weights_files(part):
            if f"{part}/{file}" in there:
                chosen.append(f"{part}/{file}")
                if file.endswith(".json"):
                    chosen += sorted(f for f in there if _is_shard(f, part, file))
                break
    return chosen


def weights_files(part: str) -> list[str]:
    """The possible names of a part's weights or of the index of its shards, in order of preference."""
    stem, old = WEIGHTS[part], PICKLED[part]
    return [
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{old}.bin",
        f"{old}.bin.index.json",
        f"{old}.fp16.bin",
    ]


def no_weights(part: str, files: Collection[str]) -> str:
    """The text of an error for a part of a model whose `files` include no supported weights."""
    other = next((file for file in sorted(files) if ".non_ema." in file), None)
    if other is not None:
        stem, ending = WEIGHTS[part], Path(other).suffix
        return f"{part} has only non-EMA weights, {other}; to use them, rename the file to {stem}{ending}"
    other = next((file for file in sorted(files) if file.endswith((".msgpack", ".onnx", ".h5"))), None)
    if other is not None:
        return f"{part} has only {other}, which is not supported; save the model as safetensors with diffusers"
    return f"{part}/{weights_files(part)[0]} is missing; download the model again"


def _is_shard(file: str, part: str, index: str) -> bool:
    """Whether the name is a shard of the index `index`. Its "fp16" may be in either of two places."""
    stem, _, rest = index.partition(".")
    kind = ".bin" if rest.startswith("bin") else ".safetensors"
    match = _SHARD.fullmatch(file)
    half = [(stem + ".fp16", kind), (stem, ".fp16" + kind)]
    names = half if ".fp16." in index else [(stem, kind)]
    return match is not None and match["part"] == part and (match["stem"], match["ending"]) in names


def files_read(folder: Path) -> list[Path]:
    """The files that `load_folder` reads from a diffusers folder, including missing shards that an index lists."""
    listing = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = [folder / file for file in choose_files(listing) if not _SHARD.fullmatch(file)]
    indices = [file for file in files if ".index." in file.name]
    return files + [index.with_name(shard) for index in indices for shard in shards(index)]


def shards(index: Path) -> list[str]:
    """The names of the shards that an index lists. Raises `UserError` if the index is damaged."""
    weight_map: Any = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):  # a file beside the index
        raise UserError(f"{index} does not say which file beside it holds which tensor; download the model again")
    return sorted(set(weight_map.values()))


def revision_of(file: Path) -> str | None:
    """`OWNER/NAME@COMMIT` of a file in the hub's cache; None for other files."""
    match = _IN_CACHE.search(file.absolute().as_posix())
    return f"{match['owner']}/{match['name']}@{match['commit']}" if match else None


def _is_complete(folder: Path) -> bool:
    try:
        files = files_read(folder)
    except UserError:  # a damaged index
        return False
    names = {file.relative_to(folder).as_posix() for file in files if file.is_file()}
    parts = {name.partition("/")[0] for name in names if name.endswith(_WEIGHTS_SUFFIXES)}
    return len(names) == len(files) and set(_CONFIGS) <= names and parts >= set(WEIGHTS)
