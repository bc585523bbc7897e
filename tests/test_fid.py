"""Inception-v3 at full size with random weights, against pytorch-fid's network in PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from inception_oracle import Inception
from torch_oracle import compile_quickly, nchw, nhwc, relative

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics import fid
from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.metrics.fid import FID
from nabla_gfn_jax.models import inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """PyTorch's network with random weights of the full size, and the file of its weights."""
    file = tmp_path_factory.mktemp("fid") / fid.FILE
    network = Inception()
    torch.save(network.state_dict(), file)
    return network, file


@pytest.mark.thorough
def test_features_are_pytorch_fids(weights):
    network, file = weights
    images = np.random.default_rng(0).uniform(size=(2, 320, 400, 3)).astype(np.float32)
    params = fid.load(file)
    found = compile_quickly(fid.inception_features, params, images)(params, images)
    expected = network(nchw(images)).numpy()
    assert relative(found, expected) < 1e-4
    assert relative(found[0] - found[1], expected[0] - expected[1]) < 1e-4  # and not only what all images share


@pytest.mark.parametrize("size", [(64, 64), (320, 400), (299, 299)])
def test_images_are_stretched_as_in_pytorch(size):
    images = np.random.default_rng(0).uniform(size=(1, *size, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(nchw(images), (299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(inception.stretched(images), nhwc(expected), atol=2e-5)


def test_batches_of_any_size_make_the_features(monkeypatch):
    """With the mean colours instead of the network. The images are seen as in a file."""
    monkeypatch.setattr(fid, "inception_features", lambda params, images: params * images.mean(axis=(1, 2)))
    images = np.random.default_rng(0).uniform(-0.1, 1.1, (11, 32, 32, 3)).astype(np.float32)
    metric, prompt = FID(jnp.float32(2.0)), np.arange(11) % 2
    parts = [metric.update(Batch(images[part], prompt[part])) for part in (slice(9), slice(9, 11))]
    state = parts[0].merge(parts[1])
    saved = np.round(images.clip(0, 1) * 255) / 255
    np.testing.assert_allclose(state.values["features"], 2 * saved.mean(axis=(1, 2)), rtol=1e-5)
    assert state.prompt.tolist() == prompt.tolist()
    assert metric.compare(state, state)["fid_pooled"].value == pytest.approx(0.0, abs=1e-6)


def test_another_network_is_named(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not match pytorch-fid's Inception-v3: .* is missing"):
        fid.load(tmp_path / "other.pth")
