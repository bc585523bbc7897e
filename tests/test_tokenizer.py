"""Token ids, compared with transformers' CLIPTokenizer, for vocabularies that are learned here and saved by both."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import transformers

from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.tokenizer import load_tokenizer

CAPTIONS = ["a cat", "a smiling face with heart eyes", "two dogs and a frog's pond", "naïve café", "no. 123!"]
LENGTH = 10
PROMPTS = [
    *CAPTIONS,
    "",
    "  A   CAT\n\tand a DOG ",
    "Ünïcödé 猫 😀!! ½ ② ﬁ İstanbul e\u0301",
    "it's they're 'll 'S can't''t",
    "x" * 300,
    "a smiling face " * 20,
    "<|endoftext|> a cat <|startoftext|> <|ENDOFTEXT|> a<|endoftext|>b",
    "zero\u200bwidth \u00a0 space\u3000wide",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, folder, 600, LENGTH)
    return folder


def theirs(folder, prompts):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    padded = tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return np.asarray(padded.input_ids)


def random_prompts(count):
    rng = random.Random(0)
    signs = "abcdefgzE's \t.,!<|>-_019éß猫😀\u0301½İ"
    return ["".join(rng.choices(signs, k=rng.randrange(30))) for _ in range(count)]


def test_same_ids_as_transformers(folder):
    prompts = PROMPTS + random_prompts(300)
    ids = load_tokenizer(folder)(prompts)
    assert ids.dtype == np.int32
    assert ids.shape == (len(prompts), LENGTH)
    np.testing.assert_array_equal(ids, theirs(folder, prompts))


def test_long_prompts_end_with_the_end(folder):
    tokenizer = load_tokenizer(folder)
    end = json.loads((folder / "vocab.json").read_text())["<|endoftext|>"]
    long, short = tokenizer(["a smiling face " * 20, "a cat"])
    assert long[-1] == end
    assert end not in long[:-1]
    assert short.tolist().index(end) < LENGTH - 1
    assert short[-1] == tokenizer.padding_id


def test_the_folder_transformers_saves(folder, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "merges.txt").exists()  # all is in tokenizer.json
    np.testing.assert_array_equal(load_tokenizer(tmp_path)(PROMPTS), theirs(folder, PROMPTS))


@pytest.mark.parametrize("padding", ["!", {"content": "!", "lstrip": False}])
def test_padding_that_only_special_tokens_map_states(folder, tmp_path, padding):
    """SD-2.1's tokenizer, which pads with "!", states it there."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    special = json.loads((folder / "special_tokens_map.json").read_text()) | {"pad_token": padding}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    ids = load_tokenizer(tmp_path)(["a cat"])
    assert ids[0, -1] == json.loads((folder / "vocab.json").read_text())["!"]
    np.testing.assert_array_equal(ids, theirs(tmp_path, ["a cat"]))


def test_the_vocabulary_is_clips_layout_and_covers_the_captions(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) <= 600
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert list(vocabulary)[:257:256] == ["!", "!</w>"]
    assert "a</w>" in vocabulary


def test_learning_is_the_same_in_another_process(folder, tmp_path):
    command = (
        "import sys; from pathlib import Path; from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer;"
        f"train_tokenizer({CAPTIONS!r}, Path(sys.argv[1]), 600, {LENGTH}); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"  # and PyTorch is not needed for it
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_keeps_its_vocabulary(folder):
    before = (folder / "vocab.json").read_bytes()
    train_tokenizer(["something else altogether"] * 9, folder, 700, LENGTH)
    assert (folder / "vocab.json").read_bytes() == before


def test_merges_are_the_most_frequent_pairs(tmp_path):
    train_tokenizer(["abab abab", "abc"], tmp_path, 514 + 2, 8)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    # "a b" occurs 3 times; then "ab a" and "a b</w>" twice each, and the alphabet decides.
    assert lines == ["#version: 0.2", "a b", "a b</w>"]


def test_released_merges_beyond_the_vocabulary_are_left_out(folder, tmp_path):
    for name in ("vocab.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "merges.txt").write_text((folder / "merges.txt").read_text() + "q z\nqz x</w>\n")
    np.testing.assert_array_equal(load_tokenizer(tmp_path)(PROMPTS), theirs(folder, PROMPTS))


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("vocab.json", "{", "vocab.json cannot be read"),
        ("vocab.json", "[]", "vocab.json holds no JSON object"),
        ("vocab.json", '{"a": 0}', "the vocabulary lacks"),
        ("merges.txt", None, "merges.txt cannot be read"),
        ("merges.txt", "a b c\n", "merges.txt cannot be read"),
        ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(folder, tmp_path, name, contents, reason):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if contents is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(contents)
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
