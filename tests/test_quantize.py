"""Quantization is bit-exact: equation (4) and both rules for n1 against the oracle, in all four dtypes.

Every bfloat16 and every float16 number, every bin edge of float32 and float64 with its neighbours, and Hypothesis.
"""

from bisect import bisect_left
from fractions import Fraction
from functools import cache

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, FORMATS, same_bits

import inq_kernels as inq
from inq_kernels.format import BITS, EXPONENT_RULES, GRANULARITIES, LEVELS

PER_ROW = inq.Format(3, granularity="channel")

formats = st.sampled_from(FORMATS)
dtypes = st.sampled_from(DTYPES)


def n1_rows(n1, w):
    return torch.full((w.shape[0], 1), n1, dtype=torch.int8)


def expected_quantize(w, n1, fmt):
    """The oracle's tensor for one n1."""
    lo, _ = oracle.limits(w.dtype)
    values = [float(oracle.quantize(v, n1, fmt.magnitudes, lo)) for v in oracle.fractions(w)]
    return torch.tensor(values, dtype=torch.float64).to(w.dtype).view(w.shape)


# --- equation (4) -----------------------------------------------------------------------------------------------------


@cache
def finite_magnitudes(dtype):
    """Every finite number ≥ 0 of a 16-bit dtype, ascending, as a tensor and as fractions."""
    w = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = w[w.isfinite()]
    return w, oracle.fractions(w)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.bfloat16, (-126, -125, -119, -1, 0, 7, 126, 127)), (torch.float16, (-24, -23, -17, -10, 0, 14, 15))],
    ids=str,
)
def test_every_16_bit_number(dtype, exponents, fmt):
    w, exact = finite_magnitudes(dtype)
    assert len(w) == {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    for n1 in exponents:
        expected = torch.zeros_like(w)
        for start, value in zip(*oracle.intervals(n1, fmt.magnitudes, oracle.limits(dtype)[0]), strict=True):
            expected[bisect_left(exact, start) :] = float(value)
        both = torch.cat([w, -w])[:, None]
        # 0 − x is +0 for x = 0: a quantized zero never has a sign.
        assert same_bits(inq.quantize(both, fmt, n1_rows(n1, both)), torch.cat([expected, 0 - expected])[:, None])


@cache
def bin_edges(dtype):
    """0.5, 0.75, 1 and 1.5 times every power of two around the limits, and the numbers next to them."""
    powers = [*range(-152, -112), *range(-28, 18), *range(112, 128)]
    edges = torch.tensor([m * 2.0**k for k in powers for m in (0.5, 0.75, 1, 1.5)], dtype=torch.float64).to(dtype)
    inf = torch.tensor(float("inf"), dtype=dtype)
    w = torch.cat([edges, edges.nextafter(inf), edges.nextafter(-inf)])
    return torch.cat([w, -w])[:, None]


@pytest.mark.parametrize("n1", [-126, -120, 0, 5, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bin_edges_and_their_neighbours(dtype, n1):
    w = bin_edges(dtype)
    exact = oracle.fractions(w)
    for fmt in FORMATS:
        expected = [float(oracle.quantize(v, n1, fmt.magnitudes, -126)) for v in exact]
        expected = torch.tensor(expected, dtype=torch.float64).to(dtype)[:, None]
        assert same_bits(inq.quantize(w, fmt, n1_rows(n1, w)), expected), str(fmt)


@st.composite
def values(draw, dtype, size):
    """Floats of ``dtype``: any finite one, or a bin edge or its neighbour, or a small dyadic number."""
    lo, hi = oracle.limits(dtype)
    width = 64 if dtype == torch.float64 else 32 if dtype == torch.float32 else 16
    anything = st.floats(width=width, allow_nan=False, allow_infinity=False)
    edge = st.builds(lambda m, k: m * 2.0**k, st.sampled_from([0.5, 0.75, 1.0, 1.5, -0.75, -1.5]), st.integers(lo, hi))
    dyadic = st.builds(lambda i, k: i * 2.0**k, st.integers(-255, 255), st.integers(-4, 0))
    kind = draw(st.sampled_from([anything, edge, dyadic, dyadic]))
    w = torch.tensor(draw(st.lists(kind, min_size=size, max_size=size)), dtype=torch.float64).to(dtype)
    step = draw(st.sampled_from([0.0, float("inf"), float("-inf")]))
    # In bfloat16 a float16 is rounded, in float16 1.5·2^15 is not the largest: nothing here can become infinite.
    w = w.nextafter(torch.full_like(w, step)) if step else w
    return torch.where(w.isfinite(), w, 1.0)


@given(st.data(), dtypes, formats)
@settings(max_examples=150, deadline=None)
def test_any_value_and_any_n1(data, dtype, fmt):
    lo, hi = oracle.limits(dtype)
    w = data.draw(values(dtype, 8)).view(-1, 1)
    n1 = data.draw(st.integers(lo, hi) | st.integers(-8, 8))
    assert same_bits(inq.quantize(w, fmt, n1_rows(n1, w)), expected_quantize(w, n1, fmt))


def test_a_weight_that_grew_past_the_fixed_n1_saturates():
    # Mistake 2 of PAPER.md: the literal equation (4) makes these 0.
    w = torch.tensor([[1.49, 1.5, 3.0, -100.0, 3e38, -3e38]])
    assert inq.quantize(w, inq.Format(3), n1_rows(0, w)).tolist() == [[1.0, 1.0, 1.0, -1.0, 1.0, -1.0]]


def test_each_row_has_its_own_n1():
    w = torch.full((3, 2), 0.8)
    n1 = torch.tensor([[0], [-3], [2]], dtype=torch.int8)
    assert inq.quantize(w, PER_ROW, n1).tolist() == [[1.0, 1.0], [0.125, 0.125], [0.0, 0.0]]


@given(st.data(), dtypes, formats)
@settings(max_examples=50, deadline=None)
def test_quantizing_twice_changes_nothing(data, dtype, fmt):
    w = data.draw(values(dtype, 6)).view(2, 3)
    n1 = inq.exponents(w, fmt)
    once = inq.quantize(w, fmt, n1)
    assert same_bits(inq.quantize(once, fmt, n1), once)


# --- n1 ---------------------------------------------------------------------------------------------------------------


def expected_n1(w, fmt):
    lo, hi = oracle.limits(w.dtype)
    rows = [oracle.fractions(row) for row in w]
    if fmt.granularity == "tensor":
        rows = [[v for row in rows for v in row]] * w.shape[0]
    if fmt.exponent == "max":
        return [[oracle.n1_max(row, lo, hi)] for row in rows]
    return [[oracle.n1_mse(row, fmt.magnitudes, lo, hi)] for row in rows]


@given(
    st.data(), dtypes, st.sampled_from(BITS), st.sampled_from(LEVELS), st.sampled_from(GRANULARITIES),
    st.sampled_from(EXPONENT_RULES),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_both_rules_for_n1(data, dtype, bits, levels, granularity, rule):
    fmt = inq.Format(bits, levels, granularity, rule)
    w = data.draw(values(dtype, 8)).view(2, 4)
    n1 = inq.exponents(w, fmt)
    assert (n1.dtype, n1.tolist()) == (torch.int8, expected_n1(w, fmt))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_rule_at_its_ties_and_limits(dtype):
    lo, hi = oracle.limits(dtype)
    finfo = torch.finfo(dtype)
    tie = torch.tensor([0.75, 1.5], dtype=dtype)
    w = torch.cat([tie, tie.nextafter(torch.zeros_like(tie)), torch.tensor([finfo.max, -finfo.max, 0], dtype=dtype)])
    n1 = inq.exponents(w, inq.Format(5, granularity="channel", exponent="max"))
    assert n1.view(-1).tolist() == [0, 1, -1, 0, hi, hi, 0]
    smallest = torch.tensor([finfo.smallest_normal * finfo.eps], dtype=dtype)
    assert inq.exponents(smallest, inq.Format.paper(5)).item() == lo


def test_mse_rule_prefers_the_larger_n1_in_a_tie():
    fmt = inq.Format(2)
    # |1.5 − 2| = |1.5 − 1|.
    assert inq.exponents(torch.tensor([[1.5]]), fmt).item() == 1
    # 3 + d and 1 + d: 4 and 0 cost exactly what 2 and 2 cost.
    assert inq.exponents(torch.tensor([[3.5, 1.5]]), fmt).item() == 2
    assert inq.exponents(torch.tensor([[3.25, 1.5]]), fmt).item() == 1


@given(st.lists(st.integers(0, 2**50 - 1), min_size=1, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_mse_rule_is_exact_in_float64_ties(offsets, random):
    # Sums in float64 round these 53-bit numbers, differently in every order; one unit less must decide.
    pairs = [base + d * 2.0**-50 for d in offsets for base in (3.0, 1.0)]
    random.shuffle(pairs)
    w = torch.tensor([pairs], dtype=torch.float64)
    assert inq.exponents(w, inq.Format(2)).item() == 2
    w[0, w[0].argmax()] -= 2.0**-51
    assert inq.exponents(w, inq.Format(2)).item() == 1


def test_mse_rule_over_more_weights_than_one_chunk():
    # Rows of 1.5 million exact ties: the reference's chunks of 2^22 end inside rows.
    d = torch.arange(750_000, dtype=torch.float32) / 2**20
    w = torch.cat([3 + d, 1 + d]).repeat(3, 1)
    w[1, 0] = 2.999
    assert inq.exponents(w, inq.Format(2, granularity="channel")).tolist() == [[2], [1], [2]]
    assert inq.exponents(w, inq.Format(2)).tolist() == [[1]] * 3


@pytest.mark.parametrize("rule", EXPONENT_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_n1_does_not_depend_on_the_order_of_weights(dtype, rule):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, 5000, generator=g).to(dtype)
    for fmt in (inq.Format(bits, exponent=rule) for bits in BITS):
        n1 = inq.exponents(w, fmt)
        for _ in range(3):
            assert torch.equal(inq.exponents(w[:, torch.randperm(5000, generator=g)], fmt), n1)


def test_mse_rule_looks_eight_octaves_down():
    # One outlier, and so many small weights that the best n1 is theirs, 2^-9: reached from 1/2 but not from 1.
    w = torch.full((1, 1 << 20), 1.4 * 2.0**-9)
    w[0, 0] = 1.0
    assert inq.exponents(w, inq.Format(2)).item() == -8
    w[0, 0] = 0.5
    assert inq.exponents(w, inq.Format(2)).item() == -9


# --- shapes, strides, values that are not numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [inq.Format(4), inq.Format(3, "dense", "channel"), inq.Format.paper(2)], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (1,), (5,), (3, 2, 2), (2, 3, 1, 2, 2)], ids=str)
def test_any_rank(shape, fmt):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    flat = w.reshape(shape[0], -1)
    n1 = inq.exponents(w, fmt)
    assert n1.tolist() == expected_n1(flat, fmt)
    w_hat = inq.quantize(w, fmt)
    assert w_hat.shape == w.shape
    rows = [expected_quantize(row, int(k), fmt) for row, k in zip(flat, n1, strict=True)]
    assert same_bits(w_hat.reshape(shape[0], -1), torch.stack(rows))


@pytest.mark.parametrize("fmt", [inq.Format(5), PER_ROW], ids=str)
def test_any_strides(fmt):
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    conv = base.view(6, 5, 2, 1).to(memory_format=torch.channels_last)
    for w in (base.T, base[:, ::2], base[::2].T[1:], base[:, :1].expand(6, 4), conv):
        assert torch.equal(inq.exponents(w, fmt), inq.exponents(w.contiguous(), fmt))
        assert torch.equal(inq.quantize(w, fmt), inq.quantize(w.contiguous(), fmt))


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_rows_of_zeros(rule):
    w = torch.tensor([[0.0, -0.0], [3.0, 0.0]])
    fmt = inq.Format(3, granularity="channel", exponent=rule)
    n1 = inq.exponents(w, fmt)
    assert n1[0].item() == 0
    assert same_bits(inq.quantize(w, fmt)[0], torch.zeros(2))
    zeros = -torch.zeros(3, 2)
    assert inq.exponents(zeros, inq.Format(3, exponent=rule)).tolist() == [[0]] * 3
    assert same_bits(inq.quantize(zeros, inq.Format(3, exponent=rule)), torch.zeros(3, 2))


def test_parameters_are_read_and_not_touched():
    w = torch.nn.Parameter(torch.randn(4, 5))
    before = w.detach().clone()
    w_hat = inq.quantize(w, inq.Format(4))
    assert not w_hat.requires_grad
    assert not inq.exponents(w, inq.Format(4)).requires_grad
    assert same_bits(w.detach(), before)


FUNCTIONS = {
    "inq.exponents: w": lambda w: inq.exponents(w, inq.Format(4)),
    "inq.quantize: w": lambda w: inq.quantize(w, inq.Format(4)),
    "inq.quantize_with_mask: w": lambda w: inq.quantize_with_mask(w, None, 0.5, inq.Format(4)),
    "inq.pack: w_hat": lambda w: inq.pack(w, inq.Format(4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_named_and_counted(dtype, name):
    w = torch.ones(2, 5, dtype=dtype)
    w[0, 1], w[1, 2], w[1, 3] = float("nan"), float("inf"), float("-inf")
    before = w.clone()
    with pytest.raises(ValueError, match=f"^{name}: expected finite values, got 1 NaN and 2 Inf of 10$"):
        FUNCTIONS[name](w)
    assert same_bits(w, before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_a_weight(name):
    for w, error, text in [
        ([1.0], TypeError, "expected a torch.Tensor, got list"),
        (torch.ones(2, 2, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.tensor(1.0), ValueError, r"got shape \[\]"),
        (torch.ones(0, 3), ValueError, r"got shape \[0, 3\]"),
        (torch.ones(2, 0), ValueError, r"got shape \[2, 0\]"),
        (torch.ones(2, 2, device="meta"), ValueError, "meta device"),
    ]:
        with pytest.raises(error, match=f"^{name}: .*{text}"):
            FUNCTIONS[name](w)


@pytest.mark.parametrize(
    ("n1", "dtype", "error", "text"),
    [
        (3, torch.float32, TypeError, "expected an int8 tensor, got int"),
        (torch.zeros(2, 1), torch.float32, TypeError, "got torch.float32"),
        (torch.zeros(2, dtype=torch.int8), torch.float32, ValueError, r"shape \[2, 1\], got \[2\]"),
        (torch.zeros(3, 1, dtype=torch.int8), torch.float32, ValueError, r"shape \[2, 1\], got \[3, 1\]"),
        (torch.tensor([[-128], [0]], dtype=torch.int8), torch.float32, ValueError, r"\[-126, 127\].*got \[-128, 0\]"),
        (torch.tensor([[0], [16]], dtype=torch.int8), torch.float16, ValueError, r"\[-24, 15\].*got \[0, 16\]"),
    ],
)
def test_an_n1_that_does_not_fit(n1, dtype, error, text):
    w = torch.ones(2, 3, dtype=dtype)
    for name, call in [
        ("quantize", lambda: inq.quantize(w, PER_ROW, n1)),
        ("quantize_with_mask", lambda: inq.quantize_with_mask(w, None, 0.5, PER_ROW, n1=n1)),
        ("pack", lambda: inq.pack(w, PER_ROW, n1)),
    ]:
        with pytest.raises(error, match=f"^inq.{name}: n1: .*{text}"):
            call()


@pytest.mark.parametrize("rule", EXPONENT_RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, rule):
    w = torch.randn(3, 5, 2, dtype=dtype)
    for granularity in GRANULARITIES:
        torch.library.opcheck(torch.ops.inq.exponents.default, (w, 4, "dense", granularity, rule))


def test_the_oracle_itself():
    # By hand, from PAPER.md's consequences: at 3 bits and n1 = 0, P = {0, 1/2, 1}.
    half = Fraction(1, 2)
    table = {0: 0, "0.2499": 0, "0.25": half, "0.7499": half, "0.75": 1, "1.4999": 1, "1.5": 1, "9": 1}
    for w, value in table.items():
        assert oracle.quantize(Fraction(w), 0, 2, -126) == value
        assert oracle.quantize(-Fraction(w), 0, 2, -126) == -value
    assert [oracle.n1_max([Fraction(s)], -126, 127) for s in ("0.7499", "0.75", "1", "1.4999", "1.5")] == [
        -1,
        0,
        0,
        0,
        1,
    ]
