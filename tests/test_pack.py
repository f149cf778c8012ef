"""Packing loses nothing and writes the documented bytes; what is no code, or no representable value, is found."""

import dataclasses

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, FORMATS, generator, plain, random_packed, same_bits

import inq_kernels as inq
from inq_kernels import reference
from inq_kernels.format import GRANULARITIES
from inq_kernels.reference import pack_bits, unpack_bits

ops = torch.ops.inq


def expected_bytes(w_hat, n1, fmt):
    rows = []
    for row, k in zip(w_hat.reshape(w_hat.shape[0], -1), n1.view(-1).tolist(), strict=True):
        codes = [oracle.code(v, k, fmt.bits, fmt.levels) for v in oracle.fractions(row)]
        rows.append(oracle.row_bytes(codes, fmt.bits))
    return rows


# --- pack and unpack --------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(FORMATS),
    st.sampled_from(GRANULARITIES),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_identity_and_the_bytes_of_the_oracle(fmt, granularity, dtype, shape, strides, seed):
    fmt = dataclasses.replace(fmt, granularity=granularity)
    w = torch.randn(shape, generator=generator(seed)).to(dtype)
    if strides == "transposed":
        w = w.mT if w.dim() > 1 else w.flip(0)
    elif strides == "sliced":
        w = w.repeat_interleave(2, -1)[..., ::2]
    elif strides == "expanded":
        w = w[..., :1].expand(shape)
    n1 = inq.exponents(w, fmt)
    w_hat = inq.quantize(w, fmt, n1)
    if strides == "expanded":
        w_hat = w_hat[..., :1].expand(shape)
    packed = inq.pack(w_hat, fmt, n1)
    assert packed.weight.tolist() == expected_bytes(w_hat, n1, fmt)
    assert torch.equal(packed.weight_exp, n1)
    assert (packed.weight_scale, packed.shape, packed.layout) == (None, tuple(w.shape), "storage")
    assert same_bits(inq.unpack(packed, dtype), w_hat)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("n1", [-126, -118, 127])
def test_every_level_at_the_limits_of_n1(n1, fmt):
    values = [0.0] + [s * 2.0**k for k in range(max(fmt.n2(n1), -126), n1 + 1) for s in (1, -1)]
    w_hat = torch.tensor([values])
    rows = torch.tensor([[n1]], dtype=torch.int8)
    packed = inq.pack(w_hat, fmt, rows)
    assert packed.weight.tolist() == expected_bytes(w_hat, rows, fmt)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert same_bits(inq.unpack(packed, dtype), w_hat.to(dtype))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_float16_down_to_its_smallest_subnormal(fmt):
    w_hat = torch.tensor([[2.0**-24, -(2.0**-24), 0.0], [2.0**15, -(2.0**15), 0.0]], dtype=torch.float16)
    packed = inq.pack(w_hat, dataclasses.replace(fmt, granularity="channel"))
    assert packed.weight_exp.tolist() == [[-24], [15]]
    assert same_bits(inq.unpack(packed, torch.float16), w_hat)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_n1_is_found_from_quantized_weights(fmt):
    w_hat = torch.tensor([[0.0, 0.0], [0.0, -(2.0**-3)], [2.0**5, 0.0]])
    packed = inq.pack(w_hat, dataclasses.replace(fmt, granularity="channel"))
    assert packed.weight_exp.tolist() == [[0], [-3], [5]]
    assert same_bits(inq.unpack(packed), w_hat)


def test_minus_zero_is_packed_as_zero():
    packed = inq.pack(torch.tensor([[-0.0, 1.0]]), inq.Format(4))
    assert same_bits(inq.unpack(packed), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_scale(dtype):
    packed = random_packed(inq.Format(4), 4, 50, scale=True)
    w = inq.unpack(packed, dtype)
    # One product in float64, rounded once.
    exact = inq.unpack(plain(packed), torch.float64) * packed.weight_scale.double()
    # A zero is +0 under the negative scale of row 0 too.
    zero = exact == 0
    assert bool(torch.signbit(exact[0][zero[0]]).any())
    assert same_bits(w, torch.where(zero, 0.0, exact).to(dtype))


@pytest.mark.parametrize(
    ("w", "n1", "bad"),
    [
        ([[0.3, 1.0, 0.75]], None, 2),
        ([[1.0, 2.0**-2, 2.0**-3]], None, 2),  # 3 bits hold 1 and 1/2 below n1 = 0
        ([[1.0, 0.5]], -1, 1),  # larger than n1: saturating would change it
        ([[2.0**-127, 2.0**-126]], -126, 1),  # a level under the lower limit
        ([[1.5, -1.5]], 1, 2),
    ],
)
def test_pack_refuses_what_it_would_have_to_round(w, n1, bad):
    w = torch.tensor(w)
    before = w.clone()
    n1 = None if n1 is None else torch.tensor([[n1]], dtype=torch.int8)
    with pytest.raises(ValueError, match=rf"inq.pack: w_hat: .*; {bad} of {w.numel()} values are something else"):
        inq.pack(w, inq.Format(3), n1)
    assert same_bits(w, before)


def test_a_packed_weight_does_not_follow_its_inputs():
    n1 = torch.zeros(1, 1, dtype=torch.int8)
    w_hat = torch.nn.Parameter(torch.ones(1, 3))
    packed = inq.pack(w_hat, inq.Format(3), n1)
    n1.fill_(5)
    w_hat.data.zero_()
    assert same_bits(inq.unpack(packed), torch.ones(1, 3))
    assert not packed.weight.requires_grad


# --- invalid codes, layouts, masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_code_is_canonical_or_found(fmt):
    # All codes at n1 = 0, once each, then padding to a multiple of 8.
    codes = list(range(2**fmt.bits))
    canonical = [oracle.code(v, 0, fmt.bits, fmt.levels) for v in levels_of(fmt)]
    weight = torch.tensor([oracle.row_bytes(codes, fmt.bits)], dtype=torch.uint8)
    n1 = torch.zeros(1, 1, dtype=torch.int8)
    assert reference.invalid_codes(weight, n1, len(codes), fmt) == len(codes) - len(set(canonical))
    for code in codes:
        one = torch.tensor([oracle.row_bytes([0, code, 0], fmt.bits)], dtype=torch.uint8)
        assert reference.invalid_codes(one, n1, 3, fmt) == (code not in canonical)


def levels_of(fmt):
    return [0] + [s * oracle.power(-j) for j in range(fmt.magnitudes) for s in (1, -1)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_padding_that_is_not_zero_is_found(fmt):
    top = oracle.code(oracle.power(0), 0, fmt.bits, fmt.levels)
    weight = torch.tensor([oracle.row_bytes([top] * 8, fmt.bits)] * 2, dtype=torch.uint8)
    n1 = torch.zeros(2, 1, dtype=torch.int8)
    assert reference.invalid_codes(weight, n1, 8, fmt) == 0
    assert reference.invalid_codes(weight, n1, 5, fmt) == 6


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_levels_under_the_lower_limit_are_found(fmt):
    codes = [oracle.code(v, 0, fmt.bits, fmt.levels) for v in levels_of(fmt)]
    weight = torch.tensor([oracle.row_bytes(codes, fmt.bits)], dtype=torch.uint8)
    for n1 in (-126, -125, -126 + fmt.magnitudes - 1, 127):
        under = 2 * max(-126 - (n1 + 1 - fmt.magnitudes), 0)
        rows = torch.tensor([[n1]], dtype=torch.int8)
        assert reference.invalid_codes(weight, rows, len(codes), fmt) == under


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (1, 64)], ids=str)
def test_unprepack_undoes_prepack(shape, fmt):
    packed = random_packed(fmt, *shape)
    laid_out = ops.prepack(packed.weight, shape[1], fmt.bits, fmt.levels, "storage")
    back = ops.unprepack(laid_out, *shape, fmt.bits, fmt.levels, "storage")
    assert torch.equal(back, packed.weight)
    # In a tensor of its own: an operator never returns its input.
    assert laid_out.data_ptr() != packed.weight.data_ptr()
    assert back.data_ptr() != laid_out.data_ptr()


def test_a_layout_that_nobody_reads():
    packed = random_packed(inq.Format(4), 2, 8)
    for call in (
        lambda: ops.prepack(packed.weight, 8, 4, "paper", "tiles"),
        lambda: ops.unprepack(packed.weight, 2, 8, 4, "paper", "tiles"),
        lambda: ops.linear(torch.ones(1, 8), packed.weight, packed.weight_exp, None, None, 4, "paper", "tiles", ""),
    ):
        with pytest.raises(ValueError, match=r"layout: .*got 'tiles'"):
            call()


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=100, deadline=None)
def test_masks_of_one_bit_a_weight(mask):
    packed = pack_bits(torch.tensor(mask, dtype=torch.bool))
    # As bytes of one little-endian integer: bit i%8 of byte i//8.
    number = sum(bit << i for i, bit in enumerate(mask))
    assert packed.tolist() == list(number.to_bytes((len(mask) + 7) // 8, "little"))
    assert packed.dtype == torch.uint8
    assert unpack_bits(packed, (len(mask),)).tolist() == mask


def test_masks_keep_shape_and_ignore_strides():
    mask = torch.rand(3, 2, 7, generator=generator()) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)
    assert torch.equal(pack_bits(mask.permute(2, 0, 1)), pack_bits(mask.permute(2, 0, 1).contiguous()))


# --- errors, opcheck --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(2, 4)}, TypeError, "weight: expected torch.uint8, got torch.float32"),
        (
            {"weight": torch.zeros(2, 3, dtype=torch.uint8)},
            ValueError,
            r"weight: expected shape \[2, 4\], got \[2, 3\]",
        ),
        ({"weight_exp": torch.zeros(2, 1)}, TypeError, "weight_exp: expected torch.int8, got torch.float32"),
        (
            {"weight_exp": torch.zeros(2, dtype=torch.int8)},
            ValueError,
            r"weight_exp: expected shape \[2, 1\], got \[2\]",
        ),
        ({"weight_scale": torch.ones(2, 1).half()}, TypeError, "weight_scale: expected torch.float32"),
        ({"weight_scale": torch.ones(1, 1)}, ValueError, r"weight_scale: expected shape \[2, 1\], got \[1, 1\]"),
        ({"shape": (2, 9)}, ValueError, r"weight: expected shape \[2, 8\], got \[2, 4\]"),
    ],
)
def test_parts_that_do_not_belong_together(change, error, text):
    parts = {
        "weight": torch.zeros(2, 4, dtype=torch.uint8),
        "weight_exp": torch.zeros(2, 1, dtype=torch.int8),
        "weight_scale": None,
        "format": inq.Format(4),
        "shape": (2, 5),
    }
    inq.PackedWeight(**parts)
    with pytest.raises(error, match=text):
        inq.PackedWeight(**{**parts, **change})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", [inq.Format(4), inq.Format(5, "dense")])
def test_unpack_into_memory_that_exists(fmt, dtype):
    packed = random_packed(fmt, 5, 37)
    expected = inq.unpack(packed, dtype)
    for out in (torch.full((5, 37), torch.nan, dtype=dtype), torch.full((37, 5), torch.nan, dtype=dtype).t()):
        before = out._version
        assert inq.unpack(packed, out=out) is out
        assert same_bits(out, expected)
        assert out._version > before  # autograd must notice
    # Only what belongs to it is written.
    guarded = torch.full((7, 37), torch.nan, dtype=dtype)
    inq.unpack(packed, dtype, out=guarded[1:6])
    assert same_bits(guarded[1:6], expected)
    assert guarded[0].isnan().all()
    assert guarded[6].isnan().all()


def test_unpack_into_memory_that_is_somebody_elses():
    packed = random_packed(inq.Format(4), 16, 40)
    memory = torch.zeros(16 * 40 + 200)
    codes = memory.view(torch.uint8)[: packed.weight.numel()].view(packed.weight.shape).copy_(packed.weight)
    shared = inq.PackedWeight(codes, packed.weight_exp, None, packed.format, packed.shape)
    with pytest.raises(ValueError, match="apart from the packed weight's, got that of weight"):
        inq.unpack(shared, out=memory[:640].view(16, 40))
    assert torch.equal(codes, packed.weight)
    for strides in ((39, 1), (1, 1), (1, 15)):
        with pytest.raises(ValueError, match="overlapping"):
            inq.unpack(packed, out=torch.zeros(1000).as_strided((16, 40), strides))


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        ([0.0], TypeError, "out: expected a torch.Tensor, got list"),
        (torch.zeros(2, 4), ValueError, r"out: expected shape \[2, 3\], got \[2, 4\]"),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.zeros(2, 3, device="meta"), ValueError, "out: expected device cpu, got meta"),
        (torch.zeros(1, 3).expand(2, 3), ValueError, "overlapping"),
        (torch.zeros(2, 3, requires_grad=True), ValueError, "needs no gradient"),
    ],
)
def test_unpack_refuses_an_out_that_does_not_fit(out, error, text):
    packed = random_packed(inq.Format(4), 2, 3)
    with pytest.raises(error, match=text):
        inq.unpack(packed, out=out)
    if isinstance(out, torch.Tensor) and out.device.type == "cpu":
        assert not out.any()
    with pytest.raises(TypeError, match="expected dtype torch.float32, got torch.bfloat16"):
        inq.unpack(packed, torch.float32, out=torch.zeros(2, 3, dtype=torch.bfloat16))


def test_unpack_to_a_float_dtype_only():
    with pytest.raises(TypeError, match=r"inq.unpack: dtype: .*got torch.int32"):
        inq.unpack(random_packed(inq.Format(4), 2, 3), torch.int32)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4, 1), (1, 8), (2, 3, 2, 2)], ids=str)
def test_opcheck(shape):
    for fmt in (inq.Format(5), inq.Format(3, "dense")):
        packed = random_packed(fmt, *shape, scale=True)
        f = (fmt.bits, fmt.levels)
        w_hat = inq.unpack(plain(packed))
        torch.library.opcheck(ops.pack.default, (w_hat, packed.weight_exp, *f))
        torch.library.opcheck(ops.prepack.default, (packed.weight, packed.k, *f, "storage"))
        torch.library.opcheck(ops.unprepack.default, (packed.weight, shape[0], packed.k, *f, "storage"))
        for scale, dtype in [(packed.weight_scale, torch.float32), (None, torch.bfloat16), (None, torch.float64)]:
            torch.library.opcheck(ops.unpack.default, (packed.weight, packed.weight_exp, scale, packed.k, *f, dtype))
            out = torch.zeros(packed.shape, dtype=dtype)
            torch.library.opcheck(ops.unpack_.default, (out, packed.weight, packed.weight_exp, scale, packed.k, *f))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_pack_dtypes(dtype):
    w_hat = torch.tensor([[1.0, -0.5, 0.0]], dtype=dtype)
    torch.library.opcheck(ops.pack.default, (w_hat, torch.zeros(1, 1, dtype=torch.int8), 4, "paper"))


@pytest.mark.parametrize("n1", [16, -20])
def test_unpack_refuses_a_dtype_that_would_lose_values(n1):
    """float16 holds 2^-24 … 2^15; Inf and 0 instead of a weight must not pass in silence."""
    w = torch.tensor([[2.0**n1, -(2.0 ** (n1 - 7)), 0.0]])
    packed = inq.pack(w, inq.Format(5), torch.tensor([[n1]], dtype=torch.int8))
    assert torch.equal(inq.unpack(packed), w)
    with pytest.raises(ValueError, match=r"got torch.float16, which cannot hold 1 of 3 \(exponents"):
        inq.unpack(packed, torch.float16)
