"""Nats from arrays, against closed forms of Gaussians and against brute force."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import brentq

from nabla_gfn_jax.metrics import tilt
from nabla_gfn_jax.metrics.certificate import Paths, certify
from nabla_gfn_jax.metrics.tilt import log_z, tilt_to

SHRINK, SIGMA, STEPS, DIM, BETA = 0.9, 0.4, 12, 3, 2.0
REWARD = np.array([0.7, -0.3, 0.5])  # log R(x) = REWARD · x


@pytest.fixture(autouse=True)
def fewer_replicates(request, monkeypatch):
    """Uses fewer replicates in tests that need standard errors only to a tenth."""
    if "bootstrap" not in request.node.name:
        monkeypatch.setattr(tilt, "REPLICATES", 50)


def gaussian_chain(size, drift, seed, start=1.0):
    """Paths of y ~ N(SHRINK x + shift_k, SIGMA²) from x ~ N(0, start²), where the base model has no shift.

    The target P_base · R^β of a linear log R is a shift of σ² β SHRINKᵀ⁻ᵏ⁻¹ REWARD at step k: Doob's transform of a
    linear Gaussian chain, by hand. `drift(exact shift)` is the policy's.
    """
    rng = np.random.default_rng(seed)
    x = start * rng.normal(size=(size, DIM))
    spent, log_ratio = np.zeros((size, STEPS)), np.zeros(size)
    for k in range(STEPS):
        shift = drift(SIGMA**2 * BETA * SHRINK ** (STEPS - k - 1) * REWARD)
        noise = rng.normal(size=(size, DIM))
        x = SHRINK * x + shift + SIGMA * noise
        spent[:, k] = (shift @ shift) / (2 * SIGMA**2)
        log_ratio -= spent[:, k] + noise @ shift / SIGMA
    return Paths(x @ REWARD, spent, log_ratio, np.zeros(size, int))


def final_variance():
    variance = 1.0
    for _ in range(STEPS):
        variance = SHRINK**2 * variance + SIGMA**2
    return variance * REWARD @ REWARD  # of log R


def start_variance():
    """The variance of log R due to the start x_0, which no drift can change."""
    return SHRINK ** (2 * STEPS) * REWARD @ REWARD


def near(estimate, expected, sigmas=4.0):
    return abs(estimate.value - expected) < sigmas * estimate.error + 1e-9


def test_log_z_and_the_tilt_of_a_gaussian():
    log_reward = np.random.default_rng(0).normal(1.3, 0.6, 400_000)
    z = log_z(2.0 * log_reward)
    assert z.value == pytest.approx(2.0 * 1.3 + 2.0 * 0.6**2, abs=4 * z.error)
    assert z.error == pytest.approx(np.sqrt(np.expm1(4.0 * 0.6**2) / 400_000), rel=0.05)  # delta method
    found = tilt_to(1.3 + 0.6, log_reward)
    assert found.exponent == pytest.approx(1 / 0.6, rel=0.02)
    assert found.needed == pytest.approx(0.5, rel=0.02)


def test_the_tilt_of_several_prompts_has_one_exponent_for_all():
    rng = np.random.default_rng(1)
    prompt = rng.permutation(np.repeat([3, 5, 9], [40, 70, 25]))
    log_reward = rng.normal(size=135) * np.select([prompt == 3, prompt == 5], [2.0, 0.5], 1.0) + prompt

    def moments(b):
        means, log_zs = [], []
        for p in (3, 5, 9):
            values = log_reward[prompt == p]
            weights = np.exp(b * values)
            means.append(weights @ values / weights.sum())
            log_zs.append(np.log(weights.mean()))
        return np.mean(means), np.mean(log_zs)

    for goal in (4.9, 5.9, 6.6):
        b = brentq(lambda b, goal=goal: moments(b)[0] - goal, -50, 50, xtol=1e-13)
        found = tilt_to(goal, log_reward, prompt)
        assert found.exponent == pytest.approx(b, rel=1e-8)
        assert found.needed == pytest.approx(b * goal - moments(b)[1], rel=1e-8)
    assert log_z(1.7 * log_reward, prompt).plain == pytest.approx(moments(1.7)[1], rel=1e-12)


@pytest.mark.parametrize("goal", [-0.5, 2.0, 1e3])
def test_no_samples_tilt_reaches_beyond_the_best_sample(goal):
    found = tilt_to(goal, np.array([0.0, 0.2, 0.9, 1.0]))
    assert found.exponent == np.copysign(np.inf, goal)
    assert found.needed == pytest.approx(np.log(4))  # all on one sample of four


def test_the_tilt_close_to_the_best_sample_is_found():
    values = np.array([0.0, 0.2, 0.9, 1.0])
    goal = 1.0 - 1e-9
    found = tilt_to(goal, values)
    weights = np.exp(found.exponent * (values - 1.0))
    assert weights @ (1.0 - values) / weights.sum() == pytest.approx(1e-9, rel=1e-2)


def test_the_jackknife_corrects_the_bias_and_knows_its_error():
    rng = np.random.default_rng(2)
    exact = 0.5 * 1.2**2
    runs = [log_z(1.2 * rng.normal(size=30)) for _ in range(1500)]
    bias = np.mean([z.value for z in runs]) - exact
    plain_bias = np.mean([z.plain for z in runs]) - exact
    assert plain_bias < -0.03
    assert abs(bias) < 0.4 * abs(plain_bias)
    assert np.mean([z.error for z in runs]) == pytest.approx(np.std([z.value for z in runs]), rel=0.3)


def test_luck_of_the_noise_is_corrected():
    """100 samples whose log R is .8 times that of their base partners, and more: the luck of the 100 is taken out.

    The variance of the mean is σ²/100 (1 − ρ²) + .8² σ_#²/2000, by the formula of a control variate.
    """
    rng, found = np.random.default_rng(6), []
    for _ in range(120):
        base = rng.normal(0.3, 0.5, 2000)
        reward = 0.4 + 0.8 * (base[:100] - 0.3) + 0.2 * rng.normal(size=100)
        policy = Paths(reward, np.full((100, 1), 0.5), np.zeros(100), np.zeros(100, int))
        found.append(certify(policy, Paths.of_base(base)).log_reward)
    values = np.array([estimate.value for estimate in found])
    exact = np.sqrt(0.2**2 / 100 + 0.4**2 / 2000)
    assert abs(values.mean() - 0.4) < 4 * exact / np.sqrt(120)
    assert values.std() == pytest.approx(exact, rel=0.25)
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(exact, rel=0.15)


def test_equal_base_samples_correct_nothing():
    base = np.full(50, 0.1 + 0.2) * (1 + 1e-16 * np.arange(50))
    reward = np.random.default_rng(8).normal(size=20)
    policy = Paths(reward, np.ones((20, 1)), np.zeros(20), np.zeros(20, int))
    assert certify(policy, Paths.of_base(base)).log_reward.value == pytest.approx(reward.mean(), rel=1e-12)


def test_each_prompt_has_its_own_partners():
    """The corrected mean by plain loops, of two prompts in any order, one of them with fewer base samples."""
    rng = np.random.default_rng(7)
    prompt, base_prompt = rng.permutation(np.repeat([4, 2], [5, 30])), rng.permutation(np.repeat([2, 4], [60, 3]))
    reward, base = rng.normal(size=35), rng.normal(size=63)
    policy = Paths(reward, np.ones((35, 1)), np.zeros(35), prompt)
    pairs, means = [], []
    for p in (2, 4):
        own, theirs = reward[prompt == p], base[base_prompt == p]
        n = min(len(own), len(theirs))
        pairs.append((own[:n] - own[:n].mean(), theirs[:n] - theirs[:n].mean()))
        means.append((own.mean(), theirs[:n].mean() - theirs.mean()))
    slope = sum(a @ b for a, b in pairs) / sum(b @ b for _, b in pairs)
    expected = np.mean([mean - slope * luck for mean, luck in means])
    found = certify(policy, Paths.of_base(base, base_prompt)).log_reward.value
    assert found == pytest.approx(expected, rel=1e-10)
    assert abs(found - np.mean([mean for mean, _ in means])) > 1e-3


def test_the_base_model_spends_nothing():
    base = gaussian_chain(5000, lambda exact: 0 * exact, seed=3)
    result = certify(base, base, BETA)
    for figure in (result.exponent, result.needed, result.spent):
        assert (figure.value, figure.error) == (0.0, 0.0)
    assert np.isnan(result.efficiency.value)
    assert not result.spent_by_step.any()
    assert near(result.at_beta.gap, BETA**2 * final_variance() / 2)  # KL(N(0, v) ‖ N(βv, v))
    assert result.at_exponent.gap.value == pytest.approx(0.0, abs=1e-12)
    assert result.at_exponent.effective_share.value == pytest.approx(1.0)


def test_the_exact_tilt_is_efficient_and_its_weights_are_constant():
    """Starts from a fixed point, so that the drift alone determines the target."""
    policy = gaussian_chain(5000, lambda exact: exact, seed=4, start=0.0)
    base = gaussian_chain(5000, lambda exact: 0 * exact, seed=5, start=0.0)
    exact = BETA**2 * (final_variance() - start_variance()) / 2
    result = certify(policy, base, BETA)
    assert result.spent.value == pytest.approx(exact)
    assert near(result.needed, exact)
    assert near(result.efficiency, 1.0)
    assert near(result.exponent, BETA)
    assert near(result.at_beta.gap, 0.0)
    assert result.at_beta.log_weight_std.value < 1e-9
    assert result.at_beta.effective_share.value == pytest.approx(1.0)
    assert result.warnings == ()


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_policy_that_goes_half_way_or_too_far_has_the_known_gap(scale):
    """KL(N(sm, v) ‖ N(m, v)) of every step: (1−s)² of the whole; a start that no drift moves adds its own tilt."""
    policy = gaussian_chain(10_000, lambda exact: scale * exact, seed=6)
    base = gaussian_chain(10_000, lambda exact: 0 * exact, seed=7)
    by_steps = BETA**2 * (final_variance() - start_variance()) / 2
    by_start = BETA**2 * start_variance() / 2
    result = certify(policy, base, BETA)
    assert result.spent.value == pytest.approx(scale**2 * by_steps)
    assert near(result.at_beta.gap, (1 - scale) ** 2 * by_steps + by_start)
    mean = scale * 2 * by_steps / BETA
    assert near(result.needed, mean**2 / (2 * final_variance()))
    assert near(result.exponent, mean / final_variance())
    assert result.at_exponent.gap.value == pytest.approx(result.spent.value - result.needed.value, abs=0.02)
    variance = BETA**2 * start_variance() + (1 - scale) ** 2 * 2 * by_steps
    assert near(result.at_beta.log_weight_std, variance**0.5)
    assert near(result.at_beta.effective_share, np.exp(-variance))  # of log-normal weights


def test_nats_spent_in_a_useless_direction_are_all_gap():
    useless = np.array([0.3, 0.7, 0.0]) * 0.1
    assert useless @ REWARD == pytest.approx(0.0)
    policy = gaussian_chain(4000, lambda exact: useless, seed=8)
    base = gaussian_chain(4000, lambda exact: 0 * exact, seed=8)  # the same noise
    spent = STEPS * (useless @ useless) / (2 * SIGMA**2)
    result = certify(policy, base, 0.0)
    assert result.spent.value == pytest.approx(spent)
    assert result.needed.value == pytest.approx(0.0, abs=1e-12)
    assert result.at_beta.gap.value == pytest.approx(spent)
    np.testing.assert_allclose(result.spent_by_step, spent / STEPS)


def test_the_same_noise_cancels_in_the_error():
    base = gaussian_chain(500, lambda exact: 0 * exact, seed=9)
    policies = [gaussian_chain(500, lambda exact: 0.1 * exact, seed=s) for s in (9, 10)]
    paired, apart = (certify(p, base).exponent.error for p in policies)
    assert paired < 0.3 * apart


def test_the_bootstrap_agrees_with_the_delta_method():
    """d needed = b dr − d log Z(b), and d gap likewise at β; db = (dr − d tilted mean)/v. Moments of Gaussians."""
    n, m, beta, v = 1500, 2500, 0.9, final_variance()
    policy = gaussian_chain(n, lambda exact: 0.6 * exact, seed=14)
    base = gaussian_chain(m, lambda exact: 0 * exact, seed=15)
    policy = dataclasses.replace(policy, log_reward=policy.log_reward[np.random.default_rng(0).permutation(n)])
    result = certify(policy, base, beta)
    b = result.exponent.value
    expected = {
        "log_reward": v / n,
        "exponent": (v / n + np.exp(b**2 * v) * (v + (b * v) ** 2) / m) / v**2,
        "needed": b**2 * v / n + np.expm1(b**2 * v) / m,
    }
    for name, variance in expected.items():
        assert getattr(result, name).error == pytest.approx(variance**0.5, rel=0.25)
    assert result.at_beta.gap.error == pytest.approx((beta**2 * v / n + np.expm1(beta**2 * v) / m) ** 0.5, rel=0.25)


def test_few_effective_samples_are_said_and_the_policys_weights_help():
    beta = 3 * BETA
    base = gaussian_chain(300, lambda exact: 0 * exact, seed=11)
    policy = gaussian_chain(300, lambda exact: 3 * exact, seed=12)
    exact = beta**2 * final_variance() / 2
    without, with_policy = certify(base, base, beta), certify(policy, base, beta)
    assert without.at_beta.log_z.value < exact - 3.0
    assert "lower bound" in without.warnings[0]
    assert with_policy.at_beta.log_z.value == pytest.approx(exact, abs=0.5)
    assert "the policy's own path weights" in with_policy.warnings[-1]
    beyond = dataclasses.replace(base, log_reward=base.log_reward + 100.0)
    assert "beyond" in certify(beyond, base).warnings[0]


def test_prompts_are_compared_with_themselves():
    """With two prompts of opposite rewards and shuffled samples, the figures are the means over the two prompts."""
    rng = np.random.default_rng(13)
    parts = [gaussian_chain(1000, lambda exact, s=s: s * exact, seed=20 + i) for i, s in enumerate((0.5, 0.2))]
    order = rng.permutation(2000)

    def both(parts):
        joined = [np.concatenate([getattr(p, name) for p in parts]) for name in ("log_reward", "spent", "log_ratio")]
        joined[0] = joined[0] + np.repeat([0.0, 50.0], 1000)
        return Paths(*(a[order] for a in joined), np.repeat([7, 2], 1000)[order])

    bases = [gaussian_chain(1000, lambda exact: 0 * exact, seed=20 + i) for i in range(2)]
    together = certify(both(parts), both(bases), 1.0)
    apart = [certify(p, b, 1.0) for p, b in zip(parts, bases, strict=True)]
    assert together.spent.value == pytest.approx(np.mean([r.spent.value for r in apart]))
    assert together.at_beta.gap.value == pytest.approx(np.mean([r.at_beta.gap.value for r in apart]))
    assert together.log_reward.value == pytest.approx(25.0 + np.mean([r.log_reward.value for r in apart]))
    with pytest.raises(ValueError, match="different prompts"):
        certify(parts[0], both(bases))
