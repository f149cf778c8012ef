"""Five small networks on images [1, 8, 8], of the kinds of network that the paper quantizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inq_kernels.demo.train import digits_net


def lenet_300_100() -> nn.Sequential:
    """Three Linear layers, as in LeCun et al. 1998, on 64 pixels: 50,200 weights."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(64, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
        )
    )


def lenet_5() -> nn.Sequential:
    """Caffe's LeNet-5 (20 and 50 filters of 5×5, 500 hidden units), padded, since digits have 8×8 pixels: 130,500
    weights, most of them in a Linear layer, and no batch norm, as in AlexNet."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5, padding=2),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5, padding=2),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(200, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size of the image but for ``stride``, and its batch norm."""
    return [nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)]


class Inception(nn.Module):
    """Convolutions of 1×1, 3×3, 5×5 and a pool side by side: a module of GoogLeNet."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int):
        super().__init__()
        self.one = nn.Sequential(*_conv(inputs, one, 1))
        self.three = nn.Sequential(*_conv(inputs, three[0], 1), nn.ReLU(), *_conv(*three, 3))
        self.five = nn.Sequential(*_conv(inputs, five[0], 1), nn.ReLU(), *_conv(*five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_conv(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1).relu()


def inception() -> nn.Sequential:
    """A module of GoogLeNet, and the mean over the image in place of large Linear layers."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_conv(1, 16), nn.ReLU(), nn.MaxPool2d(2)),
            inception=Inception(16, 32, (32, 64), (16, 32), 32),
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(160, 10),
        )
    )


class Residual(nn.Module):
    """Two 3×3 convolutions beside the identity, or beside a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*_conv(inputs, outputs, 3, stride), nn.ReLU(), *_conv(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def resnet() -> nn.Sequential:
    """Three residual blocks, the mean over the image and one Linear layer."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_conv(1, 16), nn.ReLU()),
            block1=Residual(16, 16, 1),
            block2=Residual(16, 32, 2),
            block3=Residual(32, 64, 2),
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, 10),
        )
    )


@dataclass(frozen=True)
class Network:
    """A kind of network: how it is made, what it is called, those of the paper that it stands for, and whether T5
    prunes it: those with most weights in Linear layers, as AlexNet has, and the demo's."""

    build: Callable[[], nn.Module]
    title: str
    of_paper: tuple[str, ...] = ()
    pruned: bool = False


NETWORKS = {
    "lenet-300-100": Network(lenet_300_100, "LeNet-300-100", pruned=True),
    "lenet-5": Network(lenet_5, "LeNet-5-shaped", ("AlexNet",), pruned=True),
    "digits-cnn": Network(digits_net, "digits CNN, VGG-like", ("VGG-16",), pruned=True),
    "inception": Network(inception, "GoogLeNet-like", ("GoogLeNet",)),
    "resnet": Network(resnet, "ResNet-like", ("ResNet-18", "ResNet-50")),
}
