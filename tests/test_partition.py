"""Which weights a portion freezes: exact counts, ties, masks that only grow, and frozen values that keep their bits."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, FORMATS, same_bits

import inq_kernels as inq
from inq_kernels.ops import PARTITIONS
from inq_kernels.reference import pack_bits, unpack_bits

FMT = inq.Format(3)
PAPER_PORTIONS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ops = torch.ops.inq


def indices(mask):
    return set(mask.reshape(-1).nonzero().view(-1).tolist())


def expected_step(w, frozen, portion, fmt, n1, kept=None):
    """The oracle's (w_hat, frozen indices) of one portion by magnitude, with one n1 for all rows."""
    exact, held = oracle.fractions(w), indices(frozen)
    after = oracle.frozen_after(exact, held, portion, kept)
    lo, _ = oracle.limits(w.dtype)
    values = w.reshape(-1).clone()
    for i in range(len(exact)):
        if i in after - held:
            values[i] = float(oracle.quantize(exact[i], n1, fmt.magnitudes, lo))
        elif kept is not None and i not in kept:
            values[i] = 0.0
    return values.view(w.shape), after


def perturb(w, frozen, generator):
    """What retraining does: the unfrozen weights move, some of them past the largest frozen one."""
    noise = torch.randn(w.shape, generator=generator).to(w.dtype)
    return torch.where(frozen, w, w * 3 * noise)


# --- counts, ties, several portions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("numel", [1, 31, 32, 33, 1000])
def test_counts_are_exact_in_every_portion(numel, partition):
    g = torch.Generator().manual_seed(numel)
    w, frozen = torch.randn(numel, generator=g), None
    for percent in range(0, 101, 4):
        w, frozen, _ = inq.quantize_with_mask(w, frozen, percent / 100, FMT, partition=partition, generator=g)
        assert int(frozen.sum()) == (2 * percent * numel + 100) // 200


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=24),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(FORMATS),
    st.one_of(st.none(), st.integers(0, 2**24 - 1)),
)
@settings(max_examples=150, deadline=None)
def test_portions_with_many_ties_against_the_oracle(integers, portions, dtype, fmt, prune_bits):
    w = torch.tensor(integers).to(dtype) * 0.25
    kept = None if prune_bits is None else {i for i in range(len(integers)) if prune_bits >> i & 1}
    prune_mask = None if kept is None else torch.tensor([i in kept for i in range(len(integers))])
    frozen, n1 = None, None
    for portion in sorted(portions):
        before = torch.zeros_like(w, dtype=torch.bool) if frozen is None else frozen
        w_hat, frozen, n1 = inq.quantize_with_mask(w, frozen, portion, fmt, n1=n1, prune_mask=prune_mask)
        expected, after = expected_step(w, before, portion, fmt, int(n1[0]), kept)
        assert indices(frozen) == after
        assert same_bits(w_hat, expected)
        w = w_hat


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_weights_keep_their_bits_while_the_others_are_retrained(dtype, partition):
    # 2 bits, where a mask taken from |w| anew re-opens 94 % of the frozen weights (mistake 1 of PAPER.md).
    fmt, g = inq.Format(2), torch.Generator().manual_seed(3)
    w = torch.randn(20, 30, generator=g).to(dtype)
    frozen, n1 = None, None
    for portion in PAPER_PORTIONS:
        w_hat, now, n1 = inq.quantize_with_mask(w, frozen, portion, fmt, n1=n1, partition=partition, generator=g)
        if frozen is not None:
            assert bool(now[frozen].all()), "a frozen weight was opened"
            assert same_bits(w_hat[frozen], w[frozen])
        assert same_bits(w_hat[~now], w[~now])
        assert int(now.sum()) == int(portion * 600 + 0.5)
        assert same_bits(w_hat[now], inq.quantize(w_hat, fmt, n1)[now])
        w, frozen = perturb(w_hat, now, g), now
    # Mistake 6: the last portion leaves nothing out.
    assert bool(frozen.all())
    inq.pack(w, fmt, n1)


@pytest.mark.parametrize("numel", [1, 31, 32, 33])
def test_the_last_portion_freezes_everything(numel):
    w = torch.randn(numel, generator=torch.Generator().manual_seed(4))
    for first in (0.0, 0.3, 0.999):
        w_hat, frozen, n1 = inq.quantize_with_mask(w, None, first, FMT)
        w_hat, frozen, n1 = inq.quantize_with_mask(w_hat, frozen, 1, FMT, n1=n1)
        assert bool(frozen.all())
        assert same_bits(w_hat, inq.quantize(w, FMT, n1))
        again, still, _ = inq.quantize_with_mask(w_hat, frozen, 1.0, FMT, n1=n1)
        assert bool(still.all())
        assert same_bits(again, w_hat)


def test_ties_go_to_the_lower_flat_index():
    w = torch.tensor([[0.5, -1.0, 1.0], [1.0, -1.0, 0.5]])
    frozen = None
    for portion, expected in [(1 / 6, {1}), (2 / 6, {1, 2}), (4 / 6, {1, 2, 3, 4}), (5 / 6, {0, 1, 2, 3, 4})]:
        _, frozen, _ = inq.quantize_with_mask(w, frozen, portion, FMT)
        assert indices(frozen) == expected


def test_frozen_weights_are_not_quantized_again():
    # 0.3 is no level; frozen, it stays. The free weights take part with the n1 that is given.
    w = torch.tensor([0.3, -0.7, 5.0])
    frozen = torch.tensor([True, False, False])
    n1 = torch.zeros(3, 1, dtype=torch.int8)
    w_hat, frozen, _ = inq.quantize_with_mask(w, frozen, 2 / 3, FMT, n1=n1)
    assert same_bits(w_hat, torch.tensor([0.3, -0.7, 1.0]))
    assert frozen.tolist() == [True, False, True]


def test_n1_comes_from_all_weights_of_the_first_portion():
    w = torch.randn(8, 9, generator=torch.Generator().manual_seed(5))
    for fmt in (FMT, inq.Format(4, granularity="channel"), inq.Format.paper(5)):
        _, _, n1 = inq.quantize_with_mask(w, None, 0.2, fmt)
        assert torch.equal(n1, inq.exponents(w, fmt))


def test_arguments_are_not_changed_and_strides_do_not_matter():
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(6)).T
    w.requires_grad_()
    frozen = (torch.arange(35).view(7, 5) % 7 == 0).T
    prune_mask = (torch.arange(35).view(7, 5) % 3 != 1).T | frozen
    inputs = (w, frozen, prune_mask)
    before = [t.detach().clone() for t in inputs]
    n1 = inq.exponents(w, FMT)
    w_hat, now, _ = inq.quantize_with_mask(w, frozen, 0.6, FMT, n1=n1, prune_mask=prune_mask)
    expected, after = expected_step(w.detach(), frozen, 0.6, FMT, int(n1[0]), indices(prune_mask))
    assert indices(now) == after
    assert torch.equal(w_hat, expected)
    assert not w_hat.requires_grad
    assert all(torch.equal(a.detach(), b) for a, b in zip(inputs, before, strict=True))


# --- more than 2^24 weights (mistake 10: torch.quantile, counts in float32) ------------------------------------------


@pytest.mark.parametrize(("count", "random"), [(17_000_003, False), (18_000_001, False), (13_333_333, True)])
def test_twenty_million_weights(count, random):
    # 17,500,001 weights of magnitude 2, the others of magnitude 1. With the first count more than 2^24 ties are taken,
    # with the second more than 2^24, and an odd number, are larger than the tie: float32 counts neither.
    numel = 20_000_000
    index = torch.arange(numel, dtype=torch.int32)
    w = torch.where((index % 8 == 5) & (index > 5), 1.0, 2.0) * torch.where(index % 3 == 0, -1, 1)
    before, mask = w.clone(), torch.zeros(numel // 8, dtype=torch.uint8)
    n1 = torch.full((1, 1), -1, dtype=torch.int8)
    threshold = ops.partition_threshold(w[None], mask, None, count, random, 9)
    ops.quantize_with_mask_(w[None], mask, n1, threshold, None, 3, "paper", random, 9)
    frozen = unpack_bits(mask, (numel,))
    assert int(frozen.sum()) == count
    assert torch.equal(w, torch.where(frozen, before.sign() / 2, before))
    if random:
        assert abs(int(frozen[: numel // 2].sum()) / count - 0.5) < 1e-3
        return
    smallest, largest = before[frozen].abs().min(), before[~frozen].abs().max()
    assert smallest == largest == (2 if count < 17_500_001 else 1), "the cut goes through a tie"
    tied = frozen[before.abs() == smallest].char()
    assert bool((tied.diff() <= 0).all()), "in a tie the lower flat index is frozen first"


# --- random -----------------------------------------------------------------------------------------------------------


def random_frozen(w, count, seed, mask=None, keep=None):
    mask = torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8) if mask is None else mask.clone()
    threshold = ops.partition_threshold(w, mask, keep, count, True, seed)
    n1 = torch.zeros(w.shape[0], 1, dtype=torch.int8)
    ops.quantize_with_mask_(w.clone(), mask, n1, threshold, keep, 3, "paper", True, seed)
    return unpack_bits(mask, w.shape)


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_random_ranks_are_the_hash_of_seed_and_index(seed):
    w = torch.randn(8, 25)
    order = sorted(range(200), key=lambda i: -oracle.random_key(seed, i))
    for count in (1, 50, 199):
        assert indices(random_frozen(w, count, seed)) == set(order[:count])


def test_random_depends_on_seed_and_index_alone():
    first = random_frozen(torch.randn(8, 125), 400, seed=7)
    for other in (torch.zeros(8, 125), torch.randn(8, 125, dtype=torch.float16), torch.randn(125, 8).T):
        assert torch.equal(random_frozen(other, 400, seed=7), first)
    assert torch.equal(random_frozen(torch.randn(1000, 1), 400, seed=7).view(8, 125), first)
    assert not torch.equal(random_frozen(torch.randn(8, 125), 400, seed=8), first)


def test_random_portions_are_nested():
    w, frozen = torch.randn(1000, 1), torch.zeros(1000, 1, dtype=torch.bool)
    for count in (100, 300, 600):
        frozen = random_frozen(w, count - int(frozen.sum()), seed=11, mask=pack_bits(frozen))
        assert torch.equal(frozen, random_frozen(w, count, seed=11))


def test_random_is_uniform():
    frozen = random_frozen(torch.zeros(100_000, 1), 30_000, seed=12).view(-1).double()
    # 5 standard deviations of a hypergeometric count in blocks of 10,000, and in every 10th index.
    limit = 5 * (10_000 * 0.3 * 0.7 * 0.9) ** 0.5
    for blocks in (frozen.view(10, -1).sum(1), frozen.view(-1, 10).sum(0)):
        assert (blocks - 3000).abs().max() < limit
    # A weight tells nothing about the next one.
    assert abs(float(torch.corrcoef(torch.stack([frozen[1:], frozen[:-1]]))[0, 1])) < 0.02


def test_random_is_reproducible_with_a_generator():
    w = torch.randn(50, 4)

    def frozen(seed):
        g = torch.Generator().manual_seed(seed)
        return inq.quantize_with_mask(w, None, 0.5, FMT, partition="random", generator=g)[1]

    assert torch.equal(frozen(1), frozen(1))
    assert not torch.equal(frozen(1), frozen(2))
    torch.manual_seed(1)
    default = inq.quantize_with_mask(w, None, 0.5, FMT, partition="random")[1]
    assert torch.equal(default, frozen(1))


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", PARTITIONS)
def test_portions_count_the_kept_weights_only(partition):
    g = torch.Generator().manual_seed(8)
    w = torch.randn(10, 33, generator=g)
    prune_mask = torch.rand(10, 33, generator=g) < 0.4
    kept, frozen, n1 = int(prune_mask.sum()), None, None
    for portion in (0.05, 0.3, 1.0):
        w, frozen, n1 = inq.quantize_with_mask(
            w, frozen, portion, FMT, n1=n1, partition=partition, prune_mask=prune_mask, generator=g
        )
        assert int(frozen.sum()) == int(portion * kept + 0.5)
        assert not bool(frozen[~prune_mask].any())
        assert same_bits(w[~prune_mask], torch.zeros(330 - kept))


def test_a_pruned_outlier_does_not_set_n1():
    w = torch.tensor([[100.0, 1.0, -0.5]])
    _, _, n1 = inq.quantize_with_mask(w, None, 1, inq.Format.paper(3), prune_mask=torch.tensor([[False, True, True]]))
    assert n1.item() == 0


def test_everything_pruned():
    w = torch.randn(2, 3)
    w_hat, frozen, n1 = inq.quantize_with_mask(w, None, 1.0, FMT, prune_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert same_bits(w_hat, torch.zeros(2, 3))
    assert not bool(frozen.any())
    assert n1.tolist() == [[0], [0]]


# --- the operators ----------------------------------------------------------------------------------------------------


def test_threshold_is_the_key_and_the_number_of_ties_to_take():
    w = torch.tensor([[1.0, -3.0, 2.0, 2.0, -2.0]])
    mask = pack_bits(torch.tensor([False, False, True, False, False]))
    key = torch.tensor([2.0]).view(torch.int32).item()
    assert ops.partition_threshold(w, mask, None, 2, False, 0).tolist() == [key, 1]
    assert ops.partition_threshold(w, mask, None, 3, False, 0).tolist() == [key, 2]
    keep = pack_bits(torch.tensor([True, False, True, True, True]))
    assert ops.partition_threshold(w, mask, keep, 1, False, 0).tolist() == [key, 1]
    with pytest.raises(ValueError, match="count: expected 0 to 3 unfrozen weights, got 4"):
        ops.partition_threshold(w, mask, keep, 4, False, 0)


@pytest.mark.parametrize("random", [False, True])
def test_count_zero_selects_nothing(random):
    w = torch.tensor([[1.0, -3.0, 0.3]])
    before, mask = w.clone(), torch.tensor([0b010], dtype=torch.uint8)
    threshold = ops.partition_threshold(w, mask, None, 0, random, 5)
    ops.quantize_with_mask_(w, mask, torch.zeros(1, 1, dtype=torch.int8), threshold, None, 3, "paper", random, 5)
    assert same_bits(w, before)
    assert mask.tolist() == [0b010]


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, random):
    w = torch.randn(3, 5, dtype=dtype)
    mask, n1 = pack_bits(torch.arange(15) % 4 == 0), torch.zeros(3, 1, dtype=torch.int8)
    for keep in (None, pack_bits(torch.arange(15) % 3 != 1)):
        arguments = (w, mask, keep, 5, random, 3)
        torch.library.opcheck(ops.partition_threshold.default, arguments)
        threshold = ops.partition_threshold(*arguments)
        torch.library.opcheck(ops.quantize_with_mask_.default, (w, mask, n1, threshold, keep, 4, "dense", random, 3))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"portion": -0.1}, ValueError, r"portion: expected a number in \[0, 1\], got -0.1"),
        ({"portion": 1.0001}, ValueError, r"portion: expected a number in \[0, 1\], got 1.0001"),
        ({"portion": float("nan")}, ValueError, "portion: .* got nan"),
        ({"portion": True}, TypeError, "portion: .* got True"),
        ({"portion": "1"}, TypeError, "portion: .* got '1'"),
        ({"frozen": torch.ones(2, 3)}, TypeError, "frozen: expected a bool tensor, got torch.float32"),
        ({"frozen": [True]}, TypeError, "frozen: expected a bool tensor, got list"),
        ({"frozen": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"frozen: expected shape \[2, 3\].*got \[3, 2\]"),
        ({"prune_mask": torch.ones(2, 3)}, TypeError, "prune_mask: expected a bool tensor, got torch.float32"),
        ({"prune_mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"prune_mask: expected shape \[2, 3\]"),
        ({"frozen": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "portion: 0.5 means 3 weights, 6 are frozen"),
        (
            {"frozen": torch.eye(2, 3) > 0, "prune_mask": torch.eye(2, 3) == 0},
            ValueError,
            "frozen: expected no pruned weight",
        ),
        ({"partition": "smallest"}, ValueError, r"partition: expected one of .*, got 'smallest'"),
    ],
)
def test_errors(arguments, error, text):
    w = torch.ones(2, 3)
    with pytest.raises(error, match=f"^inq.quantize_with_mask: {text}"):
        inq.quantize_with_mask(w, **{"frozen": None, "portion": 0.5, "fmt": FMT, **arguments})
    assert torch.equal(w, torch.ones(2, 3))
