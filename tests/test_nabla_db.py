"""Residual ∇-DB against an independent statement of its equations in PyTorch, in float64 by autograd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nabla_gfn_jax.algorithms import nabla_db
from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.reward_maximiser import RewardMaximiser
from nabla_gfn_jax.algorithms.transitions import flatten, gather
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.diffusion.schedule import (
    STABLE_DIFFUSION,
    make_schedule,
)
from nabla_gfn_jax.errors import UserError

torch.set_num_threads(1)
SHAPE, BATCH, WIDTH = (4, 4, 2), 3, 6
SCHEDULE = make_schedule(STABLE_DIFFUSION, 50)
PENULTIMATE = 48


def _weights(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    base = {
        "in": normal(18, WIDTH, scale=0.25),
        "mix": normal(WIDTH, WIDTH, scale=0.5),
        "out": normal(WIDTH, 2, scale=0.4),
    }
    lora = {"down": normal(WIDTH, 2, scale=0.3), "up": normal(2, WIDTH, scale=0.3)}
    flow = {"in": normal(18, WIDTH, scale=0.3), "time": normal(WIDTH), "out": normal(WIDTH, 2, scale=2.0)}
    return base, lora, flow


BASE, LORA, FLOW = _weights()
REWARD = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)
CONDITION = np.random.default_rng(6).normal(size=(BATCH, WIDTH)).astype(np.float32)


def _network(np_like, patches, x, t, condition, base, lora):
    """A 3×3 convolution and a low-rank-adapted mixing layer; the same text in both libraries."""
    hidden = np_like.tanh(patches(x) @ base["in"] + condition[:, None, None, :] + t[:, None, None, None] / 500)
    mixed = hidden @ base["mix"]
    if lora is not None:
        mixed = mixed + hidden @ lora["down"] @ lora["up"]
    return np_like.tanh(mixed) @ base["out"]


def _flow_network(np_like, patches, x, t, condition, phi):
    time = (t[:, None] / 300 * phi["time"][None])[:, None, None, :]
    return np_like.tanh(patches(x) @ phi["in"] + time + condition[:, None, None, :]) @ phi["out"]


def _reward(np_like, z, condition):
    inner = np_like.sin(z * REWARD_OF[np_like][None]) + 0.3 * z**2
    return inner.reshape((len(z), -1)).sum(1) * np_like.tanh(condition[:, 0])


def _patches_jax(x):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, -1)


def _patches_torch(x):
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)], -1)


def _float64(tree):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a), dtype=torch.float64), tree)


REWARD_OF = {jnp: jnp.asarray(REWARD), torch: _float64(REWARD)}
MODEL = Model(
    predict=lambda lora, x, t, c: _network(jnp, _patches_jax, x, t.astype(jnp.float32), c, BASE, lora),
    flow=lambda phi, x, t, c: _flow_network(jnp, _patches_jax, x, t.astype(jnp.float32), c, phi),
    log_reward=functools.partial(_reward, jnp),
)
PARAMS = {"lora": LORA, "flow": FLOW}


def sample_keys(n=BATCH, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


@functools.cache
def sampled_trajectory():
    """Sampled by parameters θ† that are not the ones the loss is taken at."""
    earlier = jax.tree.map(lambda a: 0.7 * a, LORA)
    predict = functools.partial(MODEL.predict, earlier)
    return jax.jit(lambda: sample(predict, SCHEDULE, sample_keys(), SHAPE, jnp.asarray(CONDITION)))()


# ---------------------------------------------------------------- the oracle: one transition, autograd only


class Oracle:
    def __init__(self, lora, phi, settings):
        self.base, self.condition = _float64(BASE), _float64(CONDITION)
        self.lora, self.phi, self.settings = lora, phi, settings

    def eps(self, x, t, lora):
        return _network(torch, _patches_torch, x, torch.full((BATCH,), float(t)), self.condition, self.base, lora)

    def flow(self, x, t):
        return _flow_network(torch, _patches_torch, x, torch.full((BATCH,), float(t)), self.condition, self.phi)

    @staticmethod
    def clean(eps, x, a):
        return (x - (1 - a) ** 0.5 * eps) / a**0.5

    def mean(self, eps, x, k):
        a, b, sigma = (float(v[k]) for v in (SCHEDULE.alpha_bar, SCHEDULE.alpha_bar_next, SCHEDULE.sigma))
        return b**0.5 * self.clean(eps, x, a) + (1 - b - sigma**2) ** 0.5 * eps

    def log_p(self, x, y, k, lora):
        mu = self.mean(self.eps(x, int(SCHEDULE.timestep[k]), lora), x, k)
        return -((y - mu) ** 2).sum() / (2 * float(SCHEDULE.sigma[k]) ** 2)

    def s(self, x, y, k, lora):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(self.log_p(x, y, k, lora), y, create_graph=True)[0]

    def r(self, x, y, k, lora):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.log_p(x, y, k, lora), x)[0]

    def guess(self, x, t, a):
        """G(x, t); at t = 0 the clean prediction is x itself."""
        x = x.clone().requires_grad_()
        clean = self.clean(self.eps(x, t, self.lora), x, a) if t > 0 else x
        gradient = torch.autograd.grad(_reward(torch, clean, self.condition).sum(), x)[0]
        gamma = {"alpha_bar": a, "sqrt_alpha_bar": a**0.5, "one": 1.0}[self.settings["gamma"]]
        return self.settings["beta"] * gamma * gradient

    def terms(self, x, y, eps_dagger, k, credit=None):
        """Each term, summed over the batch."""
        kappa, uses_flow = self.settings["prior_strength"], self.settings["credit"] == "lookahead"
        t, t_next = int(SCHEDULE.timestep[k]), int(SCHEDULE.next_timestep[k])
        a, a_next = float(SCHEDULE.alpha_bar[k]), float(SCHEDULE.alpha_bar_next[k])
        weighted = self.settings["variance_weighted"] or credit is not None
        weight, terms = float(SCHEDULE.sigma[k]) ** 2 if weighted else 1.0, {}
        if credit is None:
            credit = self.guess(y, t_next, a_next)
            if uses_flow and t_next > 0:
                flow = self.flow(y, t_next)
                credit = credit + (flow if self.settings["flow_gradient_from_forward"] else flow.detach())
        forward = self.s(x, y, k, self.lora) - kappa * self.s(x, y, k, None).detach() - credit
        terms["loss_forward"] = weight * (forward**2).mean((1, 2, 3)).sum()
        if uses_flow and t_next > 0:
            backward = self.r(x, y, k, self.lora) - kappa * self.r(x, y, k, None)
            backward = backward + self.guess(x, t, a) + self.flow(x, t)
            terms["loss_reverse"] = (backward**2).mean((1, 2, 3)).sum()
        elif uses_flow:
            terms["loss_terminal"] = (self.flow(y, 0) ** 2).mean((1, 2, 3)).sum()
        drift = self.eps(x, t, self.lora) - eps_dagger
        terms["loss_reg"] = self.settings["output_regularisation"] * (drift**2).mean((1, 2, 3)).sum()
        return terms


def _oracle(settings):
    lora = {n: v.requires_grad_() for n, v in _float64(LORA).items()}
    phi = {n: v.requires_grad_() for n, v in _float64(FLOW).items()}
    return Oracle(lora, phi, settings)


def _oracle_terms(settings, k, credit=None):
    oracle, trajectory = _oracle(settings), sampled_trajectory()
    recorded = (trajectory.latents[k], trajectory.latents[k + 1], trajectory.noise_predictions[k])
    x, y, eps = (_float64(a) for a in recorded)
    terms = oracle.terms(x, y, eps, k, credit)
    leaves = [*oracle.lora.values(), *oracle.phi.values()]
    gradient = torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradient, strict=True)]
    names = [("lora", n) for n in oracle.lora] + [("flow", n) for n in oracle.phi]
    return {n: float(v.detach()) for n, v in terms.items()}, dict(zip(names, zeros, strict=True))


def _assert_equal(metrics, gradient, oracle_terms, oracle_gradient):
    for name, value in metrics.items():
        np.testing.assert_allclose(value, oracle_terms.get(name, 0.0), rtol=1e-4, err_msg=name)
    for (group, name), expected in oracle_gradient.items():
        actual, expected = np.asarray(gradient[group][name], np.float64), expected.numpy()
        assert np.linalg.norm(actual - expected) <= 1e-4 * np.linalg.norm(expected), (group, name)


DEFAULTS = {
    "beta": 0.8,
    "output_regularisation": 3.0,
    "prior_strength": 1.0,
    "credit": "lookahead",
    "gamma": "alpha_bar",
    "flow_gradient_from_forward": True,
    "variance_weighted": False,
}
VARIANTS = [
    {},
    {"prior_strength": 1.5},
    {"gamma": "sqrt_alpha_bar"},
    {"gamma": "one", "flow_gradient_from_forward": False, "prior_strength": 0.7},
    {"credit": "guess", "prior_strength": 1.5},
    {"credit": "guess", "gamma": "one", "variance_weighted": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_term_and_gradient(variant):
    settings = DEFAULTS | variant
    algorithm = ResidualNablaDB(**settings)
    ordinary = jax.jit(lambda params, transition: algorithm.ordinary(params, MODEL, transition))
    for k in (0, 23, PENULTIMATE):
        transition = gather(jnp.full(BATCH, k), sampled_trajectory(), SCHEDULE, jnp.asarray(CONDITION), None)
        _assert_equal(*ordinary(PARAMS, transition), *_oracle_terms(settings, k))
    transition = gather(jnp.full(BATCH, 49), sampled_trajectory(), SCHEDULE, jnp.asarray(CONDITION), None)
    last = jax.jit(lambda params, transition: algorithm.last(params, MODEL, transition))
    _assert_equal(*last(PARAMS, transition), *_oracle_terms(settings, 49))


@pytest.fixture
def dpm_solver(monkeypatch):
    """The module's schedule and trajectory by the other sampler, twenty steps."""
    monkeypatch.setitem(globals(), "SCHEDULE", make_schedule(STABLE_DIFFUSION, 20, sampler="sde_dpm_solver"))
    sampled_trajectory.cache_clear()
    yield
    sampled_trajectory.cache_clear()


def test_every_term_and_gradient_under_sde_dpm_solver(dpm_solver):
    """Its transition densities, which are Gaussian with diffusers' coefficients (test_schedule), in the same loss."""
    algorithm = ResidualNablaDB(**DEFAULTS, transition_fraction=0.4, uneven_bins=True)
    condition = jnp.asarray(CONDITION)
    chosen = algorithm.transitions(PARAMS, MODEL, sample_keys(), sampled_trajectory(), SCHEDULE, condition, 1)
    assert chosen.ordinary.x.shape[:3] == (1, BATCH, 8)
    ordinary = jax.jit(lambda params, transition: algorithm.ordinary(params, MODEL, transition))
    for k in (0, 9, 18):
        transition = gather(jnp.full(BATCH, k), sampled_trajectory(), SCHEDULE, condition, None)
        _assert_equal(*ordinary(PARAMS, transition), *_oracle_terms(DEFAULTS, k))
    transition = gather(jnp.full(BATCH, 19), sampled_trajectory(), SCHEDULE, condition, None)
    last = jax.jit(lambda params, transition: algorithm.last(params, MODEL, transition))
    _assert_equal(*last(PARAMS, transition), *_oracle_terms(DEFAULTS, 19))


SLIPS = {  # what goes wrong, in which function, by how much
    "forward sign": ("score_change", -1.0),
    "reverse sign": ("score", -1.0),
    "guess sign": ("guess_cotangent", -1.0),
    "guess off by a thousandth": ("guess_cotangent", 1.001),
    "terms off by a thousandth": ("mean_square", 1.001),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_the_comparison_catches_slips(slip, monkeypatch):
    name, factor = SLIPS[slip]
    right = getattr(nabla_db, name)
    monkeypatch.setattr(nabla_db, name, lambda *arguments: factor * right(*arguments))
    transition = gather(jnp.full(BATCH, 23), sampled_trajectory(), SCHEDULE, jnp.asarray(CONDITION), None)
    algorithm = ResidualNablaDB(**DEFAULTS)
    actual = jax.jit(lambda params: algorithm.ordinary(params, MODEL, transition))(PARAMS)
    with pytest.raises(AssertionError):
        _assert_equal(*actual, *_oracle_terms(DEFAULTS, 23))


def first_draw(transitions):
    return jax.tree.map(lambda a: a[0], transitions)


def test_the_loss_is_the_mean_over_all_transitions():
    algorithm = ResidualNablaDB(**DEFAULTS)
    condition = jnp.asarray(CONDITION)
    choose = jax.jit(lambda t: algorithm.transitions(PARAMS, MODEL, sample_keys(), t, SCHEDULE, condition, 1))
    chosen = first_draw(choose(sampled_trajectory()))
    (loss, metrics), gradient = jax.jit(lambda p, c: algorithm.value_and_grad(p, MODEL, c))(PARAMS, chosen)
    np.testing.assert_allclose(loss, sum(metrics.values()), rtol=1e-6)
    parts = jax.jit(lambda p, c: [algorithm.ordinary(p, MODEL, flatten(c.ordinary)), algorithm.last(p, MODEL, c.last)])(
        PARAMS, chosen
    )
    expected, expected_gradient = jax.tree.map(lambda a, b: (a + b) / (6 * BATCH), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected_gradient)


# ---------------------------------------------------------------- adjoint


def test_the_adjoint_is_the_gradient_through_the_whole_chain():
    oracle, latents = _oracle(DEFAULTS), _float64(sampled_trajectory().latents)
    shocks = [
        latents[k + 1] - oracle.mean(oracle.eps(latents[k], int(SCHEDULE.timestep[k]), None), latents[k], k)
        for k in range(50)
    ]
    credit = adjoint_credit(MODEL, sampled_trajectory(), SCHEDULE, jnp.asarray(CONDITION), DEFAULTS["beta"])
    for start in (1, 24, 49, 50):
        t = int(SCHEDULE.timestep[start - 1])
        base_eps = oracle.eps(latents[start - 1], t, None).numpy()
        np.testing.assert_allclose(credit.base_prediction[start - 1], base_eps, rtol=1e-3, atol=1e-5)
        leaf = latents[start].clone().requires_grad_()
        x = leaf
        for k in range(start, 50):
            x = oracle.mean(oracle.eps(x, int(SCHEDULE.timestep[k]), None), x, k) + shocks[k]
        log_reward = DEFAULTS["beta"] * _reward(torch, x, oracle.condition).sum()
        expected = torch.autograd.grad(log_reward, leaf)[0].numpy()
        assert np.linalg.norm(credit.gradient[start - 1] - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("kappa", [1.0, 1.5])
def test_adjoint_loss_and_gradient(kappa):
    settings = DEFAULTS | {"credit": "adjoint", "prior_strength": kappa}
    algorithm, condition = ResidualNablaDB(**settings), jnp.asarray(CONDITION)
    credit = adjoint_credit(MODEL, sampled_trajectory(), SCHEDULE, condition, DEFAULTS["beta"])
    loss = jax.jit(lambda params, transition: algorithm.with_adjoint(params, MODEL, transition))
    for k in (0, 23, PENULTIMATE, 49):
        transition = gather(jnp.full(BATCH, k), sampled_trajectory(), SCHEDULE, condition, credit)
        _assert_equal(*loss(PARAMS, transition), *_oracle_terms(settings, k, _float64(credit.gradient[k])))


def test_credit_clip():
    condition = jnp.asarray(CONDITION)
    credit = adjoint_credit(MODEL, sampled_trajectory(), SCHEDULE, condition, DEFAULTS["beta"])
    transition = gather(jnp.full(BATCH, 23), sampled_trajectory(), SCHEDULE, condition, credit)
    sizes = float(SCHEDULE.sigma[23]) * np.sqrt((credit.gradient[23] ** 2).mean((1, 2, 3)))
    limit = float(np.sort(sizes)[1])  # the middle one of three stays as it is, the largest shrinks to it
    clipped = ResidualNablaDB(**DEFAULTS | {"credit": "adjoint"}, credit_clip=limit * (1 + 1e-5))
    shrunk = credit.gradient[23] * np.minimum(1, limit / sizes)[:, None, None, None]
    expected = _oracle_terms(DEFAULTS | {"credit": "adjoint"}, 23, _float64(shrunk))
    _assert_equal(*clipped.with_adjoint(PARAMS, MODEL, transition), *expected)


# ---------------------------------------------------------------- the reward maximiser


@pytest.mark.parametrize("tail", [1, 3])
def test_reward_maximiser_gradient(tail):
    algorithm, condition, trajectory = RewardMaximiser(tail=tail), jnp.asarray(CONDITION), sampled_trajectory()
    chosen = first_draw(algorithm.transitions(PARAMS, MODEL, sample_keys(), trajectory, SCHEDULE, condition, 1))
    (loss, _), gradient = jax.jit(lambda p, c: algorithm.value_and_grad(p, MODEL, c))(PARAMS, chosen)
    oracle = _oracle(DEFAULTS)
    x = _float64(trajectory.latents[50 - tail])
    for k in range(50 - tail, 50):
        sampled = oracle.mean(_float64(trajectory.noise_predictions[k]), _float64(trajectory.latents[k]), k)
        shock = _float64(trajectory.latents[k + 1]) - sampled
        x = oracle.mean(oracle.eps(x, int(SCHEDULE.timestep[k]), oracle.lora), x, k) + shock
    expected = -_reward(torch, x, oracle.condition).mean()
    np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-4)
    expected.backward()
    for name, weights in oracle.lora.items():
        reference = weights.grad.numpy()
        assert np.linalg.norm(gradient["lora"][name] - reference) < 1e-4 * np.linalg.norm(reference)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["flow"]))


def test_reward_maximiser_names_a_tail_too_long():
    with pytest.raises(UserError, match="tail = 51 is more"):
        RewardMaximiser(tail=51).validate(50)
