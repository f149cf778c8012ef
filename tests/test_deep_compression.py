"""Deep Compression and its parts: relative indices, Huffman codes, k-means codebooks, trained centroids, sizes;
by hand, beside scikit-learn, and by what must hold for any input."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from inq_kernels.baselines import deep_compression as dc
from inq_kernels.baselines import huffman, meter, relative

quick = settings(max_examples=60, deadline=None)


def ints(*values):
    return torch.tensor(values)


# --- relative indices -------------------------------------------------------------------------------------------------


def test_relative_indices_of_the_papers_figure_by_hand():
    """Figure 2: nonzero values at 1, 4 and 15, 3 bits. The gaps between are 1 (one zero before), 2, and 10 zeros before
    15: a filler takes 8 places (7 zeros, and the one that it stands on, place 12), 2 zeros are left."""
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[[1, 4, 15]] = torch.tensor([3, 1, 2], dtype=torch.uint8)
    entries = relative.encode(codes, 3)
    assert entries.gaps.tolist() == [1, 2, 7, 2]
    assert entries.codes.tolist() == [3, 1, 0, 2]
    assert entries.fillers.tolist() == [False, False, True, False]
    assert relative.decode(entries, 16).tolist() == codes.tolist()


def test_relative_indices_at_the_ends_by_hand():
    # 1 bit: gaps of 0 and 1. Four zeros: two fillers of two places each. Nothing stands for the zeros at the end.
    entries = relative.encode(ints(0, 0, 0, 0, 5, 6, 0, 0, 0), 1)
    assert (entries.gaps.tolist(), entries.codes.tolist()) == ([1, 1, 0, 0], [0, 0, 5, 6])
    nothing = relative.encode(torch.zeros(9, dtype=torch.int64), 4)
    assert (nothing.gaps.numel(), relative.decode(nothing, 9).tolist()) == (0, [0] * 9)


@quick
@given(st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2, 7]), max_size=200), st.integers(1, 6))
def test_relative_indices_decode_back(values, bits):
    codes = torch.tensor(values, dtype=torch.int64)
    entries = relative.encode(codes, bits)
    assert torch.equal(relative.decode(entries, codes.numel()), codes)
    assert entries.gaps.numel() == 0 or (int(entries.gaps.min()) >= 0 and int(entries.gaps.max()) < 1 << bits)
    assert int((~entries.fillers).sum()) == int((codes != 0).sum())
    assert bool((entries.gaps[entries.fillers] == (1 << bits) - 1).all())


# --- Huffman ----------------------------------------------------------------------------------------------------------


def test_huffman_by_hand():
    """5, 2, 1, 1, 0: the ones join (2), with the two (4), with the five (9): lengths 1, 2, 3, 3; canonical codes 0, 10,
    110, 111. a b a c d → 0 10 0 110 111 0… = 01001101 11000000."""
    table = huffman.lengths([5, 2, 1, 1, 0])
    assert table == [1, 2, 3, 3, 0]
    assert huffman._canonical(table) == [0b0, 0b10, 0b110, 0b111, 0]
    data = huffman.encode(ints(0, 1, 0, 2, 3), table)
    assert data == bytes([0b01001101, 0b11000000])
    assert huffman.decode(data, table, 5).tolist() == [0, 1, 0, 2, 3]


def test_huffman_of_one_symbol_and_of_none():
    assert huffman.lengths([0, 4]) == [0, 1]
    assert huffman.decode(huffman.encode(ints(1, 1, 1, 1), [0, 1]), [0, 1], 4).tolist() == [1] * 4
    assert huffman.lengths([0, 0]) == [0, 0]
    assert huffman.encode(torch.zeros(0, dtype=torch.int64), [0, 0]) == b""


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=300))
def test_huffman_decodes_back_and_is_within_a_bit_of_the_entropy(values):
    symbols = torch.tensor(values)
    counts = huffman.symbol_counts(symbols, 10)
    table = huffman.lengths(counts)
    data = huffman.encode(symbols, table)
    assert huffman.decode(data, table, len(values)).tolist() == values
    used = [length for length in table if length]
    bits = sum(count * length for count, length in zip(counts, table, strict=True))
    assert len(data) == math.ceil(bits / 8)
    entropy = meter.entropy_bits(symbols)
    if len(used) > 1:
        assert entropy - 1e-9 <= bits < entropy + len(values)
        assert sum(2.0**-length for length in used) == 1.0, "Kraft: no code is wasted"
        # Optimal: no rarer symbol has a shorter code.
        assert all(
            a <= b or count_a <= count_b
            for count_a, a in zip(counts, table, strict=True)
            for count_b, b in zip(counts, table, strict=True)
            if a and b
        )


def test_huffman_refuses_what_it_has_no_code_for():
    with pytest.raises(ValueError, match="expected symbols that the table has a code for"):
        huffman.encode(ints(0, 2), [1, 1, 0])
    with pytest.raises(ValueError, match="expected 20 symbols, got an end after 16"):
        huffman.decode(bytes(2), [1, 1], 20)


# --- codebooks --------------------------------------------------------------------------------------------------------


def test_kmeans_by_hand():
    """0, 1, 2, 10 with two centroids begin at 0 and 10. Halfway is 5: 0, 1, 2 and 10. Means 1 and 10; halfway 5.5: the
    same again."""
    values = torch.tensor([10.0, 0.0, 2.0, 1.0])
    centroids = dc.kmeans(values, 2)
    assert centroids.tolist() == [1.0, 10.0]
    assert dc.assign(values, centroids).tolist() == [1, 0, 0, 0]
    # Three begin at 0, 5, 10; nothing is nearest to 5, which stays.
    assert dc.kmeans(torch.tensor([0.0, 1.0, 10.0]), 3).tolist() == [0.5, 5.0, 10.0]
    # A tie goes to the lower one.
    assert dc.assign(torch.tensor([5.5]), centroids).tolist() == [0]
    assert dc.kmeans(torch.tensor([2.0, 2.0]), 3).tolist() == [2.0] * 3


@pytest.mark.parametrize("k", [1, 7, 15])
def test_kmeans_is_that_of_scikit_learn(k):
    from sklearn.cluster import KMeans

    values = torch.randn(800, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    first = torch.linspace(float(values.min()), float(values.max()), k, dtype=torch.float64) if k > 1 else values.min()
    theirs = KMeans(k, init=first.view(-1, 1).numpy(), n_init=1, max_iter=1000, tol=0).fit(values.view(-1, 1).numpy())
    ours = dc.kmeans(values, k)
    assert torch.allclose(ours, torch.tensor(theirs.cluster_centers_).view(-1), atol=1e-9)
    assert dc.assign(values, ours).tolist() == theirs.labels_.tolist()


def test_the_gradient_of_a_centroid_is_the_sum_of_its_weights_by_hand():
    """W = (1, 1.5, 0, −2): 2 bits, three centroids from −2, −0.25, 1.5: −2 alone; 1 and 1.5 are nearest to 1.5 (halfway
    is 0.625), mean 1.25; nothing at −0.25. x = (1, 2, 4, 8): the gradient of 1.25 is 1 + 2, of −2 it is 8."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.5, 0.0, -2.0]]))
    dc.share_(model, 2)
    (centroids,) = model.parameters()
    assert centroids.tolist() == [-2.0, -0.25, 1.25]
    assert model[0].weight.tolist() == [[1.25, 1.25, 0.0, -2.0]]
    model(torch.tensor([[1.0, 2.0, 4.0, 8.0]])).sum().backward()
    assert centroids.grad.tolist() == [8.0, 0.0, 3.0]
    # lr 0.25: −2 − 2, −0.25, 1.25 − 0.75.
    torch.optim.SGD([centroids], 0.25).step()
    dc.finish_sharing_(model)
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert model[0].weight.tolist() == [[0.5, 0.5, 0.0, -4.0]]


# --- the whole of it --------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, t = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()


def test_prune_retrain_share_retrain_and_measure():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, 2)
    largest = model[4].weight.detach().abs().flatten().topk(288).indices
    dc.prune_(model, {"0": 0.5, "4": 0.1})
    kept = {0: model[0].weight != 0, 4: model[4].weight != 0}
    assert [int(mask.sum()) for mask in kept.values()] == [36, 288]
    assert bool(kept[4].flatten()[largest].all())
    before = model[4].weight.detach().clone()
    train(model, optimizer, 4)  # the optimizer goes on with the same parameters
    dc.finish_pruning_(model)
    assert bool(((model[4].weight != before) == kept[4]).all())
    dc.share_(model, dc.conv_and_linear(model, 4, 3))
    train(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), 4)
    dc.finish_sharing_(model)
    for i, count in ((0, 16), (4, 8)):
        w = model[i].weight.detach()
        assert bool((w[~kept[i]] == 0).all())
        assert 1 < len(w.unique()) <= count
    arguments = (model, dc.conv_and_linear(model, 4, 3))
    plain, coded = (
        meter.measure(model, dc.sizes(*arguments, coded=coded), "Deep Compression") for coded in (False, True)
    )
    assert [layer.nonzero for layer in plain.layers] == [36, 288]
    assert plain.part("codes") == (36 * 4 + 288 * 3) / 8
    assert plain.part("codebooks") == 4 * sum(len(model[i].weight.unique()) for i in (0, 4))
    assert coded.part("codes") + coded.part("indices") < plain.part("codes") + plain.part("indices")
    assert set(plain.floats) == {
        *("0.bias", "4.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    }


def test_the_size_of_a_layer_by_hand():
    """−2 0 0 0 0 0 −2 1: codes 1 and 2 (of 2 bits; 0 is zero's). Gaps of 2 bits: 0 before the first; five before the
    next: a filler of four places, then 1; 0. So 4 entries, one of them a filler.

    As they are: codes 3·2 bits, gaps 3·2, the filler 4; both streams have 8 bits, so that nothing fills up a byte.
    Coded: codes 1 0 1 2 with counts 1, 2, 1: lengths 2, 1, 2: 1 + 1 + 2 bits, and 2 of the filler. Gaps 0 3 1 0 with
    counts 2, 1, 0, 1: lengths 1, 2, 0, 2: 1 + 2 + 1, and 2 of the filler. 6 bits each: 2 more fill up either byte.
    Codebook: 0 and 2 more floats. Tables: 32 bits for the number of entries, and when coded lengths of 8 bits for 3
    codes and 4 gaps."""
    w = torch.tensor([[-2.0, 0, 0, 0], [0, 0, -2.0, 1.0]])
    plain = dc.layer_size("fc", w, 2, 2, coded=False)
    parts = (plain.codes, plain.indices, plain.padding, plain.codebooks, plain.tables, plain.nonzero)
    assert parts == (6, 6, 4, 96, 32, 3)
    coded = dc.layer_size("fc", w, 2, 2)
    assert (coded.codes, coded.indices, coded.padding, coded.codebooks, coded.tables) == (4, 4, 8, 96, 88)
    # −2 twice, 0 five times, 1 once.
    entropy = 2 * math.log2(8 / 2) + 5 * math.log2(8 / 5) + math.log2(8)
    assert coded.entropy == plain.entropy == pytest.approx(entropy)


@quick
@given(st.lists(st.integers(0, 7), min_size=1, max_size=100), st.integers(1, 5))
def test_sizes_are_those_of_the_streams(values, index_bits):
    codes = torch.tensor(values)
    parts = dc.sparse_parts(codes, 3, index_bits)
    entries = relative.encode(codes, index_bits)
    tables = [huffman.lengths(huffman.symbol_counts(symbols, 0)) for symbols in (entries.codes, entries.gaps)]
    streams = [huffman.encode(s, t) for s, t in zip((entries.codes, entries.gaps), tables, strict=True)]
    assert parts["codes"] + parts["indices"] + parts["padding"] == 8 * sum(map(len, streams))
    assert parts["tables"] == 32 + 8 * sum(map(len, tables))


BAD = {
    "keep": (lambda m: dc.prune_(m, 0.0), r"prune_: keep: expected fractions in \(0, 1\], got 0.0 for '0'"),
    "keep-typo": (lambda m: dc.prune_(m, {"fc": 0.1}), "keep: expected a pattern that matches a module, got 'fc'"),
    "keep-some": (lambda m: dc.prune_(m, {"0": 0.1}), "keep: expected a pattern for every layer, .* matches '4'"),
    "bits": (lambda m: dc.share_(m, 0), "share_: bits: expected an int from 1 to 16, got 0"),
    "zeros": (lambda m: dc.share_(m, 4), "layer '4': expected nonzero weights, got none"),
    "sizes": (lambda m: dc.sizes(m, 4), "layer '0': expected at most 15 different nonzero values at 4 bits, got 72"),
    "index_bits": (lambda m: dc.sizes(m, 4, 0), "index_bits: expected an int from 1 to 16, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_have_one_clear_error_and_change_nothing(case):
    call, message = BAD[case]
    model = net()
    if case == "zeros":
        nn.init.zeros_(model[4].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("call", [lambda m: dc.prune_(m, 0.5), lambda m: dc.share_(m, 3)], ids=["prune_", "share_"])
def test_what_other_modules_share_and_what_is_not_finite_is_refused(call):
    """The module would compute its weight from others, and the one that shares it would keep the old parameter."""
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    tied[2].weight = tied[0].weight
    names = dict(tied.named_parameters()).keys()
    with pytest.raises(ValueError, match=r"layer '2': .* of its own, got one of \['0.weight', '2.weight'\]"):
        call(tied)
    assert dict(tied.named_parameters()).keys() == names
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="layer '4': expected finite values, got 0 NaN and 1 Inf of 2880"):
        call(model)
    # One module at two places is one weight.
    linear = nn.Linear(4, 4)
    twice = nn.Sequential(linear, linear)
    call(twice)
    assert torch.equal(twice[0].weight, twice[1].weight)


def test_biases_that_the_user_pruned_stay_as_they_are():
    model = net()
    nn.utils.prune.l1_unstructured(model[4], "bias", 3)
    dc.prune_(model, 0.5)
    dc.finish_pruning_(model)
    dc.finish_pruning_(model)
    assert [name for name, _ in model[4].named_parameters()] == ["bias_orig", "weight"]
    assert int((model[4].bias == 0).sum()) == 3


# AlexNet's layers: weights, the fraction that the paper keeps (its table 4, from memory), and bits of a code.
ALEXNET = (
    *((34_848, 0.84, 8), (307_200, 0.38, 8), (884_736, 0.35, 8), (663_552, 0.37, 8), (442_368, 0.37, 8)),
    *((37_748_736, 0.09, 5), (16_777_216, 0.09, 5), (4_096_000, 0.25, 5)),
)


def alexnet_ratio(fractions, bits_of):
    """32 bits for each of AlexNet's weights over ``bits_of(codes, layer)``, zeros at random; codes of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for layer, keep in zip(ALEXNET, fractions, strict=True):
        sample = min(layer[0], 100_000)
        codes = (torch.rand(sample, generator=generator) < keep).long()
        total += layer[0] / sample * bits_of(codes, layer)
    return 32 * sum(numel for numel, *_ in ALEXNET) / total


def page_says(text):
    return text in " ".join((Path(__file__).parent.parent / "docs" / "comparisons.md").read_text().split())


def test_the_published_ratio_of_alexnet():
    """27 times smaller without Huffman coding, at 8 and 5 bits (PAPER.md, T5) and 4 bits an index: within 6 % of that,
    with zeros at random and fractions that the paper rounds to a percent."""

    def stored(codes, layer):
        parts = dc.sparse_parts(codes, layer[2], 4, coded=False)
        return parts["codes"] + parts["indices"] + parts["padding"]

    ratio = alexnet_ratio([keep for _, keep, _ in ALEXNET], stored)
    assert ratio == pytest.approx(27, rel=0.06)
    assert page_says(f"this meter says {ratio:.1f}×")


# What DNS keeps of them (PAPER.md).
DNS_KEEPS = (0.538, 0.406, 0.29, 0.323, 0.325, 0.037, 0.066, 0.046)


def test_the_published_ratios_of_dns():
    """From 61 to 3.45 million weights, and what INQ's codes of those take at the most: every value as likely."""
    numel, kept = (sum(n * k for (n, *_), k in zip(ALEXNET, keeps, strict=True)) for keeps in ([1] * 8, DNS_KEEPS))
    assert (round(numel / 1e6), round(kept / 1e6, 2), round(numel / kept, 1)) == (61, 3.45, 17.7)
    assert page_says("With 17.7 times fewer weights")
    assert page_says(f"codes alone would be {numel / kept * 32 / 5:.0f}×")
    assert page_says(f"53× means about {32 * numel / kept / 53:.1f} bits for each weight that is left")

    def most(codes, bits):
        # One of 2^(bits − 1) values, all equally likely: ±2ⁿ.
        return meter.entropy_bits(codes) + (bits - 1) * int(codes.sum())

    least = [alexnet_ratio(DNS_KEEPS, lambda codes, _, bits=bits: most(codes, bits)) for bits in (5, 4, 3)]
    assert page_says("at least {:.0f}×, {:.0f}× and {:.0f}×".format(*least)), least
