"""``make tables``: its statistics on hand-worked numbers, its saved jobs, its page, and all of it, quick."""

import dataclasses
import importlib
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tables_page import BLOCK, MISSED, PAGE, README, RESULTS, checks, complete, readme
from torch import nn

import inq_kernels as inq
from inq_kernels import checkpoint, reference
from inq_kernels.baselines import deep_compression, meter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # examples is a folder of the repository, not of the package

from examples.tables import intervals, jobs, methods, networks, page, paper, tables, tasks  # noqa: E402

command = importlib.import_module("examples.tables.__main__")
TINY = dataclasses.replace(tasks.QUICK, steps=12)
NET = "lenet-300-100"


# --- the statistics ---------------------------------------------------------------------------------------------------


def test_the_interval_of_one_to_five():
    """s² = 10/4, and t(4, 97.5 %) = 2.776445 in any table: 2.776445·√(2.5/5) = 1.963243."""
    found = intervals.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.half == pytest.approx(1.963243, abs=1e-6)
    assert found.text() == "3.00 ± 1.96"
    assert found.sign() == 1


def test_two_values_and_one():
    """Of 0 and 2: s = √2, t(1) = 12.7062, so ± 12.7062."""
    assert intervals.estimate([0.0, 2.0]).half == pytest.approx(12.7062, abs=1e-4)
    alone = intervals.estimate([0.7])
    assert (alone.half, alone.text(), alone.sign()) == (None, "0.70", 0)


def test_differences_are_paired():
    """The seeds differ by tens, the methods by 1 within each."""
    found = intervals.paired([11.0, 21.5, 30.5], [10.0, 20.0, 30.0])
    # 1, 1.5, 0.5: s = 0.5, t(2) = 4.302653.
    assert found.mean == pytest.approx(1)
    assert found.half == pytest.approx(4.302653 * 0.5 / 3**0.5, abs=1e-6)
    with pytest.raises(ValueError):
        intervals.paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [(-0.5, 0.25, "−0.50 ± 0.25"), (-0.001, 0.1, "+0.00 ± 0.10"), (0.5, None, "+0.50")],
)
def test_signed_text(mean, half, text):
    assert intervals.Estimate(mean, half, 3).text(signed=True) == text


@pytest.mark.parametrize(
    ("mean", "half", "sign", "seen"),
    [
        (1.0, 0.5, 1, "yes"),
        (-1.0, 0.5, 1, "no: the other way round"),
        (-1.0, 0.5, -1, "yes"),
        (0.3, 0.5, 1, "not told apart"),
        (1.0, 0.5, 0, "no: worse"),
        (-1.0, 0.5, 0, "yes: better"),
        (0.3, 0.5, 0, "not told apart"),
        (0.0, 0.0, 0, "not told apart"),
        (1.0, None, 1, "no interval"),
    ],
)
def test_what_an_interval_says(mean, half, sign, seen):
    assert tables.Claim("", NET, intervals.Estimate(mean, half, 5), sign).seen() == seen


# --- what everyone gets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [4, 6, 8, 10, 12])
def test_portions_share_the_steps(parts):
    further = tasks.Recipe().further
    assert tasks.shares(further, parts) == [further // parts] * parts
    assert sum(tasks.shares(11, parts)) == 11


def test_all_portions_of_the_tables_are_of_such_a_number():
    lengths = {len(inq.PAPER_PORTIONS[bits]) for bits in (5, 4, 3, 2)} | {len(inq.DNS_PORTIONS)}
    lengths.add(len(methods.TERNARY_PORTIONS))
    assert all(tasks.Recipe().further % length == 0 for length in lengths)


def test_every_method_sees_the_same_batches():
    """And goes on with them over its phases."""
    task, seen = tasks.DigitsTask(NET, TINY), []
    for phases in ([12], [5, 7]):
        model = task.build()
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        trainer = task.further(model, max(phases), 3, 0.03)
        for steps in phases:
            trainer.train(steps)
    assert len(seen) == 24
    assert all(torch.equal(a, b) for a, b in zip(seen[:12], seen[12:], strict=True))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", list(networks.NETWORKS))
def test_networks(name):
    network = networks.NETWORKS[name]
    model = network.build()
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert set(network.of_paper) <= set(paper.T1)
    assert len(methods.first_and_last(model)) == 2


def test_the_papers_networks_are_all_there():
    assert {name for network in networks.NETWORKS.values() for name in network.of_paper} == set(paper.T1)


# --- the sizes --------------------------------------------------------------------------------------------------------


def test_coded_bytes_are_those_of_the_file(tmp_path):
    """Ternary weights, mostly zero: a large layer is coded, in so many bytes, and a tiny one stays packed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 256) < 0.05)
    inq.convert(model, inq.Format(2))
    coded = methods.coded_bytes(model)
    inq.save(model, tmp_path / "model.safetensors", compress=True)
    layers = {layer.name: layer for layer in checkpoint.inspect(tmp_path / "model.safetensors").layers}
    assert layers["0"].coding != "packed"
    assert coded["0"] == layers["0"].bytes - 64
    assert coded.keys() == {name for name, layer in layers.items() if layer.coding != "packed"}
    sizes = meter.inq_layers(model, coded)
    assert sizes[0].bits == 8 * layers["0"].bytes
    assert sizes[0].bits < meter.inq_layers(model)[0].bits / 2


def test_inq_stored_as_deep_compression_is_not_under_its_bound():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64))
    inq.convert(model, inq.Format(3))
    (size,) = meter.inq_layers(model)
    relative = methods.relative_layer(size, model[0].packed)
    assert relative.nonzero == size.nonzero
    assert relative.codes >= 0
    assert relative.codes + relative.indices + relative.padding >= relative.entropy * 0.99
    assert relative.exponents == 8 * 64


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """A chain of two methods that count how often they ran."""
    ran = []

    def first(given):
        ran.append("first")
        return {"value": float(given.seed)}, {"x": torch.ones(2) * given.seed}

    def second(given):
        ran.append("second")
        return {"value": given.results["first"]["value"] + float(given.tensors["first"]["x"][0])}, {}

    known = {"first": methods.Method(first, ()), "second": methods.Method(second, ("first",))}
    monkeypatch.setattr(jobs, "METHODS", known)
    return ran


def run(out, recipe=TINY, seeds=(1,)):
    store = jobs.Store(out, {"digits": recipe})
    done = jobs.run_all(store, jobs.jobs({NET: ["second"]}, seeds), 1)
    return {(job.method, job.seed): result["value"] for job, result in done.items()}


def test_what_is_done_is_taken_over(tmp_path, counted):
    expected = {("first", 1): 1.0, ("second", 1): 2.0}
    assert run(tmp_path) == expected
    assert counted == ["first", "second"]
    assert run(tmp_path) == expected
    assert counted == ["first", "second"]
    # More seeds, and nothing of the first one again.
    assert run(tmp_path, seeds=(1, 2))["second", 2] == 4.0
    assert counted == ["first", "second"] * 2


def damage_json(out, monkeypatch):
    (out / "jobs" / f"{NET}-second-seed1.json").write_text('{"key": ')
    return ["second"]


def damage_start(out, monkeypatch):
    (out / "starts" / f"{NET}-first-seed1.safetensors").unlink()
    return ["first"]


def change_code(out, monkeypatch):
    monkeypatch.setattr(jobs, "fingerprint", lambda: {"code": "other"})
    return ["first", "second"]


@pytest.mark.parametrize("damage", [damage_json, damage_start, change_code])
def test_what_is_not_whole_or_not_of_this_code_runs_again(tmp_path, counted, monkeypatch, damage):
    run(tmp_path)
    counted.clear()
    again = damage(tmp_path, monkeypatch)
    assert run(tmp_path) == {("first", 1): 1.0, ("second", 1): 2.0}
    assert counted == again


def test_other_settings_run_again(tmp_path, counted):
    run(tmp_path)
    counted.clear()
    run(tmp_path, dataclasses.replace(TINY, further=24))
    assert counted == ["first", "second"]


def test_a_stopped_run_goes_on(tmp_path, counted, monkeypatch):
    def fails(given):
        raise KeyboardInterrupt

    second = jobs.METHODS["second"]
    monkeypatch.setitem(jobs.METHODS, "second", methods.Method(fails, ("first",)))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setitem(jobs.METHODS, "second", second)
    assert run(tmp_path)["second", 1] == 2.0
    assert counted == ["first", "second"]


def test_a_job_without_its_start_says_so(tmp_path, counted):
    with pytest.raises(RuntimeError, match=f"{NET}-second-seed1: expected the results of first, got none"):
        jobs.Store(tmp_path, {"digits": TINY}).run(jobs.Job(NET, "second", 1))


def test_methods_begin_with_earlier_ones():
    """run_all counts on it."""
    names = list(methods.METHODS)
    for name, method in methods.METHODS.items():
        assert all(names.index(earlier) < names.index(name) for earlier in method.after), name


# --- the page ---------------------------------------------------------------------------------------------------------


def test_markdown():
    made = page.markdown(("name", "a|b"), [("x | y", "−1.50 ± 0.25"), ("", "3×")])
    assert made == "| name | a\\|b |\n| --- | ---: |\n| x \\| y | −1.50 ± 0.25 |\n|  | 3× |"
    with pytest.raises(ValueError, match="expected 2 cells"):
        page.markdown(("a", "b"), [("one",)])


def made_results(quick, methods_values, network="resnet"):
    """results.json of invented numbers."""
    size = {"bytes": 10, "ratio": 2.0, "weight_ratio": 3.0, "streams_ratio": 4.0, "entropy_bytes": 1.0}
    found = [
        {"network": network, "method": method, "seed": seed, "value": value, "sizes": {"packed": size, "coded": size}}
        for method, values in methods_values.items()
        for seed, value in enumerate(values)
    ]
    return {
        "quick": quick,
        "seeds": [0, 1, 2],
        "command": "python -m examples.tables",
        "machine": {"cores": 2, "cpu": "CPU", "capability": "AVX2"},
        "software": {"inq_kernels": "0.1.0", "commit": "abc", "python": "3"},
        "processes": 2,
        "recipes": {"digits": dataclasses.asdict(tasks.Recipe())},
        "wall_s": 1.0,
        "cpu_s": 2.0,
        "taken_over": 0,
        "jobs": found,
    }


TERNARY = {
    "float32": (1.0, 2.0, 3.0),
    "longer": (1.0, 2.0, 3.0),
    "bwn": (1.0, 2.0, 3.0),
    "twn": (2.0, 3.1, 3.9),
    "bwn-all": (1.0, 2.0, 3.0),
    "twn-all": (0.0, 0.9, 2.1),
    "inq-2-mse": (1.5, 1.5, 3.5),
    "inq-2-mse-channel": (1.0, 2.0, 3.0),
    "inq-2-mse-channel-ends": (1.0, 2.0, 3.0),
}


def test_the_page_has_differences_within_the_seeds_and_the_papers_numbers():
    text = page.text(made_results(False, TERNARY))
    # −1.0, −1.1, −0.9: s = 0.1, 4.302653·0.1/√3 = 0.248.
    ends, channel, layer = (
        [cell.strip() for cell in line.strip("|").split("|")][1:]
        for line in text.splitlines()
        if line.startswith("| ResNet-like | INQ ternary, ")
    )
    assert ends == [
        "INQ ternary, an exponent a channel, first and last layer float",
        *("2.00 ± 2.48", "−1.00 ± 0.25", "+0.00 ± 0.00", "2.0×", ""),
    ]
    # With all layers it stands beside TWN and BWN of all layers.
    assert channel[2:] == ["+1.00 ± 0.25", "+0.00 ± 0.00", "2.0×", ""]
    assert layer[1:] == ["2.17 ± 2.87", "+1.17 ± 1.23", "+0.17 ± 1.43", "2.0×", "33.98 / 12.87"]
    what = "T4: INQ ternary, an exponent a channel,"
    for claim in (
        f"| {what} first and last layer float is as good as TWN | −1.00 ± 0.25 ✓ |",
        f"| {what} all layers is as good as TWN | +1.00 ± 0.25 ✗ |",
        f"| {what} all layers is as good as BWN | +0.00 ± 0.00 ≈ |",
    ):
        assert claim in text
    assert "T1: from" not in text  # no results, no table
    assert "of ImageNet" in text
    assert "QUICK" not in text
    assert "720 further steps" in text


def test_on_the_language_model_ternary_weights_are_claimed_to_be_better():
    claims = {
        claim.text: claim
        for claim in tables.t4(tables.Rows.of(made_results(False, TERNARY, jobs.LANGUAGE_MODEL)["jobs"])).claims
    }
    what = "T4: INQ ternary, an exponent a channel,"
    better = claims[f"{what} first and last layer float is better than TWN"]
    assert (better.sign, better.seen()) == (-1, "yes")
    assert claims[f"{what} first and last layer float is better than BWN"].seen() == "not told apart"
    assert claims[f"{what} all layers is as good as TWN"].sign == 0


def test_a_quick_page_claims_nothing():
    text = page.text(made_results(True, TERNARY))
    assert "**QUICK**" in text
    assert "nothing is concluded" in text
    assert "What can be seen" not in text
    assert "✓" not in text


# --- the tables, by hand ----------------------------------------------------------------------------------------------

# What is added to 1, 2, 3 for the seeds: differences are exact, and their intervals have no width.
OFFSETS = {
    **dict(
        zip(("float32", "longer", "inq-5", "inq-4", "inq-3", "inq-2"), (0.0, 0.25, -0.5, 0.5, 1.0, 2.0), strict=True)
    ),
    **dict.fromkeys(("inq-5-random", "dns-inq-5"), 0.5),
    **dict.fromkeys(("dns-inq-4", "dc-8-5"), 0.25),
    **dict.fromkeys(("dns", "dns-inq-3"), 0.0),
    "inq-2-mse-random": 1.25,
    "inq-2-mse": 1.5,
    "inq-2-mse-channel": 1.25,
    "inq-4-dense": -0.75,
    "inq-5-channel": -1.0,
    "inq-4-dense-channel": -1.25,
    "dc-4-2": 4.0,
}
# Ratios of a whole file, by how it is stored.
WAYS = {"packed": 4.0, "coded": 40.0, "relative": 35.0, "P+Q": 20.0, "P+Q+H": 30.0}


@pytest.fixture
def rows():
    sizes = {
        way: {"bytes": 1000 / r, "ratio": r, "weight_ratio": r + 1, "streams_ratio": r + 2} for way, r in WAYS.items()
    }
    found = [
        {
            "network": "lenet-5",
            "method": method,
            "seed": seed,
            "value": seed + 1 + offset,
            "sizes": sizes,
            "fraction": 0.1,
        }
        for method, offset in OFFSETS.items()
        # In whatever order the file has them.
        for seed in ((2, 1, 0) if method == "float32" else (0, 1, 2))
    ]
    return tables.Rows.of(found)


def seen_in(table):
    return {claim.text: claim.seen() for claim in table.claims}


def test_t1_by_hand(rows):
    """1, 2, 3: s = 1, 4.302653/√3 = 2.48."""
    made = tables.t1(rows)
    assert made.rows == [
        (
            *("LeNet-5-shaped", "2.00 ± 2.48", "2.25 ± 2.48", "1.50 ± 2.48", "−0.50 ± 0.00", "−0.75 ± 0.00"),
            "AlexNet: 42.76 / 19.77 → 42.61 / 19.54",
        )
    ]
    what = "T1: INQ at 5 bits is as good as float32"
    assert seen_in(made) == {what: "yes: better", f"{what} trained as long": "yes: better"}
    assert [claim.difference.mean for claim in made.claims] == [-0.5, -0.75]


def test_t2_and_t3_by_hand(rows):
    made = tables.t2(rows)
    assert made.rows == [
        ("LeNet-5-shaped", "5", "2.50 ± 2.48", "1.50 ± 2.48", "−1.00 ± 0.00", "", ""),
        ("LeNet-5-shaped", "2", "3.25 ± 2.48", "3.50 ± 2.48", "+0.25 ± 0.00", "", ""),
    ]
    assert seen_in(made) == {
        "T2: largest first is as good as random, 5 bits": "yes: better",
        "T2: largest first is as good as random, 2 bits": "no: worse",
    }
    made = tables.t3(rows)
    assert made.rows == [
        ("32", "2.00 ± 2.48", "31.73 / 11.31"),
        ("5", "1.50 ± 2.48 (−0.50 ± 0.00)", "31.02 / 10.90"),
        ("4", "2.50 ± 2.48 (+0.50 ± 0.00)", "31.11 / 10.99"),
        ("3", "3.00 ± 2.48 (+1.00 ± 0.00)", "31.92 / 11.64"),
        ("2", "4.00 ± 2.48 (+2.00 ± 0.00)", "33.98 / 12.87"),
        ("2, `mse`", "3.50 ± 2.48 (+1.50 ± 0.00)", ""),
    ]
    assert set(seen_in(made).values()) == {"no: worse"}


def test_t5_by_hand(rows):
    """The decrease is float32 − method; ours is compared with Deep Compression at 8 and 5 bits, Huffman coded."""
    made = tables.t5(rows)
    by_title = {row[1]: row for row in made.rows}
    assert by_title["Deep Compression, P+Q, 8/5 bits"][2:9] == (
        *("10.0 ± 0.0", "2.25 ± 2.48", "−0.25 ± 0.00", "50", "20.0 ± 0.0", "21.0 ± 0.0", "22.0 ± 0.0"),
    )
    assert [by_title[title][6] for title in by_title] == [
        *("20.0 ± 0.0", "30.0 ± 0.0", "30.0 ± 0.0", *["40.0 ± 0.0"] * 3, *["35.0 ± 0.0"] * 3),
    ]
    seen = seen_in(made)
    ratio, error = (
        "T5: DNS + INQ, {} bits: higher ratio than Deep Compression, 8/5",
        "T5: DNS + INQ, {} bits: as good as",
    )
    assert [seen[ratio.format(bits)] for bits in (5, 4, 3)] == ["yes"] * 3
    assert [seen[f"{error.format(bits)} Deep Compression, 8/5"] for bits in (5, 4, 3)] == [
        *("no: worse", "not told apart", "yes: better"),
    ]
    # 0 beside 4.
    few = {claim.text: claim.difference.mean for claim in made.claims if claim.text.endswith("4/2")}
    assert few == {ratio.format(3).replace("8/5", "4/2"): 10.0, f"{error.format(3)} Deep Compression, 4/2": -4.0}


def test_the_extension_by_hand(rows):
    made = tables.extension(rows)
    assert [row[2:] for row in made.rows] == [
        ("1.50 ± 2.48", "", "4.0×", "40.0×"),
        ("1.00 ± 2.48", "−0.50 ± 0.00", "4.0×", "40.0×"),
        ("1.25 ± 2.48", "−0.25 ± 0.00", "4.0×", "40.0×"),
        ("0.75 ± 2.48", "−0.75 ± 0.00", "4.0×", "40.0×"),
        ("3.50 ± 2.48", "", "4.0×", "40.0×"),
        ("3.25 ± 2.48", "−0.25 ± 0.00", "4.0×", "40.0×"),
    ]
    assert set(seen_in(made).values()) == {"yes: better"}


def test_columns_that_say_nothing_and_intervals_of_one_seed():
    for network, beside in (("resnet", True), (NET, False)):
        lines = page.text(made_results(False, TERNARY, network)).splitlines()
        headers = next(line for line in lines if line.startswith("| network | weights | result "))
        assert ("| paper, ResNet-18 on ImageNet |" in headers) == beside
    recipes = made_results(False, TERNARY)["recipes"]
    assert page.budgets(recipes, 1).startswith("One seed, so there are no intervals.")
    assert "mean over 2 seeds" in page.budgets(recipes, 2)


def test_bits_per_byte_have_four_decimals():
    made = page.claims([tables.Claim("a", jobs.LANGUAGE_MODEL, intervals.Estimate(0.00123, 0.0004, 5), 0)])
    assert "| a | +0.0012 ± 0.0004 ✗ |" in made


def test_claims_have_a_row_each_and_a_column_for_each_network():
    half = intervals.Estimate(-1.0, 0.5, 5)
    made = [
        tables.Claim("a", "resnet", half, 0),
        tables.Claim("b", "resnet", half, 1),
        tables.Claim("a", NET, intervals.Estimate(0.1, None, 1), 0),
    ]
    assert page.claims(made).splitlines() == [
        "| claim | LeNet-300-100 | ResNet-like |",
        "| --- | ---: | --- |",
        "| a | +0.10 | −1.00 ± 0.50 ✓ |",
        "| b |  | −1.00 ± 0.50 ✗ |",
    ]


# --- what each method does to a network -------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """The networks that methods measure, and what each began with."""
    models, begun = [], []
    model_of = methods.Given.model
    monkeypatch.setattr(tasks.DigitsTask, "measure", lambda _, model: models.append(model) or 1.0)
    monkeypatch.setattr(methods.Given, "model", lambda given, m="float32": begun.append(m) or model_of(given, m))
    return models, begun


def result_of(method, network="lenet-5", known=None):
    """Numbers and tensors of a method, after those that it begins with and that are not ``known`` yet."""
    known = {} if known is None else known
    for job in jobs.jobs({network: [method]}, [0]):
        if job.method in known:
            continue
        earlier = methods.METHODS[job.method].after
        tensors, results = ({name: known[name][i] for name in earlier} for i in (1, 0))
        given = methods.Given(tasks.DigitsTask(network, TINY), 0, tensors, results)
        known[job.method] = methods.METHODS[job.method].run(given)
    return known[method]


def test_the_ends_are_float_where_published(trained):
    (models, begun), known = trained, {}
    for method, expected in (("inq-2-mse", ["fc1", "fc2", "fc3"]), ("inq-2-mse-channel-ends", ["fc2"])):
        result_of(method, NET, known)
        assert [n for n, m in models[-1].named_modules() if type(m) is inq.Linear] == expected
    for method in ("twn", "bwn", "twn-all", "bwn-all"):
        result_of(method, NET, known)
        # TWN has one α a layer, BWN one a filter: look at one filter.
        few = [len(getattr(models[-1], n).weight[0].unique()) <= 3 for n in ("fc1", "fc2", "fc3")]
        assert few == ([True] * 3 if method.endswith("-all") else [False, True, False])
    assert set(begun) == {"float32"}


def test_pruning_first(trained):
    """INQ holds what DNS pruned at 0, and Deep Compression has 8 bits for convolutions and 5 for Linear layers."""
    models, begun = trained
    result, left = result_of("dns")
    masks = {n.removeprefix(methods.KEPT): t for n, t in left.items() if n.startswith(methods.KEPT)}
    assert list(masks) == list(result["kept"]) == ["conv1", "conv2", "fc1", "fc2"]
    begun.clear()
    result_of("dns-inq-5")
    assert begun == ["float32", "dns"]
    for name, mask in masks.items():
        w = inq.unpack(getattr(models[-1], name).packed)
        assert not w[~mask].any()
        assert (w[mask] != 0).double().mean() > 0.5
    begun.clear()
    result_of("dc-8-5")
    assert begun == ["float32", "float32", "dc-prune"]
    counts = {name: len(getattr(models[-1], name).weight.unique()) for name in masks}
    assert counts["fc1"] <= 32 < counts["conv2"] <= 256
    assert [int((getattr(models[-1], name).weight != 0).sum()) for name in masks] == list(result["kept"].values())


def test_the_methods_formats():
    formats = {
        **{f"inq-{bits}": {"fmt": inq.Format.paper(bits)} for bits in (5, 4, 3, 2)},
        "inq-5-random": {"fmt": inq.Format.paper(5), "partition": "random"},
        "inq-2-mse": {"fmt": inq.Format(2, "paper", "tensor", "mse")},
        "inq-2-mse-random": {"fmt": inq.Format(2, "paper", "tensor", "mse"), "partition": "random"},
        "inq-2-mse-channel-ends": {"fmt": inq.Format(2, "paper", "channel", "mse"), "ends": False},
        "inq-4-dense": {"fmt": inq.Format(4, "dense", "tensor", "max")},
        "inq-5-channel": {"fmt": inq.Format(5, "paper", "channel", "max")},
        "inq-4-dense-channel": {"fmt": inq.Format(4, "dense", "channel", "max")},
        "inq-2-mse-channel": {"fmt": inq.Format(2, "paper", "channel", "mse"), "ends": True},
    }
    assert {n: m.run.keywords for n, m in methods.METHODS.items() if n.startswith("inq")} == formats


def test_the_thresholds_of_each_kind_of_layer():
    model = networks.NETWORKS["lenet-5"].build()
    assert methods._c_rates(model, (1.0, 2.0, 3.0, 4.0)) == {"conv1": 1.0, "conv2": 2.0, "fc1": 3.0, "fc2": 4.0}


def test_the_ratio_of_the_streams_by_hand():
    """16 weights are 64 bytes; codes, indices and padding are 8 + 4 + 4. The codebook is not among them."""
    layer = meter.LayerSize("fc", (4, 4), 4, 0.0, codes=64, indices=32, padding=32, codebooks=320)
    assert methods._size(meter.Size("", (layer,), {}, 0, 64))["streams_ratio"] == 4.0


def test_relative_indices_have_the_best_gap():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=generator) * (torch.rand(64, 256, generator=generator) < 0.05)
    packed = inq.pack(inq.quantize(w, inq.Format(3)), inq.Format(3))
    codes = reference.unpack_codes(packed.weight, 3, 256).reshape(-1).long()
    each = [sum(deep_compression.sparse_parts(codes, 3, gap).values()) for gap in range(2, 9)]
    assert methods.relative_layer(meter.inq_layer("fc", packed), packed).bits == min(each) + 8 * 64
    assert min(each) < min(each[0], each[-1])


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_the_error_by_hand(monkeypatch):
    """3 wrong of 600."""
    labels = tasks.digits().test_labels
    answers = labels.clone()
    answers[:3] = (answers[:3] + 1) % 10
    monkeypatch.setattr(tasks, "logits", lambda model, images: nn.functional.one_hot(answers, 10))
    assert tasks.DigitsTask(NET, TINY).measure(nn.Identity()) == pytest.approx(0.5)


def test_a_seed_decides_the_network_and_a_phase_ends_at_zero():
    task = tasks.DigitsTask(NET, TINY)
    first, again, other = (task.start(seed).fc2.weight.detach() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    trainer = task.further(task.build(), 4, 1, 0.02)
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.train(1)
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], trainer.optimizer.param_groups[0]["lr"]) == (0.02, pytest.approx(0))
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 5e-4
    centroids = task.centroids(task.build(), 4, 1).optimizer.param_groups[0]
    assert (centroids["lr"], centroids["weight_decay"]) == (1e-3, 0.0)


def test_ternary_weights_are_trained_with_their_own_rate(monkeypatch):
    rates = {}
    further = tasks.DigitsTask.further

    def spy(task, model, phase, seed, lr):
        rates[current] = lr
        return further(task, model, phase, seed, lr)

    monkeypatch.setattr(tasks.DigitsTask, "further", spy)
    known: dict = {}
    for current in ("longer", "inq-5", "inq-2", "twn", "bwn-all", "inq-2-mse", "inq-2-mse-channel-ends"):
        result_of(current, NET, known)
    assert set(rates.values()) == {TINY.further_lr, TINY.coarse_lr}
    assert {name for name, lr in rates.items() if lr == TINY.further_lr} == {"longer", "inq-5", "inq-2"}


def test_what_each_network_is_for():
    """T5 prunes some; the language model is for T4, and for T2 at 2 bits."""
    of = {network: set(tables.methods_of(network)) for network in tables.TITLES}
    everything = set(methods.METHODS)
    pruning = {name for name in everything if name.startswith(("dns", "dc"))}
    assert {name for name in networks.NETWORKS if of[name] == everything} == {NET, "lenet-5", "digits-cnn"}
    assert of["inception"] == of["resnet"] == everything - pruning
    assert of[jobs.LANGUAGE_MODEL] == {*tables.T4_ROWS, "inq-2-mse-random"}


def test_results_of_the_language_model_are_of_their_text(tmp_path, monkeypatch):
    language = importlib.import_module("examples.tables.language")
    store = jobs.Store(tmp_path, {jobs.LANGUAGE_MODEL: language.QUICK, "digits": TINY})
    before, other = (store.key(jobs.Job(net, "float32", 0)) for net in (jobs.LANGUAGE_MODEL, NET))
    monkeypatch.setattr(language.example, "corpus", lambda: (None, None, {"train": {"sha256": "other"}}))
    assert store.key(jobs.Job(jobs.LANGUAGE_MODEL, "float32", 0)) != before
    assert store.key(jobs.Job(NET, "float32", 0)) == other


# --- jobs in several processes ----------------------------------------------------------------------------------------


def test_jobs_are_seed_by_seed_and_of_one_thread(tmp_path, counted, monkeypatch):
    todo = jobs.jobs({NET: ["second"], "resnet": ["second"]}, [3, 4])
    assert [(job.seed, job.network, job.method) for job in todo] == [
        (seed, network, method) for seed in (3, 4) for network in (NET, "resnet") for method in ("first", "second")
    ]
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run(tmp_path)
    assert threads == [1, 1]


def test_several_processes_wait_for_what_a_job_begins_with(tmp_path, counted, monkeypatch):
    """Threads in place of processes, which would not have these methods; a job that came too early would fail."""
    first = jobs.METHODS["first"].run

    def slow(given):
        time.sleep(0.2)
        return first(given)

    monkeypatch.setitem(jobs.METHODS, "first", methods.Method(slow, ()))
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda processes, _: ThreadPoolExecutor(processes))
    store, todo = jobs.Store(tmp_path, {"digits": TINY}), jobs.jobs({NET: ["second"]}, [1, 2, 3])
    done = jobs.run_all(store, todo, 2)
    assert {(job.method, job.seed): result["value"] for job, result in done.items()} == {
        (method, seed): float(seed * n) for seed in (1, 2, 3) for n, method in ((1, "first"), (2, "second"))
    }
    assert all(again for *_, again in _taken_over(store, todo))


def _taken_over(store, todo):
    calls = []
    jobs.run_all(store, todo, 2, lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize(
    "file",
    [
        *(f"examples/tables/{name}.py" for name in ("language", "methods", "networks", "tasks")),
        *("examples/language_model.py", "inq_kernels/dns.py", "inq_kernels/baselines/ternary.py"),
    ],
)
def test_other_code_has_another_fingerprint(monkeypatch, file):
    read, changed = Path.read_bytes, Path(inq.__file__).parent.parent / file
    changed = changed if changed.exists() else ROOT / file
    before = jobs.fingerprint()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * path.samefile(changed))
    assert jobs.fingerprint.__wrapped__()["code"] != before["code"]


# --- the committed run ------------------------------------------------------------------------------------------------


def test_the_committed_page_is_of_its_results():
    """``python tests/tables_page.py tables/results.json`` writes all three."""
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page.text(results)
    assert BLOCK.findall(README.read_text()) == [readme(results)]


def test_the_committed_results_reach_what_they_must_but_for_what_readme_says():
    missed = [what for what, good in checks(json.loads(RESULTS.read_text())) if not good]
    assert [next((known for known in MISSED if what.startswith(known)), what) for what in missed] == list(MISSED)


def test_a_bar_can_be_missed():
    """Ternary INQ worse than TWN on one network, one network missing, and fewer seeds."""
    results = made_results(False, {**TERNARY, "inq-2-mse-channel-ends": (2.5, 3.6, 4.4)})
    missed = [what for what, good in checks(results) if not good]
    assert [what.partition(",")[0] for what in missed] == [
        "3 seeds",
        "all networks",
        "T4: INQ ternary",
        "T4: INQ ternary",
    ]
    assert "+0.50 ± 0.00, no: worse" in missed[2]


def test_a_run_is_complete_with_every_method_of_every_network_and_seed():
    todo = jobs.jobs({net: tables.methods_of(net) for net in tables.TITLES}, [0, 1])
    made = [dataclasses.asdict(job) for job in todo]
    assert complete({"quick": False, "seeds": [0, 1], "jobs": made})
    assert not complete({"quick": True, "seeds": [0, 1], "jobs": made})
    assert not complete({"quick": False, "seeds": [0, 1, 2], "jobs": made})
    assert not complete({"quick": False, "seeds": [0, 1], "jobs": made[:-1]})


# --- all of it --------------------------------------------------------------------------------------------------------


def test_a_quick_run_and_going_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "QUICK", TINY)
    words = ["--quick", "--networks", NET, "--processes", "1", "--out", str(tmp_path)]
    assert command.main(words) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    text = (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out == text + "\n" == page.text(first) + "\n"
    assert "**QUICK**" in text
    for title in ("T1: ", "T2: ", "T3: ", "T4: ", "T5: ", "Beyond the paper"):
        assert f"\n## {title}" in text
    assert str(tmp_path) not in text + json.dumps(first)
    assert {"cpu", "cores"} <= first["machine"].keys()
    assert {"commit", "torch", "scipy"} <= first["software"].keys()
    by_name = {(job["method"], job["seed"]): job for job in first["jobs"]}
    assert len(by_name) == len(first["jobs"]) == 2 * len(methods.METHODS)
    assert first["taken_over"] == 0
    # Everyone takes the same steps, once to quantize and once more to prune.
    steps = {method: by_name[method, 0]["steps"] for method in methods.METHODS}
    pruned = {method for method in steps if re.match(r"dns-inq|dc-\d", method)}
    assert {steps.pop("float32")} == {0}
    assert {method for method, count in steps.items() if count != 12} == pruned
    assert {steps[method] for method in pruned} == {24}
    assert all(0 <= job["value"] <= 100 for job in first["jobs"])
    # The same sparsity, and sizes in their order.
    fractions = {by_name[method, 1]["fraction"] for method in (*pruned, "dns", "dc-prune")}
    assert len(fractions) == 1
    sizes = by_name["dns-inq-4", 0]["sizes"]
    assert sizes["coded"]["bytes"] < sizes["packed"]["bytes"]
    assert by_name["dc-8-5", 0]["sizes"]["P+Q+H"]["bytes"] < by_name["dc-8-5", 0]["sizes"]["P+Q"]["bytes"]

    (tmp_path / "jobs" / f"{NET}-twn-seed1.json").unlink()
    assert command.main(words) == 0
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["taken_over"] == len(first["jobs"]) - 1
    timeless = [{k: v for k, v in job.items() if k != "cpu_s"} for job in second["jobs"]]
    assert timeless == [{k: v for k, v in job.items() if k != "cpu_s"} for job in first["jobs"]]


def test_the_commit_is_that_of_the_beginning(tmp_path, monkeypatch):
    """An hour later the checkout may be another."""
    asked = []

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.example, "software", lambda: asked.append(True) or {})
    monkeypatch.setattr(jobs, "run_all", stop)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--quick", "--networks", NET, "--out", str(tmp_path)])
    assert asked == [True]


def test_the_language_model_by_the_same_methods(tmp_path, capsys):
    """T4's, tiny."""
    language = importlib.import_module("examples.tables.language")
    recipe = dataclasses.replace(language.QUICK, steps=4, further=10, validation_windows=8)
    store = jobs.Store(tmp_path, {jobs.LANGUAGE_MODEL: recipe})
    todo = jobs.jobs({jobs.LANGUAGE_MODEL: ["inq-2-mse", "twn"]}, [0])
    done = {job.method: result for job, result in jobs.run_all(store, todo, 1).items()}
    assert list(done) == ["float32", "twn", "inq-2-mse"]
    assert all(4 < result["value"] < 12 for result in done.values())
    assert done["inq-2-mse"]["steps"] == done["twn"]["steps"] == 10


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--networks", "alexnet"], ["--processes", "x"]])
def test_arguments(words):
    with pytest.raises(SystemExit):
        command.main(words)
