"""Bicubic resizing, compared with PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_oracle import nchw, nhwc

from nabla_gfn_jax.models.resize import resize


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(24, 24), (17, 40), (7, 9), (33, 21)])
def test_values_and_gradient(antialias, size):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 33, 21, 3)).astype(np.float32)
    cotangent = rng.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.enable_grad():
        x = nchw(images).requires_grad_()
        y = torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=False, antialias=antialias)
        y.backward(nchw(cotangent))
    ours, pull = jax.vjp(lambda x: resize(x, *size, antialias=antialias), jnp.asarray(images))
    np.testing.assert_allclose(ours, nhwc(y), atol=2e-6)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], nhwc(x.grad), atol=1e-5)


def test_from_512_to_224():
    """Here PyTorch's rounding of positions matters most: exact positions differ by 1e-5."""
    images = np.random.default_rng(0).uniform(size=(1, 512, 512, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(nchw(images), (224, 224), mode="bicubic", antialias=True)
    np.testing.assert_allclose(resize(images, 224, 224, antialias=True), nhwc(expected), atol=2e-6)
