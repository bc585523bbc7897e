"""Images chosen among candidates: their distribution and their certificate by enumeration, and the commands."""

import itertools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import brightness

from nabla_gfn_jax import api, evaluate, sample
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.candidates import Candidates, draw_images
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.metrics.base import Batch, PathStatistics
from nabla_gfn_jax.metrics.certificate import Paths, certify
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import candidates

LEVELS = np.array([0.0, 0.4, 1.0])  # log R of three images
BASE, POLICY = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.4, 0.4])
BETA = 2.0


class Stub:
    """A sampler of three images with known probabilities, in batches of `size`."""

    def __init__(self, size, prompts=("a face", "an animal"), seed=0):
        self.size, self.prompts, self.how = size, prompts, SimpleNamespace(seed=seed)
        self.chain, self.has_nats = SimpleNamespace(num_steps=3), True

    def images(self, policy, num, *, first=0, nats=False, progress=None):
        """Base images for the policy None, else those of POLICY. Image i of a prompt does not depend on the batches."""
        of_prompts = [np.random.default_rng((7, p)).random(num)[first:] for p in range(len(self.prompts))]
        prompt = np.repeat(np.arange(len(self.prompts)), num - first)
        which = np.searchsorted(np.cumsum(BASE if policy is None else POLICY)[:-1], np.concatenate(of_prompts))
        ratio = np.log(BASE / POLICY)[which].astype(np.float32)
        spent = np.stack([-ratio, np.zeros_like(ratio), np.zeros_like(ratio)], axis=1)
        images = np.broadcast_to(LEVELS[which][:, None, None, None], (len(which), 1, 1, 3)).astype(np.float32)
        for i in range(0, len(which), self.size):
            rows = slice(i, i + self.size)
            paths = None if policy is None or not nats else PathStatistics(spent[rows], ratio[rows])
            yield Batch(images[rows], prompt[rows], paths)


def drawn(stub, number, policy, num, first=0):
    """Level numbers, prompts and path statistics of chosen images."""
    among = Candidates.of(number, "bright", brightness(1.0), BETA, stub.prompts)
    batches = list(draw_images(stub, policy, num, among, first=first))
    images, prompt = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("images", "prompt"))
    spent, ratio = (np.concatenate([getattr(b.paths, name) for b in batches]) for name in PathStatistics._fields)
    return np.searchsorted(LEVELS, images[:, 0, 0, 0] - 1e-6), prompt, spent, ratio


def enumerated(number, policy):
    """Probabilities of the chosen level, E[log mean w], and E[−log ratio], over all tuples of candidates."""
    q = BASE if policy is None else POLICY
    weight = BASE / q * np.exp(BETA * LEVELS)
    chosen, log_mean = np.zeros(3), 0.0
    for levels in itertools.product(range(3), repeat=number):
        levels = list(levels)
        probability, w = math.prod(q[levels]), weight[levels]
        np.add.at(chosen, levels, probability * w / w.sum())
        log_mean += probability * math.log(w.mean())
    return chosen, log_mean, BETA * chosen @ LEVELS - log_mean


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("policy", [None, "policy"])
def test_what_is_chosen_and_its_certificate(number, policy):
    """Frequencies, gap and spent nats against all tuples of candidates; the gap bounds the chosen image's own KL."""
    count = 20000
    levels, prompt, spent, ratio = drawn(Stub(997), number, policy, count)
    chosen, log_mean, nats = enumerated(number, policy)
    found = np.bincount(levels, minlength=3) / len(levels)
    error = np.sqrt(chosen * (1 - chosen) / len(levels))
    assert np.abs(found - chosen).max() < 4 * error.max()

    base = np.repeat(LEVELS, np.round(BASE * 1000).astype(int))
    log_z = math.log(BASE @ np.exp(BETA * LEVELS))
    judged = certify(
        Paths(LEVELS[levels], spent, ratio, prompt),
        Paths.of_base(np.tile(base, 2), np.repeat([0, 1], len(base))),
        BETA,
    )
    gap = judged.at_beta.gap
    assert gap.value == pytest.approx(log_z - log_mean, abs=5 * max(gap.error, 1e-3))
    assert judged.spent.value == pytest.approx(nats, abs=5 * judged.spent.error)
    target = BASE * np.exp(BETA * LEVELS - log_z)
    assert chosen @ np.log(chosen / target) < log_z - log_mean
    assert chosen @ np.log(chosen / BASE) < nats
    np.testing.assert_allclose(spent.sum(axis=1), -ratio, rtol=1e-6, atol=1e-6)


def test_with_many_candidates_they_are_of_the_target():
    """The share of the first level, of 0.5 in the base model and 0.2 in the policy, is the target's."""
    target = BASE * np.exp(BETA * LEVELS)
    target /= target.sum()
    for policy in (None, "policy"):
        levels, *_ = drawn(Stub(4096), 64, policy, 4000)
        assert np.abs(np.bincount(levels, minlength=3) / 8000 - target).max() < 0.025


def test_batches_and_the_first_image_do_not_change_them():
    whole = drawn(Stub(10**6), 3, "policy", 40)
    for size in (1, 2, 3, 7, 119):
        for ours, theirs in zip(drawn(Stub(size), 3, "policy", 40), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    later = drawn(Stub(8), 3, "policy", 40, first=30)
    for ours, theirs in zip(later, whole, strict=True):
        np.testing.assert_array_equal(ours, np.concatenate([theirs[30:40], theirs[70:]]))
    other = drawn(Stub(8, seed=1), 3, "policy", 40)
    assert (other[0] != whole[0]).any()


def test_an_image_without_a_reward_is_not_chosen():
    stub, judge = Stub(64), Candidates.of(4, "bright", brightness(1.0), BETA, ("a face", "an animal"))
    scores = judge.judge.update
    judge.judge.update = lambda batch: _with_nan(scores(batch))
    for batch in draw_images(stub, None, 200, judge):
        assert (batch.images < 0.9).all()  # the brightest has none


def _with_nan(found):
    found.values["log_reward"][found.values["log_reward"] > 0.9] = np.nan
    return found


def test_of_a_lora_they_are_the_samplers(tiny_model):
    """Each chosen image is one of its three to the bit, and its log ratio is that of their path weights."""
    model = api.load_model(str(tiny_model))
    random = iter(jax.random.split(jax.random.key(0), 1000))
    lora = {"unet": init_lora(jax.random.key(1), model.params["unet"], 2)}
    lora = jax.tree.map(lambda a: 0.3 * jax.random.normal(next(random), a.shape), lora)
    sampler = ImageSampler(model, ["a face", "an animal"], Sampling(steps=4, guidance=2.0), 4)
    among = Candidates.of(3, "bright", brightness(1.0), 5.0, sampler.prompts)
    all_of = list(sampler.images(lora, 6, nats=True))
    images = np.concatenate([batch.images for batch in all_of]).reshape(2, 2, 3, -1)
    ratio = np.concatenate([batch.paths.log_ratio for batch in all_of]).reshape(2, 2, 3)
    chosen = list(draw_images(sampler, lora, 2, among))
    found = np.concatenate([batch.images for batch in chosen]).reshape(2, 2, -1)
    same = (images == found[:, :, None]).all(axis=-1)
    np.testing.assert_array_equal(same.sum(axis=-1), 1)
    log_weight = 5 * images.mean(axis=-1) + ratio
    expected = np.log(np.exp(log_weight - log_weight.max()).mean(axis=-1)) + log_weight.max()
    expected -= 5 * images[same].reshape(2, 2, -1).mean(axis=-1)
    written = np.concatenate([batch.paths.log_ratio for batch in chosen]).reshape(2, 2)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-4)


def test_what_candidates_need(tiny_model):
    assert Candidates.of(1, "bright", None, None, ["a face"]) is None
    with pytest.raises(UserError, match=r"in proportion to R\^β, and --reward is not known; give it"):
        Candidates.of(2, "bright", None, 1.0, ["a face"])
    with pytest.raises(UserError, match=r"in proportion to R\^β, and --beta is not known; give it"):
        Candidates.of(2, "bright", brightness(1.0), None, ["a face"])
    sampler = ImageSampler(api.load_model(str(tiny_model)), ["a face"], Sampling(steps=2, eta=0.0), 2)
    among = Candidates.of(2, "bright", brightness(1.0), 1.0, ["a face"])
    with pytest.raises(UserError, match=r"by the density of their paths, and eta 0 has none; use an eta above 0"):
        list(draw_images(sampler, {"a": np.zeros(2)}, 1, among))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--candidates=2"], "and --reward is not known; give it"),
        (["--candidates=2", "--reward=valence"], "and --beta is not known; give it"),
        (["--beta=2"], "--reward and --beta choose among candidates; give --candidates above 1"),
    ],
)
def test_what_sample_refuses(flags, said, tiny_model, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["sample", f"--model={tiny_model}", f"--out={tmp_path / 'grid.png'}", *flags])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_the_commands(tiny_model, tmp_path, monkeypatch, capsys):
    """`evaluate` measures the base model by itself and of candidates; `sample` saves the images that the API gives."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    given = [f"--model={tiny_model}", "--steps=4", "--guidance=2", "--candidates=3", "--reward=bright", "--beta=40"]
    evaluate.main(["evaluate", *given, "--num=16", "--prompts=a_face", f"--out={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    base, chosen = (figures[name]["certificate"] for name in ("base", "base, one of 3"))
    assert chosen["log_reward"]["value"] > base["log_reward"]["value"]
    assert chosen["spent"]["value"] > 0 == base["spent"]["value"]
    assert chosen["spent_by_step"][:3] == [0.0] * 3
    assert chosen["at_beta"]["gap"]["value"] < base["at_beta"]["gap"]["value"]
    assert "base, one of 3" in capsys.readouterr().out

    sample.main(["sample", *given, "--num=4", f"--out={tmp_path / 'a.png'}", f"--each={tmp_path / 'each'}"])
    with Image.open(tmp_path / "each/0000.png") as picture:
        recipe = json.loads(picture.text["nabla_gfn_jax"])
        assert "Candidates: 3 by bright at beta 40" in picture.text["parameters"]
    assert recipe["candidates"] == {"number": 3, "beta": 40.0, "reward": "bright"}
    model, how = api.load_model(str(tiny_model)), {"steps": 4, "guidance": 2.0}
    images = api.sample(model, ["a face"], num=4, candidates=3, reward="bright", beta=40.0, **how)[0]
    for number, image in enumerate(images):
        with Image.open(tmp_path / f"each/{number:04d}.png") as picture:
            assert np.abs(np.asarray(picture).astype(int) - np.round(image * 255)).max() <= 1
    judged = api.evaluate(
        model, ["a face"], reward="bright", lora=None, num=16, beta=40.0, candidates=3, **how
    ).certificate
    assert judged.log_reward.value == pytest.approx(chosen["log_reward"]["value"], rel=1e-5)


@pytest.mark.parametrize("number", [1, 3])
def test_the_study_is_the_mean_over_all_choices(number):
    """Against all tuples of candidates, of three images with known probabilities; K = 1 is the base model itself."""
    levels = np.random.default_rng(3).choice(3, size=60000, p=BASE)
    mine = Paths.of_base(LEVELS[levels[:30000]], np.arange(30000) % 2)
    others = Paths.of_base(LEVELS[levels[30000:]], np.arange(30000) % 2)
    row = candidates.row_of(number, mine, others, BETA)
    chosen, log_mean, nats = enumerated(number, None)
    assert row.images == 30000 // number
    assert row.log_reward.value == pytest.approx(chosen @ LEVELS, abs=5 * row.log_reward.error)
    assert row.spent.value == pytest.approx(nats, abs=5 * row.spent.error + 1e-12)
    log_z = math.log(BASE @ np.exp(BETA * LEVELS))
    assert row.gap.value == pytest.approx(log_z - log_mean, abs=5 * row.gap.error)


def test_the_study(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    given = [f"--model={tiny_model}", "--num_steps=2", "--reward=bright", f"--bank={tmp_path / 'bank'}"]
    given += ["--together=8", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit):
        candidates.main(["candidates", *given, "--paths=12", "--candidates=2,4"])
    assert "--paths = 12 is too few for two images of each prompt; use 16 or more" in capsys.readouterr().err
    candidates.main(["candidates", *given, "--paths=16", "--candidates=2,4", "--beta=40"])
    rows = [json.loads(line) for line in (tmp_path / "out/candidates.jsonl").read_text().splitlines()]
    assert [(row["candidates"], row["images"]) for row in rows] == [(2, 4), (4, 2)]
    assert "gap at β = 40" in (tmp_path / "out/candidates.md").read_text()
