"""Prompt sets: what each holds, its split, and where it comes from. The files here are small and made up.

NABLA_GFN_JAX_PROMPTS names a folder with the released files of HPDv2 and DrawBench, as $NABLA_GFN_JAX_WEIGHTS/prompts
has them; where it is set they are read too.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.data.prompts import PROMPT_SETS, prompt_set
from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.tokenizer import load_tokenizer
from nabla_gfn_jax.training.loop import sample_keys
from nabla_gfn_jax.training.prompts import PromptIds

RELEASED = os.environ.get("NABLA_GFN_JAX_PROMPTS", "")
STYLES = ("photo", "paintings", "anime", "concept-art")
CSV = """Prompts,Category
A red car.,Colors
A black car.,Colors
"A pink, ""shiny"" car.",Colors
Rbefraigerator.,Misspellings
Artophagous.,Rare Words
One cat.,Counting
A yellow car.,Colors
Two cats.,Counting
Three cats.,Counting
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a user without a network."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for style in STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(25)]))
    (folder / "DrawBench Prompts - Sheet1.csv").write_text(CSV.replace("\n", "\r\n"))
    labels = {str(i): f"class {i}, class of {i}" for i in range(1000)}
    (folder / "imagenet-1k-id2label.json").write_text(json.dumps(labels))
    monkeypatch.setenv(hub.FOLDER, str(tmp_path))
    return folder


def test_hpd(folder):
    photo = prompt_set("hpd_photo")
    assert photo.held_out == tuple(f"photo {i}" for i in range(10))
    assert photo.train == tuple(f"photo {i}" for i in range(10, 25))
    both = prompt_set("hpd_photo_paintings")
    assert both.held_out == (*photo.held_out, *prompt_set("hpd_paintings").held_out)
    assert both.train == (*photo.train, *prompt_set("hpd_paintings").train)
    assert prompt_set("hpd_concept_art").train[0] == "concept-art 10"
    assert prompt_set("hpd_photo_paintings") == both  # and does not grow


def test_drawbench(folder):
    found = prompt_set("drawbench")
    assert found.held_out == ("A red car.", "A black car.", "One cat.", "Two cats.")
    assert found.train == ('A pink, "shiny" car.', "A yellow car.", "Three cats.")


def test_imagenet_animals(folder):
    found = prompt_set("imagenet_animals").train
    assert (len(found), found[0], found[-1]) == (398, "class 0", "class 397")


@pytest.mark.skipif(not RELEASED, reason="NABLA_GFN_JAX_PROMPTS names no folder with the released files")
def test_the_released_files(tmp_path, monkeypatch):
    (tmp_path / "prompts").symlink_to(RELEASED)
    monkeypatch.setenv(hub.FOLDER, str(tmp_path))
    for style in STYLES:
        found = prompt_set(f"hpd_{style.replace('-', '_')}")
        assert (len(found.train), len(found.held_out)) == (790, 10)
    both = prompt_set("hpd_photo_paintings")
    assert (len(both.train), len(both.held_out)) == (1580, 20)
    assert not set(both.train) & set(both.held_out)
    drawbench = prompt_set("drawbench")
    assert (len(drawbench.train), len(drawbench.held_out)) == (165, 18)  # 200 - 17, nine categories
    assert drawbench.held_out[:2] == ("A red colored car.", "A black colored car.")


def test_files(tmp_path):
    contents = {
        "a.txt": "# animals\n\na cat\n\n  a dog \n",
        "windows.txt": "\ufeffa cat\r\n\r\na dog\r\n",
        "a.json": '["a cat", "a dog"]',
        "objects.json": '[{"prompt": "a cat", "n": 1}, {"prompt": "a dog", "n": 2}]',
        "a.csv": "n,prompt\n1,a cat\n2,a dog\n",
        "a.tsv": "caption\na cat\na dog\n",
        "a.jsonl": '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n',
    }
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "wide.txt").write_bytes(contents["a.txt"].encode("utf-16"))
    for name in (*contents, "wide.txt"):
        assert prompt_set(str(tmp_path / name)).train == ("a cat", "a dog")
        assert prompt_set(str(tmp_path / name)).held_out == ("a cat", "a dog")


TEXTS = {
    "right to left": "وجه سعيد",
    "right to left in between": "a \u2067שלום\u2069 face",
    "Chinese": "一张笑脸，水彩画",
    "Japanese": "笑顔の猫",
    "emoji": "a 🙂 face 👩‍👩‍👧",
    "200 words": " ".join(f"word{n}" for n in range(200)),
    "a megabyte": "a very " * 150_000 + "happy face",
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_is_a_prompt_and_what_is_cut_is_told(tmp_path, caplog, name):
    train_tokenizer(["a face"], tmp_path, 600, 77)
    (tmp_path / "a.txt").write_text(f"a face\n{TEXTS[name]}\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(f'prompt\na face\n"{TEXTS[name][:100_000]}"\n', encoding="utf-8")
    found = prompt_set(str(tmp_path / "a.txt")).train
    assert found == ("a face", TEXTS[name])
    assert prompt_set(str(tmp_path / "a.csv")).train[1] == TEXTS[name][:100_000]
    ids = load_tokenizer(tmp_path)(found)
    assert ids.shape == (2, 77)
    assert (ids[1] != ids[0]).any()
    told = "1 of 2 prompts have more than 77 tokens; the text encoder reads only the first 77" in caplog.text
    assert told == (len(TEXTS[name].encode()) > 100)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a cat", "a dog"], "n": [1, 3]}), tmp_path / "a.parquet")
    found = prompt_set(f"{tmp_path}/a.parquet:text,n")
    assert (found.train, found.weights) == (("a cat", "a dog"), (1.0, 3.0))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file"):
        prompt_set(f"{tmp_path}/a.parquet:text")


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow; pip install 'nabla_gfn_jax\[prompts\]'"):
        prompt_set(str(tmp_path / "a.parquet"))


def test_weights(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,n\na cat,1\na cow,0\na dog,3\n")
    found = prompt_set(f"{tmp_path}/a.csv:prompt,n")
    assert found.weights == (1.0, 0.0, 3.0)
    assert prompt_set(f"{tmp_path}/a.csv").weights is None
    drawn = PromptIds(3, found.weights).chosen(sample_keys(jax.random.key(3), 5, 4000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.25, 0, 0.75], atol=0.02)
    for text, said in (
        ("prompt,n\na cat,-1\n", "a weight in column 'n' is not a number of 0 or more: '-1'"),
        ("prompt,m\na cat,1\n", "a weight in column 'n' .* no such column; it has prompt, m"),
        ("prompt,n\na cat,0\n", "gives every prompt the weight 0"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=said):
            prompt_set(f"{tmp_path}/bad.csv:prompt,n")


def test_prompts_that_are_cut_are_counted(tmp_path, caplog):
    train_tokenizer(["a cat"], tmp_path, 600, 8)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer(["a cat"])
    assert not caplog.records
    tokenizer(["a cat", "a cat " * 9])
    assert "1 of 2 prompts have more than 8 tokens; the text encoder reads only the first 8." in caplog.text


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, *, revision, repo_type, local_files_only=False):
        asked.append((repo, file, repo_type))
        return str(tmp_path / Path(file).name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "_listing", lambda *arguments: [])
    (tmp_path / "a.csv").write_text("text,n\na cat,1\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a dog"}\n')
    (tmp_path / "a.json").write_text('[{"text": "a cow"}]')
    for file, animal in (("a.csv", "a cat"), ("a.jsonl", "a dog"), ("a.json", "a cow")):
        assert prompt_set(f"hub:some.one/prompts/data/{file}:text").train == (animal,)
    assert asked[0] == ("some.one/prompts", "data/a.csv", "dataset")
    with pytest.raises(UserError, match="name the column"):
        prompt_set("hub:some.one/prompts/data/a.csv")
    with pytest.raises(UserError, match="no text in column 'prompt' of every row; it has text, n"):
        prompt_set("hub:some.one/prompts/data/a.csv:prompt")


BAD = {
    "empty.txt": ("\n", "has no prompts"),
    "numbers.json": ("[1, 2]", "is not a list of prompts"),
    "broken.json": ("[", "is not valid JSON"),
    "object.json": ("{}", "is not a list of prompts"),
    "table.csv": ("a,b\n1,2\n", "is a table; name the column of prompts, as in …/table.csv:COLUMN; it has a, b"),
    "picture.png": ("x", "cannot be read; use a file that ends in .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, name):
    text, reason = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        prompt_set(str(tmp_path / name))
    assert reason in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name():
    said = r"'simple_animal' is unknown \(did you mean simple_animals\?\); use a file, .* or one of a_face"
    with pytest.raises(UserError, match=said):
        prompt_set("simple_animal")
    with pytest.raises(UserError, match="is unknown"):
        prompt_set("nowhere.csv:prompt")


def test_a_column_of_a_file_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_text("text,n\na cat,1\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a \u2028dog"}\n', encoding="utf-8"
    )  # a line end to Python, not to JSON
    assert prompt_set(f"{tmp_path}/a.csv:text").train == ("a cat",)
    assert prompt_set("~/a.jsonl:text").train == ("a \u2028dog",)
    with pytest.raises(UserError, match=r"name the column of prompts, as in …/a\.csv:COLUMN"):
        prompt_set("~/a.csv")
    (tmp_path / "open.csv").write_text('text,n\n"a cat,1\n')
    with pytest.raises(UserError, match=r"open\.csv is not valid CSV .*quote"):
        prompt_set("~/open.csv:text")


def test_without_a_network(monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setenv(hub.FOLDER, str(tmp_path))
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(hub, "_listing", unreachable)
    for name in set(PROMPT_SETS) - {"simple_animals", "a_face"}:
        with pytest.raises(UserError, match=r"`hf download .* --repo-type dataset` .*/prompts/"):
            prompt_set(name)


def test_training_chooses_by_key():
    """The same keys give the same prompts, for any state of Python's and NumPy's generators; all prompts are equally
    frequent.
    """
    prompts = PromptIds(7)
    keys = sample_keys(jax.random.key(3), 5, 4000)
    first = prompts.chosen(keys)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(prompts.chosen(keys), first)
    np.testing.assert_array_equal(prompts.chosen(keys[50:60]), first[50:60])
    assert np.abs(np.bincount(first) / 4000 - 1 / 7).max() < 0.02
