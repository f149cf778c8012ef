"""The definition of every operator, in plain torch, for any floating dtype and device. Slow and short on purpose.

Conventions: N output rows (dimension 0), K = all other dimensions flattened; ``n1`` is int8 [N, 1]; masks of weights
are one bit each, uint8 [ceil(numel/8)], bit i%8 of byte i//8 for flat index i. "paper" is the INQ paper,
arXiv 1702.03044; equation numbers are its.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import (
    MSE_OCTAVES,
    N1_MAX,
    N1_MAX_FLOAT16,
    N1_MIN,
    N1_MIN_FLOAT16,
    N1_ZERO_ROW,
    Format,
)

# Elements handled at once where int64 temporaries would otherwise multiply the memory of a large weight.
CHUNK = 1 << 22


def exponent_limits(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest n1 for weights of ``dtype``."""
    return (N1_MIN_FLOAT16, N1_MAX_FLOAT16) if dtype == torch.float16 else (N1_MIN, N1_MAX)


# --- quantization -----------------------------------------------------------------------------------------------------


def _frexp(w: Tensor) -> tuple[Tensor, Tensor]:
    """|w| = m·2^e with 0.5 ≤ m < 1 (0 for 0), e in int32; m in float32, or float64 for float64."""
    wide = w.detach() if w.dtype == torch.float64 else w.detach().float()
    m, e = torch.frexp(wide.abs())
    return m, e


def _max_rule(m: Tensor, e: Tensor) -> Tensor:
    """The power of two nearest to m·2^e, ties up: n1 of equation (2) for max|W|, by frexp instead of a logarithm."""
    return torch.where(m >= 0.75, e, e - 1)


def max_exponents(largest: Tensor) -> Tensor:
    """The ``max`` rule's n1, int64, not clamped, for each largest |w|."""
    return _max_rule(*_frexp(largest)).long()


def _mse_rule(rows: Tensor, base: Tensor, lo: int, hi: int, fmt: Format) -> Tensor:
    """The n1 with the least squared error for each row of ``rows`` [R, K], given ``base`` [R], the ``max`` rule's n1.

    The error of every candidate follows exactly from one histogram with two bins an octave, split at 0.75·2^e:
    within a bin all weights quantize alike, so Σ(|w| − q)² = Σw² + Σ(count·q² − 2q·Σ|w|). Σ|w| of a bin is an integer
    sum of mantissas, so ties are exact and do not depend on the order of summation. Ties go to the larger n1.
    """
    top, floor, bins = mse_bins(base, lo, hi, fmt)
    return mse_choice(mse_histogram(rows, floor, bins), top, floor, lo, fmt, rows.dtype)


def mse_bins(base: Tensor, lo: int, hi: int, fmt: Format) -> tuple[Tensor, Tensor, int]:
    """For ``_mse_rule``: each row's largest candidate and the octave of its first bin, and how many bins a row has."""
    top = base.clamp(lo, hi)
    # Below the smallest level of the smallest candidate every weight is 0 for all of them and adds nothing.
    floor = (top - MSE_OCTAVES).clamp(min=lo) - fmt.magnitudes
    octaves = max(int((base - floor).max()), 0) + 2
    return top, floor, octaves * 2


def mantissa_bits(dtype: torch.dtype) -> int:
    """The bits of the integers that ``mse_histogram`` sums up."""
    return 53 if dtype == torch.float64 else 24


def mse_histogram(rows: Tensor, floor: Tensor, bins: int) -> Tensor:
    """int64 [3, R, bins] of ``rows`` [R, K]: the weights in each bin, and the low and high parts of the sum of their
    mantissas, which are integers. Histograms of parts of a row add up to that of the whole, on any number of ranks."""
    m_bits = mantissa_bits(rows.dtype)
    flat, k = rows.reshape(-1), rows.shape[1]
    counts = torch.zeros(rows.shape[0] * bins, dtype=torch.int64, device=rows.device)
    sums_lo, sums_hi = torch.zeros_like(counts), torch.zeros_like(counts)
    for start in range(0, flat.numel(), CHUNK):
        m, e = _frexp(flat[start : start + CHUNK])
        row = torch.arange(start, start + m.numel(), device=rows.device) // k
        octave = e.long() - floor[row]
        keep = (m > 0) & (octave >= 0)
        m, row, octave = m[keep], row[keep], octave[keep]
        where = row * bins + octave * 2 + (m >= 0.75)
        mantissa = (m.double() * 2.0**m_bits).long()
        counts += torch.bincount(where, minlength=counts.numel())
        # Two halves, so that the int64 sums of float64's 53-bit mantissas hold for more than 2^33 weights.
        sums_lo.scatter_add_(0, where, mantissa & 0x3FFFFFF)
        sums_hi.scatter_add_(0, where, mantissa >> 26)
    return torch.stack([counts, sums_lo, sums_hi]).view(3, -1, bins)


def mse_choice(histogram: Tensor, top: Tensor, floor: Tensor, lo: int, fmt: Format, dtype: torch.dtype) -> Tensor:
    """n1 of each row, int64 [R], from the ``mse_histogram`` of weights of ``dtype``."""
    m_bits = mantissa_bits(dtype)
    n1 = []
    for top_r, floor_r, count_r, lo_r, hi_r in zip(top.tolist(), floor.tolist(), *histogram.tolist(), strict=True):
        bins = [
            (b // 2 + floor_r, b % 2, count, (high << 26) + low)
            for b, (count, low, high) in enumerate(zip(count_r, lo_r, hi_r, strict=True))
            if count
        ]
        best = None
        for candidate in range(top_r, max(top_r - MSE_OCTAVES, lo) - 1, -1):
            # In units of 2^(2·floor − m_bits) everything is a Python integer, and exact.
            score = 0
            for e, half, count, total in bins:
                level = _bin_level(e, half, candidate, lo, fmt)
                if level is not None:
                    score += (count << 2 * (level - floor_r) + m_bits) - (total << level - floor_r + e - floor_r + 1)
            if best is None or score < best[0]:
                best = (score, candidate)
        n1.append(best[1])
    return torch.tensor(n1, dtype=torch.int64, device=top.device)


def _bin_level(e: int, half: int, n1: int, lo: int, fmt: Format) -> int | None:
    """The power that [0.5, 0.75)·2^e (half 0) or [0.75, 1)·2^e (half 1) quantizes to, or None for 0."""
    n2 = fmt.n2(n1)
    level = min(e if half else e - 1, n1)
    if level < n2:
        level = n2 if (e == n2 and not half) else lo - 1
    return level if level >= lo else None


def exponents(w: Tensor, fmt: Format) -> Tensor:
    """n1 of each row of ``w`` (any float dtype, rank ≥ 1, finite): int8 [N, 1], by ``fmt.exponent``.

    ``max``: equation (2), n1 = floor(log2(4s/3)) for s = max|W|, through frexp. Clamped to ``exponent_limits``.
    """
    lo, hi = exponent_limits(w.dtype)
    rows = w.detach().reshape(1 if fmt.granularity == "tensor" else w.shape[0], -1)
    largest = rows.abs().amax(dim=1)
    n1 = max_exponents(largest)
    if fmt.exponent == "mse":
        n1 = _mse_rule(rows, n1, lo, hi, fmt)
    n1 = torch.where(largest == 0, N1_ZERO_ROW, n1.clamp(lo, hi))
    return n1.to(torch.int8).reshape(-1, 1).expand(w.shape[0], 1).contiguous()


def _rows(n1: Tensor, w: Tensor) -> Tensor:
    """n1 [N, 1] as int64, shaped to broadcast against ``w``."""
    return n1.to(torch.int64).reshape(-1, *[1] * (w.dim() - 1))


def _levels(w: Tensor, n1: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Equation (4): for each weight the exponent k of its value ±2^k, and whether it is nonzero at all."""
    m, e = _frexp(w)
    e = e.long()
    top = _rows(n1, w)
    bottom = fmt.n2(top)
    # Saturating instead of the literal 0 of (4) for |w| ≥ 1.5·2^n1, which n1 fixed earlier makes possible.
    level = torch.minimum(_max_rule(m, e), top)
    # The smallest level's bin is [2^(n2−1), 1.5·2^n2): it reaches down to half its value.
    level = torch.where((e == bottom) & (m < 0.75), bottom, level)
    nonzero = (m > 0) & (level >= bottom) & (level >= exponent_limits(w.dtype)[0])
    return level, nonzero


def _power(level: Tensor) -> Tensor:
    """2^level in float64, from its bits: exact for −1022 ≤ level ≤ 1023."""
    return ((level + 1023) << 52).view(torch.float64)


def quantize(w: Tensor, n1: Tensor, fmt: Format) -> Tensor:
    """Equation (4): ``w`` with every value replaced by 0 or ±2^k, n2 ≤ k ≤ n1; same shape and dtype. 0 is +0."""
    level, nonzero = _levels(w, n1, fmt)
    value = torch.where(w < 0, -_power(level), _power(level))
    return torch.where(nonzero, value, 0.0).to(w.dtype)


# --- masks of one bit a weight ----------------------------------------------------------------------------------------


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as one bit an element: uint8 [ceil(numel/8)], little-endian bits in flat order."""
    flat = F.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``pack_bits``: bool of ``shape``."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    numel = 1
    for size in shape:
        numel *= size
    return flat.reshape(-1)[:numel].bool().reshape(shape)


# --- partition and freezing -------------------------------------------------------------------------------------------


def random_keys(numel: int, seed: int, device: torch.device) -> Tensor:
    """31-bit ranks for the random partition: splitmix64 of (seed, flat index), the same on every backend and rank."""
    z = torch.arange(1, numel + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # int64 shifts are arithmetic; the mask makes them logical. Products wrap modulo 2^64, as in C.
        z = (z ^ (z >> shift & (1 << (64 - shift)) - 1)) * factor
    z = z ^ (z >> 31 & (1 << 33) - 1)
    return z >> 33 & 0x7FFFFFFF


def seed_at(seed: int, first: int) -> int:
    """The seed that gives flat index 0, 1, … the ranks of ``first``, ``first`` + 1, … under ``seed``: for a part of a
    weight that begins there."""
    shifted = (seed + first * 0x9E3779B97F4A7C15) % (1 << 64)
    return shifted - (1 << 64) if shifted >= 1 << 63 else shifted


_SAME_SIZE_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def partition_keys(w: Tensor, random: bool, seed: int) -> Tensor:
    """int64 ranks in flat order, largest first to be frozen: the bits of |w|, whose order is that of |w|, or random."""
    if random:
        return random_keys(w.numel(), seed, w.device)
    flat = w.detach().abs().reshape(-1)
    return flat.view(_SAME_SIZE_INT[w.element_size()]).to(torch.int64)


def from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The |w| of ``dtype`` whose bits ``keys`` are: the inverse of ``partition_keys``."""
    return keys.to(_SAME_SIZE_INT[dtype.itemsize]).view(dtype)


def partition_threshold(
    w: Tensor, mask: Tensor, keep: Tensor | None, count: int, random: bool = False, seed: int = 0
) -> Tensor:
    """The key of the ``count``-th weight to freeze next, and how many weights with just that key to take.

    Among the weights that ``mask`` does not hold and ``keep`` (where given) does: int64 [2] = (key, ties). Those with a
    larger key are frozen, and the first ``ties`` in flat order of those with the same key. ``count`` 0 selects none.
    """
    candidates = ~unpack_bits(mask, (w.numel(),))
    if keep is not None:
        candidates &= unpack_bits(keep, (w.numel(),))
    keys = partition_keys(w, random, seed)[candidates]
    if not 0 <= count <= keys.numel():
        raise ValueError(f"partition_threshold: count: expected 0 to {keys.numel()} unfrozen weights, got {count}")
    if count == 0:
        return torch.tensor([torch.iinfo(torch.int64).max, 0], device=w.device)
    key = torch.kthvalue(keys, keys.numel() - count + 1).values
    return torch.stack([key, count - (keys > key).sum()])


def exponents_and_threshold(
    w: Tensor, mask: Tensor, keep: Tensor | None, count: int, random: bool, seed: int, fmt: Format
) -> tuple[Tensor, Tensor]:
    """``exponents`` of all of ``w`` and ``partition_threshold``: kernels count both in one pass. Where ``keep`` is
    given, the weights that it drops must be 0 already."""
    return exponents(w, fmt), partition_threshold(w, mask, keep, count, random, seed)


def quantize_with_mask_(
    w: Tensor,
    mask: Tensor,
    n1: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    fmt: Format,
    random: bool = False,
    seed: int = 0,
) -> None:
    """Freeze what ``threshold`` selects: quantize it in ``w`` by equation (4), set its bits in ``mask``.

    Frozen weights are not touched again, and ``mask`` only grows. Where ``keep`` is given, the others become +0.
    """
    frozen = unpack_bits(mask, (w.numel(),))
    candidates = ~frozen
    if keep is not None:
        kept = unpack_bits(keep, (w.numel(),))
        candidates &= kept
    keys = partition_keys(w, random, seed)
    key, ties = threshold[0], threshold[1]
    tied = candidates & (keys == key)
    chosen = (candidates & (keys > key)) | (tied & (tied.cumsum(0) <= ties))
    shaped = chosen.reshape(w.shape)
    new = torch.where(shaped, quantize(w, n1, fmt), w)
    if keep is not None:
        new = torch.where(kept.reshape(w.shape), new, 0.0)
    w.copy_(new)
    mask.copy_(pack_bits(frozen | chosen))


def freeze_portion_(
    ws: Sequence[Tensor],
    masks: Sequence[Tensor],
    n1s: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    counts: Sequence[int],
    derive: bool,
    fmt: Format,
    random: bool,
    seeds: Sequence[int],
) -> None:
    """``partition_threshold`` and ``quantize_with_mask_`` of several weights of one dtype on one device.

    ``counts``: how many more to freeze of each; ``seeds``: of each one's ranks, where ``random``. With ``derive``,
    ``n1s`` are written first, by ``exponents``; what ``keeps`` drops must be 0 already.
    """
    for w, mask, n1, keep, count, seed in zip(ws, masks, n1s, keeps, counts, seeds, strict=True):
        threshold = partition_threshold(w, mask, keep, count, random, seed)
        if derive:
            n1.copy_(exponents(w, fmt))
        quantize_with_mask_(w, mask, n1, threshold, keep, fmt, random, seed)


# --- the storage layout -----------------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] as one little-endian bit stream a row: uint8 [N, ceil(K/8)·bits], padded with zero codes."""
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % 8)).view(n, -1, 8).to(torch.int64)
    # Eight codes are exactly ``bits`` bytes, so a group of eight never straddles a byte of its neighbour.
    word = (codes << torch.arange(8, device=codes.device) * bits).sum(dim=2, keepdim=True)
    return (word >> torch.arange(bits, device=codes.device) * 8 & 0xFF).to(torch.uint8).view(n, -1)


def unpack_codes(weight: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of ``pack_codes``: uint8 codes [N, k]."""
    n = weight.shape[0]
    groups = weight.view(n, -1, bits).to(torch.int64)
    word = (groups << torch.arange(bits, device=weight.device) * 8).sum(dim=2, keepdim=True)
    codes = word >> torch.arange(8, device=weight.device) * bits & (1 << bits) - 1
    return codes.to(torch.uint8).view(n, -1)[:, :k]


def not_representable(w: Tensor, n1: Tensor, fmt: Format) -> int:
    """How many values of ``w`` are not exactly 0 or ±2^k with n2 ≤ k ≤ n1."""
    return int((quantize(w, n1, fmt) != w).sum())


def pack(w: Tensor, n1: Tensor, fmt: Format) -> Tensor:
    """The codes of the quantized weights ``w`` in the storage layout. Values must be representable."""
    level, nonzero = _levels(w, n1, fmt)
    index = (level - fmt.n2(_rows(n1, w))).clamp(0, fmt.magnitudes - 1)
    field = torch.tensor(fmt.fields, dtype=torch.uint8, device=w.device)[index]
    code = torch.where(nonzero, field | ((w < 0).to(torch.uint8) << (fmt.bits - 1)), 0)
    return pack_codes(code.reshape(w.shape[0], -1), fmt.bits)


def relative_values(weight: Tensor, k: int, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Decoded weights divided by 2^n1 of their row: 0 or ±2^-j, 0 ≤ j < magnitudes; [N, k] of ``dtype``.

    Every product is formed with these and the row's 2^n1 is applied to the sum, as the kernels do.
    """
    table = [0.0] * (1 << fmt.bits)
    for code, level in enumerate(fmt.code_levels):
        if level is not None and level <= 0:
            table[code] = -(2.0**level) if code >> (fmt.bits - 1) else 2.0**level
    return torch.tensor(table, dtype=dtype, device=weight.device)[unpack_codes(weight, fmt.bits, k).int()]


def unpack(
    weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None, k: int, fmt: Format, dtype: torch.dtype
) -> Tensor:
    """Decoded weights [N, k] of ``dtype``, times the row scale where there is one."""
    value = relative_values(weight, k, fmt, torch.float64) * _power(weight_exp.long())
    if weight_scale is not None:
        value = value * weight_scale.double()
    # + 0.0: a zero code under a negative row scale is +0, as everywhere.
    return (value + 0.0).to(dtype)


def unpack_(out: Tensor, weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None, k: int, fmt: Format) -> None:
    """``unpack`` into ``out``, of as many elements, in its dtype."""
    out.copy_(unpack(weight, weight_exp, weight_scale, k, fmt, out.dtype).reshape(out.shape))


def invalid_codes(weight: Tensor, weight_exp: Tensor, k: int, fmt: Format) -> int:
    """How many codes (padding included) are not canonical: a reserved code, padding that is not zero, or a level
    under the least exponent, which no quantizer writes."""
    codes = unpack_codes(weight, fmt.bits, weight.shape[1] // fmt.bits * 8).int()
    lowest = fmt.magnitudes  # above every level: marks reserved codes
    table = torch.tensor([-lowest if v is None else v for v in fmt.code_levels], device=weight.device)
    level = table[codes]
    bad = (level == -lowest) | ((level <= 0) & (level + weight_exp.long() < N1_MIN))
    bad[:, k:] = codes[:, k:] != 0
    return int(bad.sum())


# --- products ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ieee_products(device: torch.device) -> Iterator[None]:
    """float32 products in IEEE float32, whatever TF32 or bfloat16 shortcuts the user allowed for the dense network.

    Autocast is one of them: it reaches into operators, and would round the sums before the epilogue. cuDNN is another:
    its transformed convolutions (Winograd, FFT) are not exact where sums are, and some of its gradients differ from run
    to run.
    """
    settings = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    if torch.backends.cuda.is_built():
        settings += [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before, cudnn = [s.fp32_precision for s in settings], torch.backends.cudnn.enabled
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        if device.type == "cuda":
            torch.backends.cudnn.enabled = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for s, precision in zip(settings, before, strict=True):
            s.fp32_precision = precision
        torch.backends.cudnn.enabled = cudnn


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums are in float32; in float64 for float64, so that gradcheck and the error bounds have something exact."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_factors(weight_exp: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The epilogue's factors, each [N]. Two, not their product: 2^n1 · scale alone may overflow."""
    factors = [_power(weight_exp.long()).to(dtype).reshape(-1)]
    if weight_scale is not None:
        factors.append(weight_scale.to(dtype).reshape(-1))
    return factors


def linear(
    x: Tensor, weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None, bias: Tensor | None, fmt: Format
) -> Tensor:
    """y = (x · decode(W)ᵀ) · row factors + bias for x [..., K]: [..., N] in x's dtype, rounded once at the end."""
    acc = _accumulator(x.dtype)
    with _ieee_products(x.device):
        # contiguous: the library sums in another order for other strides, and equal values shall give equal bits.
        y = F.linear(x.to(acc).contiguous(), relative_values(weight, x.shape[-1], fmt, acc))
    for factor in _row_factors(weight_exp, weight_scale, acc):
        y = y * factor
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype).contiguous()


def linear_dx(
    grad: Tensor, weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None, k: int, fmt: Format
) -> Tensor:
    """The gradient of ``linear`` in x: (grad · row factors) · decode(W), [..., k] in grad's dtype."""
    acc = _accumulator(grad.dtype)
    scaled = grad.to(acc).contiguous()
    for factor in _row_factors(weight_exp, weight_scale, acc):
        scaled = scaled * factor
    with _ieee_products(grad.device):
        return F.linear(scaled, relative_values(weight, k, fmt, acc).T).to(grad.dtype).contiguous()


def conv_memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output: channels-last where x is, else contiguous."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def conv2d(
    x: Tensor,
    weight: Tensor,
    weight_exp: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    fmt: Format,
) -> Tensor:
    """Two-dimensional convolution of x [B, C, H, W] with K = C/groups·kh·kw: like ``linear`` in dtype and rounding."""
    acc = _accumulator(x.dtype)
    shape = (weight.shape[0], x.shape[1] // groups, *kernel_size)
    w = relative_values(weight, shape[1] * shape[2] * shape[3], fmt, acc).view(shape)
    with _ieee_products(x.device):
        y = F.conv2d(x.to(acc), w, None, stride, padding, dilation, groups)
    for factor in _row_factors(weight_exp, weight_scale, acc):
        y = y * factor.view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(acc).view(-1, 1, 1)
    return y.to(x.dtype).contiguous(memory_format=conv_memory_format(x))


def conv2d_dx(
    grad: Tensor,
    weight: Tensor,
    weight_exp: Tensor,
    weight_scale: Tensor | None,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    fmt: Format,
) -> Tensor:
    """The gradient of ``conv2d`` in x: ``input_size`` [B, C, H, W] in grad's dtype."""
    k = input_size[1] // groups * kernel_size[0] * kernel_size[1]
    w = relative_values(weight, k, fmt, _accumulator(grad.dtype))
    conv = (kernel_size, stride, padding, dilation, groups)
    return conv2d_dx_of(grad, w, weight_exp, weight_scale, input_size, *conv)


def conv2d_dx_of(
    grad: Tensor,
    w: Tensor,
    weight_exp: Tensor,
    weight_scale: Tensor | None,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``conv2d_dx`` for weights that are decoded already: ``relative_values`` [N, K] in the accumulator's dtype."""
    acc = _accumulator(grad.dtype)
    w = w.view(-1, input_size[1] // groups, *kernel_size)
    scaled = grad.to(acc)
    for factor in _row_factors(weight_exp, weight_scale, acc):
        scaled = scaled * factor.view(-1, 1, 1)
    with _ieee_products(grad.device):
        dx = torch.nn.grad.conv2d_input(input_size, w, scaled, stride, padding, dilation, groups)
    return dx.to(grad.dtype).contiguous()


def quantize_rows_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [..., K] as e4m3 with a power-of-two scale each: (float8_e4m3fn values, int32 exponents t [..., 1]),
    x ≈ values · 2^-t, with t the largest that keeps max|row|·2^t ≤ 448, within ±126. A row with NaN or Inf is NaN."""
    m, e = torch.frexp(x.float().abs().amax(dim=-1, keepdim=True))
    # 448 = 0.875·2^9 is the largest finite e4m3 value.
    t = torch.where(m <= 0.875, 9 - e, 8 - e).clamp(-126, 126)
    t = torch.where(m.isfinite() & (m > 0), t, 0)
    # e4m3 has no Inf, and the conversion would make it 448.
    scaled = torch.where(m.isfinite(), x.float() * _power(t.long()).float(), torch.nan)
    return scaled.to(torch.float8_e4m3fn), t


def linear_fp8(
    x: Tensor, weight: Tensor, weight_exp: Tensor, weight_scale: Tensor | None, bias: Tensor | None, fmt: Format
) -> Tensor:
    """``linear`` with the rows of x rounded to e4m3 by ``quantize_rows_e4m3``; products and sums as in ``linear``."""

    def product(x8: Tensor) -> Tensor:
        return linear(x8, weight, torch.zeros_like(weight_exp), None, None, fmt)

    return fp8_product(x, weight_exp, weight_scale, bias, product)


def fp8_product(
    x: Tensor,
    weight_exp: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    product: Callable[[Tensor], Tensor],
) -> Tensor:
    """``linear_fp8`` around ``product``, which multiplies float32 [..., K] with the weights relative to 2^n1."""
    x8, t = quantize_rows_e4m3(x)
    y = product(x8.float())
    # 2^n1 and 2^-t together, as two factors of half the exponent each: either alone may overflow or underflow.
    power = weight_exp.long().view(-1) - t.long()
    half = power >> 1
    y = y * _power(half).float() * _power(power - half).float()
    if weight_scale is not None:
        y = y * weight_scale.view(-1)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


# --- optimizer steps with the mask inside -----------------------------------------------------------------------------


def _unfrozen(mask: Tensor, p: Tensor) -> Tensor | None:
    """Which weights of ``p`` may move; None where an empty mask says all."""
    return ~unpack_bits(mask, p.shape) if mask.numel() else None


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
) -> None:
    """torch.optim.SGD's step on the unfrozen weights (equation 8 of the paper); frozen weights and their momentum keep
    their bits. Arithmetic in the buffers' dtype, float32 or float64; ``momentum_buffers`` is empty for momentum 0."""
    for i, (p, g, mask) in enumerate(zip(params, grads, masks, strict=True)):
        acc = _accumulator(p.dtype)
        move = _unfrozen(mask, p)
        wide = p.to(acc)
        d = -g.to(acc) if maximize else g.to(acc)
        if weight_decay:
            d = d.add(wide, alpha=weight_decay)
        if momentum:
            buffer = momentum_buffers[i]
            new = d if is_first_step else buffer.mul(momentum).add(d, alpha=1 - dampening)
            buffer.copy_(new if move is None else torch.where(move, new, buffer))
            d = d.add(new, alpha=momentum) if nesterov else new
        new = wide.add(d, alpha=-lr).to(p.dtype)
        p.copy_(new if move is None else torch.where(move, new, p))


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    step: int,
    maximize: bool,
) -> None:
    """torch.optim.AdamW's step number ``step`` (from 1) on the unfrozen weights; frozen weights and their state keep
    their bits. State and arithmetic in float32, float64 for float64 parameters."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for p, g, m, v, mask in zip(params, grads, exp_avgs, exp_avg_sqs, masks, strict=True):
        acc = _accumulator(p.dtype)
        move = _unfrozen(mask, p)
        d = -g.to(acc) if maximize else g.to(acc)
        new_m = m.lerp(d, 1 - beta1)
        new_v = v.mul(beta2).addcmul(d, d, value=1 - beta2)
        denominator = (new_v.sqrt() / correction2**0.5).add(eps)
        new_p = (p.to(acc) * (1 - lr * weight_decay)).addcdiv(new_m, denominator, value=-lr / correction1).to(p.dtype)
        for old, new in ((m, new_m), (v, new_v), (p, new_p)):
            old.copy_(new if move is None else torch.where(move, new, old))
