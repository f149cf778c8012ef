"""What several test files need: the formats and dtypes there are, and packed weights to multiply with."""

import pytest
import torch

import inq_kernels as inq
from inq_kernels.format import BITS, LEVELS

FORMATS = [inq.Format(bits, levels) for bits in BITS for levels in LEVELS]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# torch.compile uses what torch itself deprecates (torch.jit.script_method, autograd.Function()).
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a, b):
    """Equal in dtype, shape and every bit: 0 and −0 differ, a NaN equals itself."""
    return a.dtype == b.dtype and torch.equal(a.view(_INTS[a.element_size()]), b.view(_INTS[b.element_size()]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_packed(fmt, *shape, n1=None, scale=False, seed=0):
    """Random codes of every level, and by default n1 that differs from row to row; ``scale``: a row scale too."""
    g = generator(seed)
    n = shape[0]
    if n1 is None:
        n1 = torch.randint(-8, 3, (n, 1), generator=g)
    n1 = torch.as_tensor(n1).expand(n, 1).to(torch.int8).contiguous()
    # −1 is zero; 0 … magnitudes−1 are octaves below n1. Levels under 2^-126 do not exist.
    octave = torch.randint(-1, fmt.magnitudes, shape, generator=g)
    level = n1.double().view(-1, *[1] * (len(shape) - 1)) - octave
    sign = torch.randint(0, 2, shape, generator=g) * 2 - 1
    w = torch.where((octave < 0) | (level < -126), 0.0, sign * torch.exp2(level))
    packed = inq.pack(w, fmt, n1)
    if not scale:
        return packed
    row_scale = torch.rand(n, 1, generator=g) + 0.5
    # One row is negative, as a batch norm with a negative weight makes it.
    row_scale[0] *= -1
    return inq.PackedWeight(packed.weight, packed.weight_exp, row_scale, fmt, packed.shape)


def assert_as_good_as_dense(y, exact, dense, unit):
    """Against ``exact`` (float64): the error is at most twice that of torch's product in y's dtype plus one rounding.

    ``unit`` is the size of one output channel's weights, broadcast: errors are compared in it over the whole tensor, so
    that a channel of large weights hides no error of a channel of small ones.
    """
    assert y.dtype == dense.dtype
    assert y.shape == exact.shape
    finfo = torch.finfo(y.dtype)
    # Half a unit in the last place, or half of the smallest subnormal.
    rounding = (exact.abs() * finfo.eps / 2).clamp(min=finfo.smallest_normal * finfo.eps / 2)
    error = (y.double() - exact).abs()
    allowed = 2 * ((dense.double() - exact).abs() / unit).amax() * unit if y.numel() else 0
    assert bool((error <= allowed + rounding).all()), f"{float((error - allowed - rounding).max())} too much"


def plain(packed):
    """The same weight without its row scale."""
    return inq.PackedWeight(packed.weight, packed.weight_exp, None, packed.format, packed.shape)


def integer_case(fmt, k, x_shape, dtype, seed=0):
    """x of integers so small that max|x|·2^(magnitudes−1)·K ≤ 2^24, and that ``dtype`` holds them exactly."""
    largest = min(2**24 // (2 ** (fmt.magnitudes - 1) * k), 256)
    assert largest > 0
    return torch.randint(-largest, largest + 1, x_shape, generator=generator(seed)).to(dtype)


def integer_weight(packed):
    """(w, n2): the weights as int64 in units of 2^n2 of their row."""
    n2 = packed.weight_exp.long() + 1 - packed.format.magnitudes
    w = inq.unpack(plain(packed), torch.float64)
    return (w * torch.exp2(-n2.double()).view(-1, *[1] * (w.dim() - 1))).long(), n2.view(-1)
