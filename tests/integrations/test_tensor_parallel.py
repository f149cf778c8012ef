"""transformers' tensor parallelism over two processes: results of one process, and files of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import inq_kernels as inq
from inq_kernels import checkpoint
from inq_kernels.cli import main
from inq_kernels.integrations import transformers as _  # noqa: F401 - registers the method

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(WORKER), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.returncode, done.stdout + done.stderr


def write(path, **changes):
    """A float model, and packed with another format in one layer, biases and the output layer packed."""
    tiny.model(**changes).save_pretrained(path / "dense")
    status = main(["quantize", str(path / "dense"), str(path / "packed"), "--bits", "4", "--granularity", "channel"])
    assert status == 0
    return path / "packed"


@pytest.mark.parametrize("changes", [{}, dict(attention_bias=True, mlp_bias=True)], ids=["plain", "bias"])
def test_two_processes_compute_what_one_does_and_save_the_same_files(tmp_path, changes):
    source = write(tmp_path, **changes)
    code, text = torchrun("run", source, tmp_path / "again", tmp_path / "result.safetensors")
    assert code == 0, text
    result = load_file(tmp_path / "result.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = tiny.logits(model)
    error = (result["logits"] - expected).abs().max() / expected.abs().max()
    assert error < 1e-6, float(error)
    # With a gradient transformers takes another path.
    error = (result["trained"] - expected).abs().max() / expected.abs().max()
    assert error < 1e-6, float(error)
    assert torch.equal(result["tokens"], model.generate(tiny.IDS, max_new_tokens=4, do_sample=False))
    checkpoint.verify(tmp_path / "again")
    before, after = inq.load(source), inq.load(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        a, b = (v if isinstance(v, torch.Tensor) else v.weight for v in (value, after[name]))
        assert torch.equal(a, b), name
        if not isinstance(value, torch.Tensor):
            assert torch.equal(value.weight_exp, after[name].weight_exp), name
            assert (value.format, value.shape) == (after[name].format, after[name].shape)
    configs = [json.loads((p / "config.json").read_text())["quantization_config"] for p in (source, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_a_float_model_is_refused(tmp_path):
    write(tmp_path)
    code, text = torchrun("pack", tmp_path / "dense")
    assert code != 0
    assert "expected a packed model for tensor parallelism, got a float one" in text


def test_columns_that_cannot_be_cut_are_refused(tmp_path):
    source = write(tmp_path, intermediate_size=152)
    code, text = torchrun("run", source, tmp_path / "again", tmp_path / "result.safetensors")
    assert code != 0
    assert "expected input features that are a multiple of 16 for 2 processes, got 152" in text


def test_a_directory_that_may_not_be_replaced_is_an_error_in_both(tmp_path):
    source, other = write(tmp_path), tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("precious")
    code, text = torchrun("save", source, other)
    assert code == 0, text
    assert (other / "chapter.txt").read_text() == "precious"
