"""The VAE, compared with diffusers' VAE, whose random weights are read from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.base_models.diffusers_folder import load_folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = oracle.pipeline(folder, **oracle.ONE_LEVEL)
    pipe.save_pretrained(folder)
    return pipe.vae, load_folder(folder)


def test_encode(pair):
    theirs, model = pair
    images = np.random.default_rng(0).random((2, 32, 24, 3), np.float32)
    encode = jax.jit(lambda params, images: model.vae.apply({"params": params}, images, method="encode"))
    mean, std = encode(model.params["vae"], images)
    posterior = theirs.encode(nchw(2 * images - 1)).latent_dist
    assert mean.shape == (2, 8, 6, 4)
    assert relative(mean, nhwc(posterior.mean * theirs.config.scaling_factor)) < 1e-5
    assert relative(std, nhwc(posterior.std * theirs.config.scaling_factor)) < 1e-5


def test_decode_and_its_gradient(pair):
    theirs, model = pair
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 8, 6, 4)).astype(np.float32)
    cotangent = rng.normal(size=(2, 32, 24, 3)).astype(np.float32)

    def pulled_back(params, latents):
        def decode(z):
            return model.vae.apply({"params": params}, z, method="decode")

        images, pull = jax.vjp(decode, latents)
        return images, pull(jnp.asarray(cotangent))[0]

    images, gradient = jax.jit(pulled_back)(model.params["vae"], latents)
    with torch.enable_grad():
        z = nchw(latents).requires_grad_()
        expected = theirs.decode(z / theirs.config.scaling_factor).sample / 2 + 0.5
        expected.backward(nchw(cotangent))
    assert relative(images, nhwc(expected)) < 1e-5
    assert relative(gradient, nhwc(z.grad)) < 1e-5
