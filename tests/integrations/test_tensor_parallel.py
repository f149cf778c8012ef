"""transformers' tensor parallelism over two processes: results of one process, and files of one process."""

import json
from pathlib import Path

import pytest
import snippets
import tiny
import torch
from launch import torchrun
from safetensors.torch import load_file
from support import same_bits
from transformers import AutoModelForCausalLM

import inq_kernels as inq
from inq_kernels import checkpoint
from inq_kernels.cli import main
from inq_kernels.integrations.transformers import save_pretrained

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def write(path, **changes):
    """A float model, and packed, its output layer too; two layers have row scales, as calibration leaves them: one is
    cut by rows, the other by columns."""
    tiny.model(**changes).save_pretrained(path / "dense")
    status = main(["quantize", str(path / "dense"), str(path / "packed"), "--bits", "4", "--granularity", "channel"])
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(path / "packed")
    for layer in (model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.down_proj):
        scale = torch.linspace(0.5, 1.5, layer.shape[0]).view(-1, 1)
        layer._set_codes(layer.weight.data, layer.weight_exp.data, scale)
    save_pretrained(model, path / "packed")
    return path / "packed"


@pytest.mark.parametrize("changes", [{}, dict(attention_bias=True, mlp_bias=True)], ids=["plain", "bias"])
def test_two_processes_compute_what_one_does_and_save_the_same_files(tmp_path, changes):
    source = write(tmp_path, **changes)
    code, text = torchrun(WORKER, "run", source, tmp_path / "again", tmp_path / "result.safetensors")
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
    scaled = 0
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert same_bits(value, after[name]), name
            continue
        assert (value.format, value.shape) == (after[name].format, after[name].shape)
        parts = ["weight", "weight_exp"] + ["weight_scale"] * (value.weight_scale is not None)
        assert all(same_bits(getattr(value, part), getattr(after[name], part)) for part in parts), name
        assert (value.weight_scale is None) == (after[name].weight_scale is None), name
        scaled += value.weight_scale is not None
    assert scaled == 2
    configs = [json.loads((p / "config.json").read_text())["quantization_config"] for p in (source, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_the_script_of_the_page(tmp_path):
    write(tmp_path).rename(tmp_path / "model-inq4")
    page = snippets.read(snippets.ROOT / "docs" / "serve.md")
    (snippet,) = [each for each in page if "torchrun" in each.needs]
    # What the page's reader has imported.
    before = "from transformers import AutoModelForCausalLM\nimport inq_kernels.integrations.transformers\n"
    after = (
        "assert model.model.layers[0].mlp.up_proj.packed.shape == (80, 64)\n"
        "import torch.distributed\ntorch.distributed.destroy_process_group()\n"
    )
    (tmp_path / "serve.py").write_text(before + snippet.body + after)
    code, text = torchrun(tmp_path / "serve.py", folder=tmp_path)
    assert code == 0, text


def test_a_float_model_is_refused(tmp_path):
    write(tmp_path)
    code, text = torchrun(WORKER, "pack", tmp_path / "dense")
    assert code != 0
    assert "expected a packed model for tensor parallelism, got a float one" in text


def test_columns_that_cannot_be_cut_are_refused(tmp_path):
    source = write(tmp_path, intermediate_size=152)
    code, text = torchrun(WORKER, "run", source, tmp_path / "again", tmp_path / "result.safetensors")
    assert code != 0
    assert "expected input features that are a multiple of 16 for 2 processes, got 152" in text


def test_a_directory_that_may_not_be_replaced_is_an_error_in_both(tmp_path):
    source, other = write(tmp_path), tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("precious")
    code, text = torchrun(WORKER, "save", source, other)
    assert code == 0, text
    assert (other / "chapter.txt").read_text() == "precious"
