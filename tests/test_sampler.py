"""The scan, compared with a Python loop over diffusers' DDIMScheduler with the same network and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.sampler import draw_noise, sample
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION as CONFIG

SHAPE = (4, 3, 2)


def _weights():
    rng = np.random.default_rng(1)
    return rng.normal(size=(2, 2)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)


def _predict(lora, x, level, condition):
    mixing, embedding = _weights()
    time = (level.time.astype(jnp.float32) / 1000)[:, None, None, None]
    return jnp.tanh(x @ mixing + time + (condition @ embedding)[:, None, None, :])


def _keys(n):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(n))


def test_fifty_ddpm_steps_match_diffusers():
    condition = jax.random.normal(jax.random.key(3), (3, 5))
    trajectory = jax.jit(lambda k: sample(_predict, None, stable_diffusion_chain(CONFIG, 50), k, SHAPE, condition))(
        _keys(3)
    )
    mixing, embedding = (torch.from_numpy(w) for w in _weights())
    oracle = DDIMScheduler(**CONFIG)
    oracle.set_timesteps(50)
    x = torch.tensor(np.asarray(draw_noise(_keys(3), 0, SHAPE)))
    prompt = torch.tensor(np.asarray(condition)) @ embedding
    for k, t in enumerate(oracle.timesteps):
        np.testing.assert_allclose(trajectory.latents[k], x.numpy(), rtol=1e-4, atol=1e-4)
        eps = torch.tanh(x @ mixing + t / 1000 + prompt[:, None, None, :])
        np.testing.assert_allclose(trajectory.outputs[k], eps.numpy(), rtol=1e-4, atol=1e-4)
        noise = torch.tensor(np.asarray(draw_noise(_keys(3), k + 1, SHAPE)))
        x = oracle.step(eps, t, x, eta=1.0, variance_noise=noise).prev_sample
    error = np.linalg.norm(trajectory.samples - x.numpy()) / np.linalg.norm(x.numpy())
    assert error < 1e-4
    assert trajectory.latents.shape == (51, 3, *SHAPE)


@pytest.mark.thorough
def test_a_sample_depends_on_its_own_key_only():
    chain = stable_diffusion_chain(CONFIG, 5)
    condition = jax.random.normal(jax.random.key(3), (4, 5))
    whole = sample(_predict, None, chain, _keys(4), SHAPE, condition)
    part = sample(_predict, None, chain, _keys(4)[1:3], SHAPE, condition[1:3])
    np.testing.assert_allclose(whole.latents[:, 1:3], part.latents, rtol=1e-5, atol=1e-5)


def test_noise_is_fresh_at_every_step_and_for_every_sample():
    draws = jnp.stack([draw_noise(_keys(200), k, (10,)) for k in range(3)])  # (3, 200, 10)
    flat = np.asarray(draws).reshape(3, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.08
    assert abs(flat.std() - 1) < 0.05
    assert len(np.unique(np.asarray(draws).reshape(600, 10), axis=0)) == 600


def test_the_base_model_takes_over_after_the_loras_steps():
    chain, condition = stable_diffusion_chain(CONFIG, 5), jax.random.normal(jax.random.key(3), (4, 5))

    def predict(lora, x, level, condition):
        return _predict(None, x, level, condition) + (0.0 if lora is None else lora)

    given = (predict, jnp.float32(0.5), chain, _keys(4), SHAPE, condition)
    mixed = sample(*given, 3)
    np.testing.assert_allclose(mixed.latents[:4], sample(*given).latents[:4], rtol=1e-6)
    for k in range(5):
        level = chain.at[k].each(4)
        expected = predict(jnp.float32(0.5) if k < 3 else None, mixed.latents[k], level, condition)
        np.testing.assert_allclose(mixed.outputs[k], expected, rtol=1e-5, atol=1e-6)
