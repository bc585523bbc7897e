"""AWM, RAM, DiffusionNFT and EAM, compared with independent versions of their losses in PyTorch, float64, autograd."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_baselines import EARLIER, assert_gradient, of_update, without_gradient
from test_nabla_db import (
    ALPHAS,
    BATCH,
    CONDITION,
    DEFAULTS,
    MODEL,
    SHAPE,
    TIMES,
    _float64,
    _network,
    _oracle,
    _patches_torch,
    _reward,
    rollout,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms.awm import Awm
from nabla_gfn_jax.algorithms.eam import Eam
from nabla_gfn_jax.algorithms.nft import Nft
from nabla_gfn_jax.algorithms.noising import noise_samples
from nabla_gfn_jax.algorithms.ram import Ram
from nabla_gfn_jax.errors import UserError

torch.set_num_threads(1)
WEIGHT = np.asarray([1.5, -2.5, 0.25], np.float32)


def mean(x):
    return (x**2).mean((1, 2, 3))


class Noisings:
    """The i-th noised copy of all samples: the random numbers, and the network's output by formula."""

    def __init__(self, oracle, data, i):
        times = np.asarray(TIMES[0])[np.asarray(data.index[:, i])]
        self.k, self.t = np.asarray(data.index[:, i]), torch.tensor(times.astype(np.float64))
        self.a = torch.tensor(ALPHAS[times])[:, None, None, None]
        self.x, self.z = _float64(data.x[:, i]), _float64(sampled_trajectory().samples)
        self.noise = (self.x - self.a**0.5 * self.z) / (1 - self.a) ** 0.5
        self.oracle = oracle
        self.now = self.eps(oracle.lora)
        self.before = self.eps(_float64(EARLIER)).detach()
        self.base = self.eps(None).detach()

    def eps(self, lora):
        return _network(torch, _patches_torch, self.x, self.t, self.oracle.condition, self.oracle.base, lora)

    def clean(self, eps):
        return (self.x - (1 - self.a) ** 0.5 * eps) / self.a**0.5


def compare(algorithm, weight, each, terms_of):
    """Checks that loss, terms and gradient are means of `terms_of(noising, advantages)` over noised copies."""
    data, loss, terms, gradient = of_update(algorithm, jnp.asarray(weight))
    noised = getattr(data, "noised", data)
    assert noised.index.shape == (BATCH, each)
    oracle = _oracle(DEFAULTS)
    expected = [terms_of(Noisings(oracle, noised, i), _float64(weight)) for i in range(each)]
    sums = {name: sum(e[name].mean() for e in expected) / each for name in expected[0]}
    for name, value in sums.items():
        np.testing.assert_allclose(terms[name], float(value.detach()), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, sum(map(float, terms.values())), rtol=1e-5)
    sum(sums.values()).backward()
    assert_gradient(gradient, oracle)


@pytest.mark.parametrize("ratio_clip", [1.0, 0.02])
def test_awm(ratio_clip):
    def terms(n, advantage):
        advantage = advantage / 5.0
        ratio = torch.exp(mean(n.before - n.noise) - mean(n.now - n.noise))
        kept = torch.clamp(ratio, 1 - ratio_clip, 1 + ratio_clip)
        return {
            "loss_policy": -torch.minimum(advantage * ratio, advantage * kept),
            "loss_base": 0.3 * mean(n.now - n.base),
            "loss_reg": 2.0 * mean(n.now - n.before),
        }

    algorithm = Awm(ratio_clip=ratio_clip, base_regularisation=0.3, output_regularisation=2.0)
    compare(algorithm, WEIGHT, 6, terms)


def test_ram():
    def terms(n, advantage):
        target = n.base + advantage[:, None, None, None] * (n.noise - n.before)
        return {"loss_matching": mean(n.now - target), "loss_reg": 2.0 * mean(n.now - n.before)}

    compare(Ram(beta=3.0, output_regularisation=2.0), WEIGHT, 8, terms)


@pytest.mark.parametrize("mixing", [1.0, 0.1])
def test_nft(mixing):
    def terms(n, advantage):
        def error(eps):
            residual = n.clean(eps) - n.z
            size = residual.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
            return (residual**2 / size).mean((1, 2, 3))

        good = (1 + advantage / 5.0) / 2
        positive = (1 - mixing) * n.before + mixing * n.now
        negative = (1 + mixing) * n.before - mixing * n.now
        return {
            "loss_contrast": 5.0 / mixing * (good * error(positive) + (1 - good) * error(negative)),
            "loss_base": 0.3 * mean(n.now - n.base),
            "loss_reg": 2.0 * mean(n.now - n.before),
        }

    compare(Nft(mixing=mixing, base_regularisation=0.3, output_regularisation=2.0), WEIGHT, 10, terms)


@pytest.mark.parametrize("held", [0.0, 2.0])
@pytest.mark.thorough
def test_eam(held):
    """Uses the target's score at the sample; the base model's score comes from its noise at the last step's level."""
    z = _float64(sampled_trajectory().samples).requires_grad_()
    reward = torch.autograd.grad(_reward(torch, z, _float64(CONDITION)).sum(), z)[0]
    oracle = _oracle(DEFAULTS)
    t, _, a, _, _ = step(49)
    score = 0.7 * reward - oracle.eps(z.detach(), t, None) / (1 - a) ** 0.5

    def terms(n, advantage):
        target = -n.x + n.a**0.5 * (n.z + score)  # the score at x
        error = n.now + (1 - n.a) ** 0.5 * target
        shift = np.asarray([step(k)[4] ** -2 * mean_coefficient(k) ** 2 for k in n.k])
        nats = 0.5 * torch.tensor(shift) * (error**2).sum((1, 2, 3))
        return {"loss_adjoint": 50 * nats, "loss_reg": held * mean(n.now - n.before)}

    compare(Eam(beta=0.7, output_regularisation=held), WEIGHT, 6, terms)


def mean_coefficient(k):
    """∂μ/∂ε of a step."""
    _, _, a, b, sigma = step(k)
    return (1 - b - sigma**2) ** 0.5 - (b * (1 - a) / a) ** 0.5


@pytest.mark.thorough
def test_noise_is_normal_and_fresh_and_times_are_spread():
    many = jax.tree.map(np.asarray, noise_samples(None, MODEL, rollout(), 2, 400, power=1.0))
    assert many.output is None
    assert many.x.shape == (2, BATCH, 400, *SHAPE)
    a = ALPHAS[np.asarray(TIMES[0])[many.index]][..., None, None, None]
    noise = (many.x - np.sqrt(a) * np.asarray(sampled_trajectory().samples)[None, :, None]) / np.sqrt(1 - a)
    assert abs(float(noise.mean())) < 4 / np.sqrt(noise.size)
    assert abs(float(noise.std()) - 1) < 4 / np.sqrt(2 * noise.size)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.02
    time = 1 - (many.index + 0.5) / 50  # of density 2t: its mean is 2/3
    assert time.mean() == pytest.approx(2 / 3, abs=0.01)
    counts = np.bincount(noise_samples(None, MODEL, rollout(), 1, 50).index.ravel(), minlength=50)
    np.testing.assert_array_equal(counts, BATCH)  # each time once, of as many noisings


@pytest.mark.parametrize("algorithm", [Awm(), Ram(beta=1.0), Nft()], ids=lambda a: type(a).__name__)
def test_no_gradient_of_the_reward_is_taken(algorithm):
    of_update(algorithm, jnp.asarray(WEIGHT), model=without_gradient(MODEL))


def test_rams_weights_are_centred_rewards_times_beta():
    rewards, ids = np.random.default_rng(0).normal(size=40) * 3, np.zeros(40, int)
    algorithm = Ram(beta=-2.0, buffer_size=40)
    weight, stats = algorithm.weigh(algorithm.first_stats(1), {"log_reward": rewards}, ids)
    np.testing.assert_allclose(weight, -2.0 * (rewards - rewards.mean()), rtol=1e-4, atol=1e-5)
    assert stats.seen[0] == 40
    least, _ = dataclasses.replace(algorithm, baseline="least").weigh(
        algorithm.first_stats(2), {"log_reward": rewards}, np.arange(40) % 2
    )
    for prompt in range(2):  # β < 0: the least weight is the largest reward's
        own = rewards[prompt::2]
        np.testing.assert_allclose(least[prompt::2], 2.0 * (own.max() - own), rtol=1e-4, atol=1e-4)
    clipped = dataclasses.replace(Ram(beta=1.0, buffer_size=40), advantage_clip=0.5)
    weight, _ = clipped.weigh(clipped.first_stats(1), {"log_reward": rewards}, ids)
    assert np.abs(weight).max() == pytest.approx(0.5 * rewards.std(), rel=1e-4)


@pytest.mark.parametrize("algorithm", [Awm, Nft])
def test_an_advantage_that_is_divided_by_its_clip_has_one(algorithm):
    with pytest.raises(UserError, match="advantage_clip = inf"):
        algorithm(advantage_clip=float("inf"))
