"""pytorch-fid's Inception-v3 in PyTorch, block by block, for comparison and for writing files in its layout.

The package itself needs torchvision, whose wheels do not fit every build of PyTorch. This network was compared with
the package's: with the same weights, the features are equal to the last bit.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Unit(nn.Module):
    def __init__(self, inputs, outputs, **how):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **how)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def mean(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def halved(x):
    return F.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    def __init__(self, inputs, pooled):
        super().__init__()
        self.branch1x1 = Unit(inputs, 64, kernel_size=1)
        self.branch5x5_1 = Unit(inputs, 48, kernel_size=1)
        self.branch5x5_2 = Unit(48, 64, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = Unit(inputs, 64, kernel_size=1)
        self.branch3x3dbl_2 = Unit(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, kernel_size=3, padding=1)
        self.branch_pool = Unit(inputs, pooled, kernel_size=1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(mean(x))], 1)


class BlockB(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.branch3x3 = Unit(inputs, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = Unit(inputs, 64, kernel_size=1)
        self.branch3x3dbl_2 = Unit(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, kernel_size=3, stride=2)

    def forward(self, x):
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, halved(x)], 1)


class BlockC(nn.Module):
    def __init__(self, width):
        super().__init__()
        row, column = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Unit(768, 192, kernel_size=1)
        self.branch7x7_1 = Unit(768, width, kernel_size=1)
        self.branch7x7_2 = Unit(width, width, **row)
        self.branch7x7_3 = Unit(width, 192, **column)
        self.branch7x7dbl_1 = Unit(768, width, kernel_size=1)
        self.branch7x7dbl_2 = Unit(width, width, **column)
        self.branch7x7dbl_3 = Unit(width, width, **row)
        self.branch7x7dbl_4 = Unit(width, width, **column)
        self.branch7x7dbl_5 = Unit(width, 192, **row)
        self.branch_pool = Unit(768, 192, kernel_size=1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for i in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{i}")(double)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean(x))], 1)


class BlockD(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, kernel_size=1)
        self.branch3x3_2 = Unit(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, kernel_size=1)
        self.branch7x7x3_2 = Unit(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, kernel_size=3, stride=2)

    def forward(self, x):
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, halved(x)], 1)


class BlockE(nn.Module):
    def __init__(self, inputs, pool):
        super().__init__()
        row, column = {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1 = Unit(inputs, 320, kernel_size=1)
        self.branch3x3_1 = Unit(inputs, 384, kernel_size=1)
        self.branch3x3_2a = Unit(384, 384, **row)
        self.branch3x3_2b = Unit(384, 384, **column)
        self.branch3x3dbl_1 = Unit(inputs, 448, kernel_size=1)
        self.branch3x3dbl_2 = Unit(448, 384, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, **row)
        self.branch3x3dbl_3b = Unit(384, 384, **column)
        self.branch_pool = Unit(inputs, 192, kernel_size=1)

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        results = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        results += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(results, 1)


class Inception(nn.Module):
    """Images in [0, 1] (B, 3, height, width) → features (B, 2048), with random weights."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.Conv2d_1a_3x3 = Unit(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = Unit(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = Unit(80, 192, kernel_size=3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(n) for n in (128, 160, 160, 192))
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, mean)
        self.Mixed_7c = BlockE(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)
        self.make_random()
        self.eval()

    @torch.no_grad()
    def make_random(self):
        """Weights for which every layer's output depends on the image and stays of the order of 1."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0.0, (2.0 / module.weight[0].numel()) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0.0, 0.2)
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 1.5)

    @torch.no_grad()
    def forward(self, images):
        x = 2.0 * F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) - 1.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halved(x))))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))
