"""The parts of the integrations that need none of the libraries; those are tests/integrations/, by
``make test-integrations``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import inq_kernels as inq
from inq_kernels.file_format import config
from inq_kernels.integrations.settings import Patterns, Settings

ROOT = Path(__file__).resolve().parent.parent
FOUR, FIVE, TWO = inq.Format(4), inq.Format(5, "dense", "channel", "max"), inq.Format(2)


def settings():
    return Settings.read("here", config({"a": FOUR, "b": FOUR, "x.c": FIVE, "x.d": TWO}, ["head", "x.e"]))


def test_the_configuration_of_a_file_comes_back():
    read = settings()
    assert read == Settings(FOUR, {"x.c": FIVE, "x.d": TWO}, ("head", "x.e"))
    written = config({"a": FOUR, "b": FOUR, "x.c": FIVE, "x.d": TWO}, ["head", "x.e"])
    written.pop("producer")
    assert read.to_json() == written
    assert Settings.read("here", read.to_json()) == read


def test_a_module_goes_by_any_of_its_names():
    read = settings()
    assert read.format_of("a") == read.format_of("new") == FOUR
    assert read.format_of("model.x.c", "x.c") == FIVE
    assert read.format_of("head") is None
    assert read.format_of("model.head", "head") is None
    assert read.ignored("model.head", "head") == "head"


def test_ignore_comes_before_overrides_and_a_name_before_a_pattern():
    read = Settings(FOUR, {"*.up": TWO, "a.up": FIVE}, ("*.down", "b.*"))
    assert read.format_of("a.up") == FIVE
    assert read.format_of("c.up") == TWO
    assert read.format_of("b.up") is None
    assert read.ignored("a.down") == "*.down"


def test_patterns_are_those_of_fnmatch_and_case_sensitive():
    patterns = Patterns(["a.[12].w", "b?", "c"])
    assert patterns.match(["a.1.w"]) == "a.[12].w"
    assert patterns.match(["a.3.w"]) is None
    assert patterns.match(["B1"]) is None
    assert patterns.match(["zz", "c"]) == "c"


BAD = {
    "quant_method: expected 'inq', got 'awq'": {"quant_method": "awq"},
    "got 3: a newer inq_kernels is needed": {"format_version": 3},
    "got 2, whose codes may be entropy-coded: `inq save SRC OUT` writes them plain again": {"format_version": 2},
    "format_version: expected an integer ≥ 1, got True": {"format_version": True},
    "bits": {"bits": 6},
    "overrides: expected an object of objects": {"overrides": {"a": 4}},
    "overrides: 'a': Format: levels": {"overrides": {"a": {"bits": 4}}},
    "ignore: expected a list of names": {"ignore": "head"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_configuration_is_one_clear_error(message):
    with pytest.raises(inq.CheckpointError, match=f"^here: .*{message}|^here: {message}"):
        Settings.read("here", config({"a": FOUR}, []) | BAD[message])


def test_a_configuration_that_is_no_object():
    with pytest.raises(inq.CheckpointError, match="here: expected an object, got list"):
        Settings.read("here", [])


def test_no_integration_is_imported_with_the_package():
    script = (
        "import sys, inq_kernels, inq_kernels.cli, inq_kernels.integrations\n"
        "assert not {'transformers', 'peft', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_that_vllm_calls():
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\ninq = "([\w.]+):(\w+)"', text)
    module, function = found.groups()
    from inq_kernels.integrations import vllm

    assert module == vllm.__name__
    assert callable(getattr(vllm, function))
