"""A reward of latents computed in parts has the same values and gradients as in one part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.training.latent_reward import in_parts, latent_reward

pytestmark = pytest.mark.thorough


def test_a_reward_in_parts_and_its_gradient():
    z, words = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)

    def score(scale, z, ids):
        return scale * jnp.sin(z * jnp.asarray(words)[ids]).sum(axis=1)

    ids = jnp.arange(12)

    for size, scans in ((0, 0), (12, 0), (5, 1), (4, 1), (1, 1)):
        log_reward = latent_reward(score, size)
        value, pull = jax.vjp(lambda z, f=log_reward: f(2.0, z, ids), z)
        np.testing.assert_allclose(value, 2 * np.sin(z * words).sum(1), rtol=1e-5, atol=1e-6)
        cotangent = np.arange(12, dtype=np.float32)
        np.testing.assert_allclose(
            pull(jnp.asarray(cotangent))[0], 2 * words * np.cos(z * words) * cotangent[:, None], rtol=1e-4, atol=1e-5
        )
        program = str(jax.make_jaxpr(lambda z, f=log_reward: f(2.0, z, ids))(z))
        assert program.count("scan[") == scans
    seen = []
    in_parts(lambda a: seen.append(a.shape) or a, 5, z)
    assert seen == [(4, 3)]  # the largest part up to 5 that divides 12
