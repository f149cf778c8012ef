"""What several test files need: the formats and dtypes there are, packed weights to multiply with, and weights and
masks to freeze."""

import pytest
import torch

import inq_kernels as inq
from inq_kernels.format import BITS, LEVELS
from inq_kernels.reference import pack_bits, unpack_bits

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
    return inq.PackedWeight(packed.weight, packed.weight_exp, None, packed.format, packed.shape, packed.layout)


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


def exact_product(x, packed, bias=None):
    """x · Wᵀ by the definition for integer x [..., K]: the sum in integers, which float32 must hold; row scale, bias
    and dtype each round once."""
    w, n2 = integer_weight(packed)
    y = ((x.long() @ w.T).double() * torch.exp2(n2.double())).float()
    if packed.weight_scale is not None:
        y = y * packed.weight_scale.view(-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- what is frozen ---------------------------------------------------------------------------------------------------

# Masks of random_masks: nothing frozen or pruned, half frozen, all frozen, some pruned, both.
WHICH = ("none", "half", "all", "keep", "both")


def bits_to_weights(bits, dtype):
    """Random int64 as finite weights of any bits, of a dtype of 32 or 16 bits."""
    if dtype == torch.float32:
        bits = torch.where((bits & 0x7F800000) == 0x7F800000, bits & ~0x800000, bits)
        return bits.to(torch.int32).view(torch.float32)
    top = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    bits = torch.where((bits & top) == top, bits & ~(top & -top), bits)
    return bits.to(torch.int16).view(dtype)


def kinds(shape, dtype, seed=0):
    """What a kernel may be wrong at: weights by the name of what they are."""
    g = generator(seed)
    n = torch.randn(shape, generator=g)
    choice = torch.randint(0, 6, shape, generator=g)
    power = torch.randint(-12, 1, shape, generator=g)
    values = torch.tensor([0.0, -0.0, 0.75, 1.5, -1.0, 1.25])[choice] * torch.exp2(power.float())
    small, large = (2.0**-20, 2.0**13) if dtype == torch.float16 else (2.0**-127, 2.0**124)
    given = {
        "normal": n * 0.02,
        "few values": values,
        "edges of bins": torch.nextafter(values, torch.tensor(0.0)),
        "equal": torch.full(shape, -0.3),
        "zeros": n * 0,
        "subnormal": n * small,
        "small": n * small * 2**15,
        "large": n.clamp(-7.9, 7.9) * large,
    }
    given = {name: w.to(dtype) for name, w in given.items()}
    given["any"] = bits_to_weights(torch.randint(-(1 << 31), 1 << 31, shape, generator=g), dtype)
    # The lowest bits alone: float32's least subnormals, and all of float16's.
    given["least"] = bits_to_weights(torch.randint(0, 1 << 9, shape, generator=g), dtype)
    return given


def random_masks(numel, which, seed=0):
    """(mask, keep) of one of WHICH: frozen weights are kept ones, and bits after the last weight mean nothing."""
    g = generator(seed)
    held, kept = torch.rand(numel, generator=g) < 0.4, torch.rand(numel, generator=g) < 0.7
    none = torch.zeros((numel + 7) // 8, dtype=torch.uint8)
    mask, keep = {
        "none": (none, None),
        "half": (pack_bits(held), None),
        "all": (pack_bits(held | True), None),
        "keep": (none, pack_bits(kept)),
        "both": (pack_bits(held & kept), pack_bits(kept)),
    }[which]
    if keep is not None and numel % 8:
        keep[-1] |= 0x80
        mask[-1] |= 0x80
    return mask, keep


def candidates(mask, keep, numel):
    """How many of ``numel`` weights are neither frozen nor pruned."""
    free = ~unpack_bits(mask, (numel,))
    return int((free if keep is None else free & unpack_bits(keep, (numel,))).sum())
