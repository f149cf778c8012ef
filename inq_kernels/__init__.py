"""Incremental Network Quantization: lossless power-of-two weights at 2 to 5 bits, packed, as torch operators."""

from .format import Format
from .ops import PackedWeight, conv2d, exponents, linear, pack, quantize, quantize_with_mask, unpack

__version__ = "0.1.0"

__all__ = [
    "Format",
    "PackedWeight",
    "conv2d",
    "exponents",
    "linear",
    "pack",
    "quantize",
    "quantize_with_mask",
    "unpack",
]
