"""Incremental Network Quantization: lossless power-of-two weights at 2 to 5 bits, packed, as torch operators."""

from . import optim
from .calibrate import CalibrateReport, calibrate
from .checkpoint import load, save
from .distributed import PeerError
from .dns import DNS, DNS_PORTIONS
from .files import CheckpointError
from .format import Format
from .inq import INQ, PAPER_PORTIONS
from .nn import Conv2d, ConvertReport, Linear, convert, fold_batchnorm, prepack
from .ops import PackedWeight, conv2d, exponents, linear, pack, quantize, quantize_with_mask, unpack
from .sharded import load_sharded, save_sharded
from .training import load_training, save_training

__version__ = "0.1.0"

__all__ = [
    "DNS",
    "DNS_PORTIONS",
    "INQ",
    "PAPER_PORTIONS",
    "CalibrateReport",
    "CheckpointError",
    "Conv2d",
    "ConvertReport",
    "Format",
    "Linear",
    "PackedWeight",
    "PeerError",
    "calibrate",
    "conv2d",
    "convert",
    "exponents",
    "fold_batchnorm",
    "linear",
    "load",
    "load_sharded",
    "load_training",
    "optim",
    "pack",
    "prepack",
    "quantize",
    "quantize_with_mask",
    "save",
    "save_sharded",
    "save_training",
    "unpack",
]
