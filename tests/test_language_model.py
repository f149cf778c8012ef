"""The language model example runs, goes on where it stopped, and its committed results reach what they must."""

import json
import math

import pytest
import torch
from language_model_page import BLOCK, PAGE, RESULTS, checks, load_example, text

import inq_kernels as inq

example = load_example("language_model")


def test_a_quick_run_and_going_on_after_an_interruption(tmp_path, capsys):
    """Every stage, small; then again without one stage's numbers, which alone is run again, to the same numbers."""
    command = ["--quick", "--processes", "1", "--out", str(tmp_path)]
    assert example.main(command) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert capsys.readouterr().out.strip() == example.table(first)
    rows = {row["row"]: row for row in first["rows"]}
    assert {"float32", "inq-5", "inq-4", "inq-3", "inq-2", "plain-4", "calibrated-4", "calibrated-scales-4"} <= {*rows}
    # Each INQ row has float32 trained as long beside it.
    assert all(f"float32+{rows[f'inq-{bits}']['steps']}" in rows for bits in example.PORTIONS)
    assert all(0 < row["bits_per_byte"] < 8 for row in rows.values())
    # INQ at 5 bits is near float32, and 2 bits by plain rounding are far from it.
    start = rows["float32"]["bits_per_byte"]
    assert rows["inq-5"]["bits_per_byte"] < 1.02 * start
    assert rows["plain-2"]["bits_per_byte"] > max(rows["inq-2"]["bits_per_byte"], 1.02 * start)
    weights = rows["float32"]["weight_bytes"] // 4
    assert weights * 5 // 8 < rows["inq-5"]["weight_bytes"] < weights * 5 // 8 * 1.1
    assert not any(stage["taken_over"] for stage in first["stages"].values())

    (tmp_path / "stages" / "inq-3.json").unlink()
    assert example.main(command) == 0
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["rows"] == first["rows"]
    assert [name for name, stage in second["stages"].items() if not stage["taken_over"]] == ["inq-3"]


def test_stages_of_another_commit_or_recipe_are_run_again(tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    monkeypatch.setitem(example.STAGES, "base", lambda recipe, out: [{"row": "float32"}])
    key = {"commit": "a", "recipe": {"steps": 1}}
    assert not example.run_stage("base", example.QUICK, tmp_path, key)["again"]
    assert example.run_stage("base", example.QUICK, tmp_path, key)["again"]
    assert not example.run_stage("base", example.QUICK, tmp_path, key | {"commit": "b"})["again"]


def test_the_data_is_split_by_file_and_bits_per_byte_are_of_bytes():
    train, validation, facts = example.corpus()
    assert train.dtype == validation.dtype == torch.uint8
    assert (len(train), len(validation)) == (facts["train"]["bytes"], facts["validation"]["bytes"])
    assert facts["train"]["files"] > 4 * facts["validation"]["files"] > 40

    class Uniform(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 256)

    assert example.bits_per_byte(Uniform(), example.QUICK) == pytest.approx(8)


def test_the_model_sees_only_what_came_before():
    torch.manual_seed(0)
    model = example.LanguageModel(example.QUICK).eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] += 1
    before, after = model(tokens), model(changed % 256)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9], after[:, 9])


@pytest.mark.parametrize("number", range(8))
def test_the_committed_results_reach_their_bars(number):
    found = checks(json.loads(RESULTS.read_text()))
    assert len(found) == 8
    what, good = found[number]
    assert good, what


def test_the_committed_results_are_of_this_recipe():
    results = json.loads(RESULTS.read_text())
    assert results["recipe"] == example.dataclasses.asdict(example.Recipe())
    assert {"cpu", "cores", "system"} <= results["machine"].keys()
    rows = {row["row"]: row for row in results["rows"]}
    for bits, portions in example.PORTIONS.items():
        row = rows[f"inq-{bits}"]
        assert row["portions"] == list(portions)
        assert row["format"] == str(inq.Format(bits, granularity=example.GRANULARITY))
        assert row["steps"] == len(portions) * results["recipe"]["phase_steps"]
        assert math.isfinite(row["bits_per_byte"])


def test_the_table_is_that_of_the_committed_results():
    assert BLOCK.search(PAGE.read_text())[0] == text(json.loads(RESULTS.read_text()))
