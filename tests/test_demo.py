"""``inq demo``: the quick one from end to end, the same table twice, and a check that fails when it should."""

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inq_kernels import checkpoint, demo
from inq_kernels.demo import check, command, report
from inq_kernels.demo.train import BY_KEY, FLOAT, QUICK_ROWS, ROWS, digits_net


def arguments(*words):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


def results_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo.run(arguments("--quick", "--out", str(out))) == 0
    return out


@pytest.fixture
def copy(quick, tmp_path):
    """A copy of the quick demo's files, to damage."""
    return Path(shutil.copytree(quick, tmp_path / "copy"))


def test_the_same_seed_gives_the_same_numbers_in_any_number_of_processes(quick, tmp_path, capsys):
    assert demo.run(arguments("--quick", "--out", str(tmp_path), "--processes", "1")) == 0
    first, second = results_of(quick), results_of(tmp_path)
    first.pop("timing"), second.pop("timing")
    assert first == second
    for file in (quick / "models").iterdir():
        # Not the files' bytes: the safetensors library writes a header's metadata in any order.
        once, twice = load_file(file), load_file(tmp_path / "models" / file.name)
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[name], twice[name]) for name in once), file.name
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(row.title) for line in lines) for row in QUICK_ROWS)
    assert "5 saved networks, loaded in a new process: logits equal bit for bit." in lines


def test_results(quick):
    rows = {row["key"]: row for row in results_of(quick)["rows"]}
    assert list(rows) == [row.key for row in QUICK_ROWS]
    assert rows["float32"]["bits_per_weight"] == 32
    assert rows["float32"]["weights"] == 123_680
    for key, bits in (("mse-5", 5), ("mse-2", 2), ("max-2", 2)):
        # Rows of conv1 are padded to 16 codes, and each row has an exponent of 8 bits.
        assert bits < rows[key]["bits_per_weight"] < bits + 0.05
        size = (quick / "models" / f"{key}-seed0.safetensors").stat().st_size
        assert rows[key]["file_bytes"] == size
        assert rows[key]["ratio"] == rows["float32"]["file_bytes"] / size
        assert [point["portion"] for point in rows[key]["curves"][0]] == [0, *BY_KEY[key].portions]
        counts = [sum(layer["exponents"].values()) + layer["zeros"] for layer in rows[key]["layers"]]
        assert counts == [layer["weights"] for layer in rows[key]["layers"]]
    # Trained for seconds: far above 10 % is all that can be asked.
    assert rows["float32"]["mean"] > 80
    assert rows["mse-5"]["mean"] > 80


def test_results_name_neither_the_machine_nor_a_path(quick):
    text = (quick / "results.json").read_text() + (quick / "report.html").read_text()
    for private in (__import__("platform").node(), str(Path.home()), tempfile.gettempdir(), str(quick.parent)):
        assert len(private) < 5 or private not in text


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_page_loads_nothing(quick):
    html = (quick / "report.html").read_text()
    page = Page()
    page.feed(html)
    page.close()
    assert page.tags.count("img") == 3
    assert len(page.sources) == 3
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html
    for source in page.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        picture = Page()
        picture.feed(base64.b64decode(data).decode())
        assert picture.tags.count("path") > 50
        assert all(link.startswith("#") for link in picture.sources)
    assert all(row.title in page.text for row in QUICK_ROWS)
    assert "too short for the accuracies to mean anything" in page.text


def change_logit(out):
    """The last bit of one saved logit."""
    file = out / "expected" / "mse-2-seed0.safetensors"
    tensors = load_file(file)
    tensors["logits"].view(torch.int32)[3, 4] ^= 1
    save_file(tensors, file)
    return "mse-2-seed0.safetensors: logits: expected those before saving, bit for bit, got 1 others of 6000"


def change_fake_weight(out):
    """One weight of the float network by an octave: the decoded weights, the layer and the logits are others then."""
    file = out / "expected" / "mse-5-seed0.safetensors"
    tensors = load_file(file)
    tensors["fake.conv2"].view(-1)[tensors["fake.conv2"].abs().argmax()] *= 2
    save_file(tensors, file)
    return "conv2: expected the weights that INQ left, bit for bit, got others"


def change_byte(out):
    """One byte of packed weights: the checksum of the file."""
    file = out / "models" / "mse-5-seed0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    return "damaged data"


def swap_models(out):
    """A file with valid checksums, of another network."""
    shutil.copy(out / "models" / "mse-5-random-seed0.safetensors", out / "models" / "mse-5-seed0.safetensors")
    return "mse-5-seed0.safetensors: logits: expected those before saving"


def remove_model(out):
    (out / "models" / "mse-5-seed0.safetensors").unlink()
    return "mse-5-seed0.safetensors: expected a file"


def remove_all(out):
    for file in (out / "expected").glob("*-seed0.safetensors"):
        file.unlink()
    return "expected saved networks, got none"


@pytest.mark.parametrize("damage", [change_logit, change_byte, remove_all])
def test_the_new_process_fails(copy, damage):
    message = damage(copy)
    words = [sys.executable, "-m", "inq_kernels.demo.check", str(copy)]
    done = subprocess.run(words, cwd=Path(demo.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert json.loads(done.stdout)["wrong"] >= 1


@pytest.mark.parametrize("damage", [change_logit, change_fake_weight, change_byte, swap_models, remove_model])
def test_the_check_finds(copy, damage, capsys):
    message = damage(copy)
    assert check.main(copy) == 1
    assert message in capsys.readouterr().err


def test_a_failed_check_prints_no_table(quick, tmp_path, monkeypatch, capsys):
    def train(rows, seeds, digits, recipe, out, *_):
        for folder in ("models", "expected"):
            shutil.copytree(quick / folder, out / folder, dirs_exist_ok=True)
        change_logit(out)
        return []

    monkeypatch.setattr(command, "train", train)
    assert demo.run(arguments("--quick", "--out", str(tmp_path))) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a saved network is not what was trained" in captured.err
    assert "got 1 others of 6000" in captured.err
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "report.html").exists()


def test_the_contract_bounds_each_layer(quick, monkeypatch):
    """A backend whose sums are too inaccurate, in one layer, is found there."""
    name = "mse-5-seed0.safetensors"
    images = load_file(quick / "expected" / "images.safetensors")["test_images"]
    load = checkpoint.load

    def inaccurate(path, model):
        load(path, model)
        model.conv3.register_forward_hook(lambda _, x, y: y * (1 + 2**-18))
        return model

    monkeypatch.setattr(checkpoint, "load", inaccurate)
    wrong = check.check_model(quick / "models" / name, quick / "expected" / name, images)
    assert any(message.startswith("conv3: error against float64") for message in wrong)
    assert not any(message.startswith("fc1") for message in wrong)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_packages_are_named(missing, monkeypatch, tmp_path, capsys):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert demo.run(arguments("--out", str(tmp_path / "out"))) == 1
    error = capsys.readouterr().err
    assert "inq_kernels[demo]" in error
    assert {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}[missing] in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--seeds", "0"), ("--processes", "-1")])
def test_arguments(words):
    with pytest.raises(SystemExit):
        arguments(*words)


def test_old_networks_are_removed_and_other_files_are_not(tmp_path):
    for folder in ("models", "expected"):
        (tmp_path / folder).mkdir()
        for name in ("mse-5-seed9.safetensors", "mine.safetensors"):
            (tmp_path / folder / name).write_text("")
    command._prepare(tmp_path, torch.zeros(1, 1, 8, 8))
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.glob("*/*")}
    assert left == {"models/mine.safetensors", "expected/mine.safetensors", "expected/images.safetensors"}


def test_split_and_network():
    digits, again = command.load_digits(), command.load_digits()
    assert torch.equal(digits.test_images, again.test_images)
    assert digits.train_images.shape == (1197, 1, 8, 8)
    assert digits.test_images.shape == (600, 1, 8, 8)
    assert float(digits.train_images.max()) == 1
    # The same share of every digit.
    assert torch.bincount(digits.test_labels).sub(60).abs().max() <= 2
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert not (torch.cdist(images[:1197], images[1197:]) == 0).any()  # no test image among the training ones
    weights = [p.numel() for name, p in digits_net().named_parameters() if p.dim() > 1]
    assert sum(weights) == 123_680


def test_rows_are_those_of_the_issue():
    formats = [(row.format.bits, row.format.exponent) for row in ROWS if row.format and row.format.levels == "paper"]
    assert sorted(formats) == sorted([(b, e) for b in (2, 3, 4, 5) for e in ("mse", "max")] + [(5, "mse")])
    assert BY_KEY["mse-5-random"].partition == "random"
    assert ROWS[0] == FLOAT
    assert len({row.key for row in ROWS}) == len(ROWS)


def test_summary_takes_differences_within_a_seed():
    def outcome(key, seed, accuracy, size):
        numbers = {"row": key, "seed": seed, "accuracy": accuracy, "file_bytes": size}
        return numbers | {"weights": 100, "weight_bytes": 50, "curve": [], "layers": []}

    outcomes = [
        *(outcome("float32", seed, accuracy, 1000) for seed, accuracy in enumerate((90.0, 94.0))),
        *(outcome("mse-4", seed, accuracy, 250) for seed, accuracy in enumerate((89.0, 95.0))),
    ]
    row = report.summarize(outcomes)[1]
    assert (row["mean"], row["difference"], row["ratio"], row["bits_per_weight"]) == (92, 0, 4, 4)
    assert row["difference_std"] == pytest.approx(2**0.5)
    assert row["std"] == pytest.approx(18**0.5)
    results = {"rows": report.summarize(outcomes), "seeds": [0, 1], "images": {"test": 600}, "quick": False}
    assert report.table_cells(results)[1][3:5] == ("92.00 ± 4.24", "+0.00 ± 1.41")
    assert "over 2 seeds" in report.caption(results)
