"""Residual ∇-DB, compared with an independent version of its equations in PyTorch, in float64 by autograd."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nabla_gfn_jax.algorithms import nabla_db
from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.transitions import flatten, take
from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod, visited_times

torch.set_num_threads(1)
SHAPE, BATCH, WIDTH = (4, 4, 2), 3, 6
CHAIN = stable_diffusion_chain(STABLE_DIFFUSION, 50)
TIMES = visited_times("ddpm", 50)
ALPHAS = alphas_cumprod(STABLE_DIFFUSION)
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
    """A 3×3 convolution and a mixing layer with LoRA; the same code runs in both libraries."""
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


def _correction(phi, x, level, prompt_id):
    return _flow_network(jnp, _patches_jax, x, level.time.astype(jnp.float32), jnp.asarray(CONDITION)[prompt_id], phi)


def _predict(lora, x, level, condition):
    text, time = jnp.asarray(CONDITION)[condition], level.time.astype(jnp.float32)
    return _network(jnp, _patches_jax, x, time, text, BASE, lora)


MODEL = Model(
    chain=CHAIN,
    predict=_predict,
    log_reward=lambda z, prompt_id: _reward(jnp, z, jnp.asarray(CONDITION)[prompt_id]),
    heads={"correction": _correction},
)
IDS = jnp.arange(BATCH)
PARAMS = {"lora": LORA, "correction": FLOW}


def sample_keys(n=BATCH, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


@functools.cache
def sampled_trajectory():
    """A trajectory sampled by parameters θ† that differ from those of the loss."""
    earlier = jax.tree.map(lambda a: 0.7 * a, LORA)
    return jax.jit(lambda: sample(MODEL.predict, earlier, MODEL.chain, sample_keys(), SHAPE, IDS))()


def rollout() -> Rollout:
    trajectory = sampled_trajectory()
    return Rollout(trajectory, MODEL.log_reward(trajectory.samples, IDS), IDS, sample_keys())


def step(k: int):
    """t, t', ᾱ, ᾱ' and σ of a step, by the paper's formulas in float64."""
    t, t_next = (int(times[k]) for times in TIMES)
    a, b = ALPHAS[t], ALPHAS[t_next]
    return t, t_next, a, b, ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5


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
        _, _, a, b, sigma = step(k)
        return b**0.5 * self.clean(eps, x, a) + (1 - b - sigma**2) ** 0.5 * eps

    def log_p(self, x, y, k, lora):
        mu = self.mean(self.eps(x, step(k)[0], lora), x, k)
        return -((y - mu) ** 2).sum() / (2 * step(k)[4] ** 2)

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
        """The terms, each summed over the batch."""
        kappa, uses_flow = self.settings["prior_strength"], self.settings["credit"] == "lookahead"
        t, t_next, a, a_next, sigma = step(k)
        weighted = self.settings["variance_weighted"] or credit is not None
        weight, terms = sigma**2 if weighted else 1.0, {}
        if credit is None:
            credit = self.guess(y, t_next, a_next)
            if uses_flow and t_next > 0:
                flow = self.flow(y, t_next)
                credit = credit + (flow if self.settings["correction_from_forward"] else flow.detach())
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
    recorded = (trajectory.latents[k], trajectory.latents[k + 1], trajectory.outputs[k])
    x, y, eps = (_float64(a) for a in recorded)
    terms = oracle.terms(x, y, eps, k, credit)
    leaves = [*oracle.lora.values(), *oracle.phi.values()]
    gradient = torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradient, strict=True)]
    names = [("lora", n) for n in oracle.lora] + [("correction", n) for n in oracle.phi]
    return {n: float(v.detach()) for n, v in terms.items()}, dict(zip(names, zeros, strict=True))


def _assert_equal(metrics, gradient, oracle_terms, oracle_gradient, rtol=1e-4):
    for name, value in metrics.items():
        np.testing.assert_allclose(value, oracle_terms.get(name, 0.0), rtol=rtol, err_msg=name)
    for (group, name), expected in oracle_gradient.items():
        actual, expected = np.asarray(gradient[group][name], np.float64), expected.numpy()
        assert np.linalg.norm(actual - expected) <= rtol * np.linalg.norm(expected), (group, name)


DEFAULTS = {
    "beta": 0.8,
    "output_regularisation": 3.0,
    "prior_strength": 1.0,
    "credit": "lookahead",
    "gamma": "alpha_bar",
    "correction_from_forward": True,
    "variance_weighted": False,
}
VARIANTS = [
    {},
    {"prior_strength": 1.5},
    {"gamma": "sqrt_alpha_bar"},
    {"gamma": "one", "correction_from_forward": False, "prior_strength": 0.7},
    {"credit": "guess", "prior_strength": 1.5},
    {"credit": "guess", "gamma": "one", "variance_weighted": True},
]


def _predict_change(lora, *where):
    base = _predict(None, *where)
    return base, _predict(lora, *where) - base


CARRIED = dataclasses.replace(MODEL, predict_change=_predict_change)  # the two networks as one function


@pytest.fixture(params=["subtracted", "carried"])
def both_ways(request, monkeypatch):
    """The module's model computes the change by the LoRA in both ways."""
    if request.param == "carried":
        monkeypatch.setitem(globals(), "MODEL", CARRIED)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_term_and_gradient(variant):
    settings = DEFAULTS | variant
    rtol = 1e-4 if settings["prior_strength"] == 1 else 3e-4  # s_# = (μ − y)/σ² stays, of float32's μ at small σ
    algorithm = ResidualNablaDB(**settings)
    ordinary = jax.jit(lambda params, transition: algorithm.ordinary(params, MODEL, transition))
    for k in (0, 23, PENULTIMATE):
        transition = take(jnp.full(BATCH, k), rollout())
        _assert_equal(*ordinary(PARAMS, transition), *_oracle_terms(settings, k), rtol)
    transition = take(jnp.full(BATCH, 49), rollout())
    last = jax.jit(lambda params, transition: algorithm.last(params, MODEL, transition))
    _assert_equal(*last(PARAMS, transition), *_oracle_terms(settings, 49), rtol)


@pytest.mark.thorough
def test_both_ways_give_the_same_update():
    """Uses samples of a weaker LoRA, with λ's term from the recorded outputs or from the changes."""
    algorithm = ResidualNablaDB(**DEFAULTS)
    sampled_by = PARAMS | {"lora": jax.tree.map(lambda a: 0.7 * a, LORA)}

    def second_update(model, sampled):
        data = jax.tree.map(lambda a: a[1], algorithm.batch(sampled_by, model, sampled, 2).data)
        return algorithm.value_and_grad(PARAMS, model, data, jnp.ones(BATCH))

    subtracted, carried = (jax.jit(partial(second_update, model))(rollout()) for model in (MODEL, CARRIED))
    assert float(subtracted[0][1]["loss_reg"]) > 1e-3
    for ours, theirs in zip(jax.tree.leaves(carried), jax.tree.leaves(subtracted), strict=True):
        assert np.linalg.norm(ours - theirs) <= 2e-5 * np.linalg.norm(theirs)


@pytest.fixture
def dpm_solver(monkeypatch):
    """The module's chain and trajectory with twenty steps of the other sampler."""
    chain = stable_diffusion_chain(STABLE_DIFFUSION, 20, sampler="sde_dpm_solver")
    monkeypatch.setitem(globals(), "MODEL", dataclasses.replace(MODEL, chain=chain))
    monkeypatch.setitem(globals(), "TIMES", visited_times("sde_dpm_solver", 20))
    sampled_trajectory.cache_clear()
    yield
    sampled_trajectory.cache_clear()


@pytest.mark.thorough
def test_every_term_and_gradient_under_sde_dpm_solver(dpm_solver):
    """The same loss with this sampler's Gaussian transitions, whose coefficients are diffusers' (test_chain)."""
    algorithm = ResidualNablaDB(**DEFAULTS, transition_fraction=0.4, uneven_bins=True)
    chosen = algorithm.batch(PARAMS, MODEL, rollout(), 1).data
    assert chosen.ordinary.x.shape[:3] == (1, BATCH, 8)
    ordinary = jax.jit(lambda params, transition: algorithm.ordinary(params, MODEL, transition))
    for k in (0, 9, 18):
        transition = take(jnp.full(BATCH, k), rollout())
        _assert_equal(*ordinary(PARAMS, transition), *_oracle_terms(DEFAULTS, k))
    transition = take(jnp.full(BATCH, 19), rollout())
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
@pytest.mark.thorough
def test_the_comparison_catches_slips(slip, monkeypatch):
    name, factor = SLIPS[slip]
    right = getattr(nabla_db, name)
    monkeypatch.setattr(nabla_db, name, lambda *arguments: factor * right(*arguments))
    transition = take(jnp.full(BATCH, 23), rollout())
    algorithm = ResidualNablaDB(**DEFAULTS)
    actual = jax.jit(lambda params: algorithm.ordinary(params, MODEL, transition))(PARAMS)
    with pytest.raises(AssertionError):
        _assert_equal(*actual, *_oracle_terms(DEFAULTS, 23))


def first_update(batch):
    return jax.tree.map(lambda a: a[0], batch.data)


@pytest.mark.thorough
def test_the_loss_is_the_mean_over_all_transitions():
    algorithm = ResidualNablaDB(**DEFAULTS)
    chosen = first_update(jax.jit(lambda r: algorithm.batch(PARAMS, MODEL, r, 1))(rollout()))
    weight = jnp.ones(BATCH)
    (loss, metrics), gradient = jax.jit(lambda p, c: algorithm.value_and_grad(p, MODEL, c, weight))(PARAMS, chosen)
    np.testing.assert_allclose(loss, sum(metrics.values()), rtol=1e-6)
    parts = jax.jit(lambda p, c: [algorithm.ordinary(p, MODEL, flatten(c.ordinary)), algorithm.last(p, MODEL, c.last)])(
        PARAMS, chosen
    )
    expected, expected_gradient = jax.tree.map(lambda a, b: (a + b) / (6 * BATCH), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected_gradient)
