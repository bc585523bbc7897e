"""HPSv2.1 and 2.0: layout, score and gradient, compared with transformers' CLIP with the same weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reward_oracle
import torch
import transformers
from reward_oracle import CLIP, PROMPTS
from torch_oracle import CAPTIONS, compile_quickly, nchw, nhwc, relative

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.open_clip_tokenizer import load_open_clip_tokenizer
from nabla_gfn_jax.rewards import REWARDS, SCALES, hps, load_reward, scale_of


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    train_tokenizer(CAPTIONS, folder, reward_oracle.VOCABULARY, 77)
    torch_model = reward_oracle.HPS()
    torch_model.save(folder / "HPS.pt")
    reward = hps.from_files(folder / "HPS.pt", folder, CLIP)
    return SimpleNamespace(folder=folder, theirs=torch_model, reward=reward)


def token_ids(folder, prompts):
    """transformers' ids with OpenCLIP's padding."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = np.zeros((len(prompts), 77), np.int64)
    for row, text in enumerate(tokenizer(prompts, truncation=True, max_length=77).input_ids):
        ids[row, : len(text)] = text
    return ids


@pytest.mark.parametrize("size", [(60, 60), (75, 50), (31, 84)])
@pytest.mark.thorough
def test_score_and_gradient(case, size):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(len(PROMPTS), *size, 3)).astype(np.float32)
    with torch.enable_grad():
        x = nchw(images).requires_grad_()
        expected = case.theirs(x, torch.tensor(token_ids(case.folder, PROMPTS)))
        expected.sum().backward()

    def score(params, images, prompts):
        scores = case.reward.score(params, images, prompts)
        return scores.sum(), scores

    arguments = case.reward.params, images, case.reward.encode_prompts(PROMPTS)
    (_, ours), gradient = compile_quickly(jax.value_and_grad(score, argnums=1, has_aux=True), *arguments)(*arguments)
    np.testing.assert_allclose(ours, expected.detach(), atol=1e-5)
    assert relative(gradient, nhwc(x.grad)) < 1e-4
    assert np.ptp(ours) > 0.05


def test_a_prompt_is_encoded_once(case, monkeypatch):
    seen = []

    def recording(*arguments):
        tokenize = load_open_clip_tokenizer(*arguments)
        return lambda prompts: (seen.extend(prompts), tokenize(prompts))[1]

    monkeypatch.setattr(hps, "load_open_clip_tokenizer", recording)
    encode = hps.from_files(case.folder / "HPS.pt", case.folder, CLIP).encode_prompts
    many = [f"a cat and {i} dogs" for i in range(40)]  # more than are encoded together
    features = encode(many + many[:3])
    again = encode([many[39], many[0], "a frog", many[39]])
    np.testing.assert_array_equal(again[np.array([0, 1, 3])], features[np.array([39, 0, 39])])
    np.testing.assert_array_equal(features[40:], features[:3])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    assert [prompt for prompt in seen if prompt] == [*many, "a frog"]


def test_token_ids(case):
    prompts = [*PROMPTS, *CAPTIONS, "  A\tCAT\n", "it's they're 'll", "x" * 300, "a 猫 " * 90]
    ids = load_open_clip_tokenizer(case.folder)(prompts)
    np.testing.assert_array_equal(ids, token_ids(case.folder, prompts))
    assert ids[1, -1] == ids.max()  # cut before the end
    assert ids[0, -1] == 0


@pytest.mark.parametrize(
    ("prompt", "mended"),
    [
        ("a frog’s “pond”", 'a frog\'s "pond"'),
        ("cats &amp;amp; dogs &lt;3", "cats & dogs <3"),
        ("ﬁsh", "fish"),
        ("ｗｉｄｅ", "wide"),
        ("cafÃ©", "café"),
        ("cafe\u0301", "café"),
    ],
)
def test_prompts_are_mended(case, prompt, mended):
    ids = load_open_clip_tokenizer(case.folder)([prompt, mended])
    np.testing.assert_array_equal(ids[0], ids[1])


def test_start_and_end_within_a_prompt(case):
    tokenize = load_open_clip_tokenizer(case.folder)
    vocabulary = json.loads((case.folder / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    assert tokenize(["<start_of_text>"])[0, :4].tolist() == [start, start, end, 0]
    assert start not in tokenize(["<|startoftext|>"])[0, 1:]


def test_weights_that_do_not_fit(case, tmp_path):
    state = torch.load(case.folder / "HPS.pt")["state_dict"]
    del state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    state["visual.proj"] = state["visual.proj"][:, 1:]
    torch.save({"state_dict": state}, tmp_path / "HPS.pt")
    with pytest.raises(UserError, match=r"visual\.proj has shape.*resblocks\.1\.attn\.in_proj_weight is missing"):
        hps.from_files(tmp_path / "HPS.pt", case.folder, CLIP)


@pytest.mark.parametrize(("reward", "file"), [("hps", "HPS_v2.1_compressed.pt"), ("hps_v2", "HPS_v2_compressed.pt")])
def test_the_released_files_are_looked_for(monkeypatch, reward, file):
    asked = []

    def find(name, file, *, repo, revision="main"):
        asked.append((name, file, repo))
        return Path(file)

    monkeypatch.setattr(hub, "find", find)
    with pytest.raises(UserError, match=r"(does not exist|missing|cannot be read)"):
        load_reward(reward)
    assert asked == [("hps", file, "xswu/HPSv2"), ("hps", "tokenizer.json", "openai/clip-vit-large-patch14")]


@pytest.mark.parametrize(("wanted", "there"), [("hps", "hps_v2"), ("hps_v2", "hps")])
def test_a_file_of_the_other_version_is_not_taken(monkeypatch, tmp_path, wanted, there):
    """The tensors of both have the same names and shapes; the file's name alone tells the version."""
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps" / hps.FILES[there]).write_bytes(b"weights")
    monkeypatch.setenv(hub.FOLDER, str(tmp_path))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(hub, "_listing", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError) as caught:
        load_reward(wanted)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        f"{tmp_path / 'hps' / hps.FILES[there]} is the reward {there}, another version than {wanted}"
    )
    assert f"{hps.FILES[wanted]} of xswu/HPSv2 is not here" in line


def test_every_score_says_its_version_and_unit():
    assert SCALES.keys() == REWARDS.keys()
    assert scale_of("hps") == "HPSv2.1, cosine"
    assert scale_of("hps_v2") == "HPSv2.0, cosine"
    assert (
        scale_of("hps:0.5+jpeg") == "0.5 x (HPSv2.1, cosine) + 1 x (minus the kilobytes of a JPEG file of quality 95)"
    )
    assert scale_of("https://server/score:2") == "2 x (https://server/score)"
