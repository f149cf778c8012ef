"""``make tables``: its statistics on hand-worked numbers, its saved jobs, its page, and all of it, quick."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import inq_kernels as inq
from inq_kernels import checkpoint
from inq_kernels.baselines import meter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # examples is a folder of the repository, not of the package

from examples.tables import intervals, jobs, methods, networks, page, paper, tables, tasks  # noqa: E402

command = importlib.import_module("examples.tables.__main__")
TINY = tasks.Recipe(steps=12, further=12, batch=16)
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
    assert all(tasks.Recipe().further % length == 0 for length in lengths)


def test_every_method_sees_the_same_batches():
    """And goes on with them over its phases."""
    task, seen = tasks.DigitsTask(NET, TINY), []
    for phases in ([12], [5, 7]):
        model = task.build()
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        trainer = task.further(model, max(phases), 3)
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
    done = jobs.run_all(store, jobs.jobs([NET], ["second"], seeds), 1)
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
    "inq-2-mse": (1.0, 2.0, 3.0),
    "inq-2-mse-ends": (1.5, 1.5, 3.5),
}


def test_the_page_has_differences_within_the_seeds_and_the_papers_numbers():
    text = page.text(made_results(False, TERNARY))
    # −1.0, −1.1, −0.9: s = 0.1, 4.302653·0.1/√3 = 0.248.
    line = next(line for line in text.splitlines() if line.startswith("| ResNet-like | INQ ternary, all layers |"))
    assert [cell.strip() for cell in line.strip("|").split("|")][2:] == [
        *("2.00 ± 2.48", "−1.00 ± 0.25", "+0.00 ± 0.00", "2.0×", "33.98 / 12.87"),
    ]
    claim = "| T4: INQ ternary (all layers) is as good as TWN | ResNet-like | −1.00 ± 0.25 | yes: better |"
    assert claim in text
    assert "T1: from" not in text  # no results, no table
    assert "of ImageNet" in text
    assert "QUICK" not in text
    assert "720 further steps" in text


def test_a_quick_page_claims_nothing():
    text = page.text(made_results(True, TERNARY))
    assert "**QUICK**" in text
    assert "nothing is concluded" in text
    assert "What can be seen" not in text
    assert "yes: better" not in text


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


def test_the_language_model_by_the_same_methods(tmp_path, capsys):
    """T4's, tiny."""
    language = importlib.import_module("examples.tables.language")
    recipe = dataclasses.replace(language.QUICK, steps=4, further=10, validation_windows=8)
    store = jobs.Store(tmp_path, {jobs.LANGUAGE_MODEL: recipe})
    todo = jobs.jobs([jobs.LANGUAGE_MODEL], ["inq-2-mse", "twn"], [0])
    done = {job.method: result for job, result in jobs.run_all(store, todo, 1).items()}
    assert list(done) == ["float32", "inq-2-mse", "twn"]
    assert all(4 < result["value"] < 12 for result in done.values())
    assert done["inq-2-mse"]["steps"] == done["twn"]["steps"] == 10


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--networks", "alexnet"], ["--processes", "x"]])
def test_arguments(words):
    with pytest.raises(SystemExit):
        command.main(words)
