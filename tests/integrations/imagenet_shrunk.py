"""examples/imagenet.py on torchvision's own networks, an eighth as wide, and small crops:
``python tests/integrations/imagenet_shrunk.py ARGUMENTS…``"""

import sys

import torch
from imagenet_tiny import load
from torch import nn

EIGHTH = 8


def shrunk(model, classes):
    """``model``, which may be on the meta device, with an eighth of the channels everywhere, and new weights."""

    def eighth(channels, kept):
        return channels if channels == kept else channels // EIGHTH

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            bias = module.bias is not None
            new = nn.Conv2d(eighth(module.in_channels, 3), module.out_channels // EIGHTH, module.kernel_size,
                            module.stride, module.padding, module.dilation, bias=bias)  # fmt: skip
        elif isinstance(module, nn.Linear):
            new = nn.Linear(module.in_features // EIGHTH, eighth(module.out_features, classes))
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(module.num_features // EIGHTH, module.eps)
        else:
            continue
        model.set_submodule(name, new)
    return model


def example():
    """The example with these."""
    module = load()
    whole = module.network

    def network(name, weights, classes):
        with torch.device("meta"):
            model = whole(name, "none", classes)
        return shrunk(model, classes)

    module.network, module.RESIZE, module.CROP = network, 72, 64
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    example().main(sys.argv[1:])
