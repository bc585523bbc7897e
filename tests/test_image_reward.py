"""ImageReward: layout, score and gradient, compared with transformers' BLIP with the same weights."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reward_oracle
import torch
import transformers
from reward_oracle import BLIP, MED, PROMPTS
from torch_oracle import CAPTIONS, compile_quickly, nchw, nhwc, relative

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.bert_tokenizer import load_bert_tokenizer
from nabla_gfn_jax.rewards import image_reward, load_reward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!'<>|&;", "猫", "½"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
WORDS += ["cat", "frog", "##ing", "smil", "face", "with", "heart", "eyes", "and", "dog", "##s", "naive", "stan"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    write_json(folder / "med_config.json", MED)
    torch_model = reward_oracle.ImageReward()
    torch_model.save(folder / "ImageReward.pt")
    return SimpleNamespace(folder=folder, theirs=torch_model, reward=load(folder))


def load(folder):
    return image_reward.from_files(folder / "ImageReward.pt", folder / "med_config.json", folder / "vocab.txt", BLIP)


def tokens(folder, prompts):
    """The ids by transformers, with the two tokens that BLIP adds."""
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    found = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return found.input_ids, found.attention_mask


@pytest.mark.parametrize("size", [(60, 60), (75, 50), (31, 84)])
@pytest.mark.thorough
def test_score_and_gradient(case, size):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(len(PROMPTS), *size, 3)).astype(np.float32)
    with torch.enable_grad():
        x = nchw(images).requires_grad_()
        expected = case.theirs(x, *tokens(case.folder, PROMPTS))
        expected.sum().backward()

    def score(params, images, prompts):
        scores = case.reward.score(params, images, prompts)
        return scores.sum(), scores

    arguments = case.reward.params, images, case.reward.encode_prompts(PROMPTS)
    (_, ours), gradient = compile_quickly(jax.value_and_grad(score, argnums=1, has_aux=True), *arguments)(*arguments)
    np.testing.assert_allclose(ours, expected.detach(), atol=1e-5)
    assert relative(gradient, nhwc(x.grad)) < 1e-4
    assert np.ptp(ours) > 0.05


def test_padding_does_not_matter_and_the_text_does(case):
    images = np.random.default_rng(0).uniform(size=(2, 48, 48, 3)).astype(np.float32)
    prompts = case.reward.encode_prompts(["a cat", "a cat"])
    other = {"ids": prompts["ids"].at[1, 20:].set(7), "mask": prompts["mask"]}
    read = {"ids": other["ids"], "mask": prompts["mask"].at[1, 20].set(True)}
    run = compile_quickly(case.reward.score, case.reward.params, images, prompts)
    before, padded, after = (run(case.reward.params, images, p) for p in (prompts, other, read))
    np.testing.assert_allclose(padded, before, rtol=1e-6)
    assert abs(after[1] - before[1]) > 1e-3


def test_token_ids(case):
    prompts = [
        *PROMPTS,
        *CAPTIONS,
        "Smiling\tCATS  and frogs!",
        "naïve [MASK] [DEC]cat[ENC] [cls]",
        "x" * 101,
        "x" * 100,
    ]
    prompts += ["don’t &amp; \u200b\u3000 e\u0301 ﬁ", "a 猫 " * 30, "[PAD] cat"]
    ids, mask = load_bert_tokenizer(case.folder / "vocab.txt", 35)(prompts)
    expected_ids, expected_mask = tokens(case.folder, prompts)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(mask, expected_mask)
    assert ids.shape == (len(prompts), 35)
    assert ids[1, -1] == WORDS.index("[SEP]")  # cut before the end
    assert (ids[:, 0] == WORDS.index("[CLS]")).all()


def test_the_vocabulary_that_tokenizer_json_holds(case, tmp_path):
    transformers.BertTokenizer.from_pretrained(case.folder).save_pretrained(tmp_path)
    ids, _ = load_bert_tokenizer(tmp_path / "tokenizer.json", 35)(PROMPTS)
    np.testing.assert_array_equal(ids, load_bert_tokenizer(case.folder / "vocab.txt", 35)(PROMPTS)[0])


def test_files_that_do_not_fit(case, tmp_path):
    for name in ("vocab.txt", "med_config.json", "ImageReward.pt"):
        (tmp_path / name).write_bytes((case.folder / name).read_bytes())
    (tmp_path / "vocab.txt").write_text("cat\n")
    with pytest.raises(UserError, match=r"vocab\.txt lacks"):
        load(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.txt cannot be read"):
        load(tmp_path)
    write_json(tmp_path / "med_config.json", MED | {"hidden_act": "relu"})
    with pytest.raises(UserError, match=r"med_config\.json: hidden_act = 'relu'"):
        load(tmp_path)
    state = torch.load(case.folder / "ImageReward.pt")
    del state["mlp.layers.4.weight"]
    torch.save(state, tmp_path / "ImageReward.pt")
    write_json(tmp_path / "med_config.json", MED)
    (tmp_path / "vocab.txt").write_bytes((case.folder / "vocab.txt").read_bytes())
    with pytest.raises(UserError, match=r"mlp\.layers\.4\.weight is missing"):
        load(tmp_path)


def test_the_released_files_are_looked_for(monkeypatch):
    asked = []

    def find(name, file, *, repo, revision="main"):
        asked.append((file, repo))
        return Path(file)

    monkeypatch.setattr(hub, "find", find)
    with pytest.raises(UserError, match=r"(does not exist|missing|cannot be read)"):
        load_reward("image_reward")
    assert asked == [
        ("vocab.txt", "google-bert/bert-base-uncased"),
        ("ImageReward.pt", "THUDM/ImageReward"),
        ("med_config.json", "THUDM/ImageReward"),
    ]
