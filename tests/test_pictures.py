"""The pictures that a workdir keeps for its report: which ones, and what comes back from their file."""

import numpy as np
import pytest

from nabla_gfn_jax.runs import pictures
from nabla_gfn_jax.runs.pictures import Picture, Pictures, arranged, kept

EVIL = '</script><script>alert("1")</script> \'é\u2028'


def made(count=11, height=6, width=10):
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    of = tuple(Picture(i % 2, ("a cat", EVIL)[i % 2], i // 2) for i in range(count))
    return Pictures(
        of, images, {"log_reward": tuple(i / 7 for i in range(count)), "log_reward_b": (float("nan"),) * count}
    )


def test_a_file_gives_back_what_was_saved(tmp_path):
    """11 pictures fill one row of the sheet and a part of the next."""
    saved = made()
    pictures.save(pictures.place(tmp_path, 80), saved)
    found = pictures.read(tmp_path / "pictures/00080.png")
    np.testing.assert_array_equal(found.images, saved.images)
    assert found.of == saved.of
    assert found.scores["log_reward"] == saved.scores["log_reward"]
    assert np.isnan(found.scores["log_reward_b"]).all()
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["00080.png"]


def test_only_some_pictures_in_another_order():
    every = made()
    some = every.only([every.of[4], every.of[1]])
    np.testing.assert_array_equal(some.images, every.images[[4, 1]])
    assert some.scores["log_reward"] == (4 / 7, 1 / 7)


def test_large_pictures_are_reduced_and_floats_are_rounded(tmp_path):
    images = np.zeros((2, 256, 512, 3), np.float32)
    images[1] = 0.5
    file = pictures.place(tmp_path, 0)
    pictures.save(file, Pictures(kept(["a"], 2), images, {"log_reward": (1.0, 2.0)}))
    found = pictures.read(file)
    assert found.images.shape == (2, 96, 192, 3)
    assert set(found.images[1].ravel()) == {128}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-400], lambda b: b"", lambda b: b"GIF89a", lambda b: b.replace(b"place", b"plane")]
)
def test_a_damaged_file_has_no_pictures(tmp_path, damage):
    file = pictures.place(tmp_path, 3)
    pictures.save(file, made())
    file.write_bytes(damage(file.read_bytes()))
    assert pictures.read(file) is None
    assert pictures.read(tmp_path / "none.png") is None


def test_only_numbers_of_updates_are_read(tmp_path):
    for name in ("00004", "00100", "100000", "base", "..", "12"):
        pictures.save(tmp_path / f"pictures/{name}.png", made(1))
    assert list(pictures.saved(tmp_path)) == [4, 100, 100000]


@pytest.mark.parametrize(
    ("prompts", "count", "places", "each"),
    [(1, 32, 1, 32), (1, 64, 1, 32), (45, 64, 8, 4), (3, 32, 3, 10), (45, 16, 8, 2), (45, 5, 5, 1), (800, 1, 1, 1)],
)
def test_equally_many_pictures_of_at_most_eight_prompts(prompts, count, places, each):
    """They are the first of the samples, so that the trainer need not sort what it sampled."""
    texts = [f"prompt {i}" for i in range(prompts)]
    of = kept(texts, count)
    place, number = arranged(prompts, count)
    assert len(set(zip(place, number, strict=True))) == count
    assert [(p.place, p.number) for p in of] == list(zip(place, number, strict=True))[: len(of)]
    assert sorted((p.place, p.number) for p in of) == [(p, n) for p in range(places) for n in range(each)]
    assert all(p.prompt == texts[p.place] for p in of)
