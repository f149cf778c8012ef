"""vLLM's own loader, by one process and by two, on a directory that transformers loads as well: each process has the
slices of the files' bytes that are its, and its layers compute what these bytes mean. Without vLLM's compiled parts; a
model's forward needs those."""

import importlib
import sys
from pathlib import Path

import pytest
import tiny
import torch
from launch import torchrun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import inq_kernels as inq
from inq_kernels.cli import main
from inq_kernels.integrations.transformers import save_pretrained

WORKER = Path(__file__).with_name("vllm_worker.py")
BOTH = (
    *(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("qkv_proj", "o_proj")),
    *(f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")),
)


def load(path, processes, *names):
    """(exit status, output, [tensors of each process]) of vLLM's loader."""
    out = path.parent / f"out{processes}"
    out.mkdir(exist_ok=True)
    code, text = torchrun(WORKER, path, out, *names, processes=processes, seconds=600)
    results = [load_file(out / f"{r}.safetensors") for r in range(processes)] if code == 0 else []
    return code, text, results


def quantize(source, target, *arguments):
    assert main(["quantize", str(source), str(target), "--bits", "5", "--granularity", "channel", *arguments]) == 0
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory as transformers writes and loads it, in shards, and its entries; one weight has row scales."""
    path = tmp_path_factory.mktemp("vllm")
    tiny.model(attention_bias=True).save_pretrained(path / "dense")
    packed = AutoModelForCausalLM.from_pretrained(quantize(path / "dense", path / "quantized"))
    layer = packed.model.layers[0].mlp.up_proj
    layer._set_codes(layer.weight.data, layer.weight_exp.data, torch.linspace(0.5, 1.5, 160).view(160, 1))
    save_pretrained(packed, path / "packed", max_shard_size="12KB")
    assert len(list((path / "packed").glob("*.safetensors"))) > 3
    assert tiny.same_state(AutoModelForCausalLM.from_pretrained(path / "packed"), packed)
    return path / "packed", inq.load(path / "packed")


def part(entries, name, rank, processes):
    """(weight, exponents, scale or None, bias or None) of a layer of vLLM, cut out of the files."""
    parent, _, layer = name.rpartition(".")
    names = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.get(layer, [layer])
    weights = [entries[f"{parent}.{n}.weight" if parent else f"{n}.weight"] for n in names]
    rows = []
    for packed in weights:
        scale = (
            torch.ones_like(packed.weight_exp, dtype=torch.float32)
            if packed.weight_scale is None
            else packed.weight_scale
        )
        rows.append((packed.weight, packed.weight_exp, scale))
    if layer in ("o_proj", "down_proj"):
        weight, exponents, scale = rows[0]
        return weight.chunk(processes, 1)[rank], exponents, scale, weights[0].shape[1] // processes
    cut = [torch.cat([row[i].chunk(processes, 0)[rank] for row in rows]) for i in range(3)]
    return *cut, weights[0].shape[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_each_process_has_its_slices_and_computes_with_them(model, processes):
    path, entries = model
    code, text, results = load(path, processes, *BOTH, "lm_head")
    assert code == 0, text[-4000:]
    for rank, result in enumerate(results):
        for name in BOTH:
            weight, exponents, scale, k = part(entries, name, rank, processes)
            assert torch.equal(result[f"{name}.weight"], weight), name
            assert torch.equal(result[f"{name}.weight_exp"], exponents), name
            has_scale = bool((scale != 1).any())
            assert (f"{name}.weight_scale" in result) == has_scale
            packed = inq.PackedWeight(weight, exponents, scale, inq.Format(5, granularity="channel"), (len(weight), k))
            x = result[f"{name}.x"]
            torch.testing.assert_close(result[f"{name}.y"], x @ inq.unpack(packed).T, rtol=1e-5, atol=1e-5)
    # An output layer of its own is packed, too; vLLM cuts it by rows of the vocabulary, which it pads.
    weight, exponents = (torch.cat([r[f"lm_head.{part}"] for r in results]) for part in ("weight", "weight_exp"))
    assert torch.equal(weight[:96], entries["lm_head.weight"].weight)
    assert torch.equal(exponents[:96], entries["lm_head.weight"].weight_exp)
    assert not weight[96:].any()


def surface():
    """vLLM's functions, classes and what these define, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "vllm":
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[name, key] = value
            if isinstance(value, type):
                found |= {(name, key, attribute): member for attribute, member in vars(value).items()}
    return found


def test_the_entry_point_is_installed_and_registers_twice_and_patches_nothing():
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_plugins_by_group

    plugins = load_plugins_by_group("vllm.general_plugins")
    assert "inq" in plugins, "installed before pyproject.toml had it? make installs again"
    # What the plugin imports, so that only the plugin's own doing comes after.
    for module in ("linear", "quantization.base_config", "vocab_parallel_embedding"):
        importlib.import_module(f"vllm.model_executor.layers.{module}")
    importlib.import_module("vllm.model_executor.parameter")
    before = surface()
    assert len(before) > 1000
    plugins["inq"]()
    after = surface()
    assert [name for name, value in before.items() if after.get(name) is not value] == []
    first = get_quantization_config("inq")
    plugins["inq"]()
    assert get_quantization_config("inq") is first
    assert first.get_name() == "inq"


def test_parts_of_a_fused_layer_in_two_formats_are_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path / "dense")
    path = quantize(tmp_path / "dense", tmp_path / "packed", "--skip", "*.k_proj")
    code, text, _ = load(path, 1)
    assert code != 0
    assert "expected one format for all parts of a fused layer" in text
    assert "k_proj: float" in text


def test_columns_that_cannot_be_cut_are_refused(tmp_path):
    tiny.model(intermediate_size=152).save_pretrained(tmp_path / "dense")
    code, text, _ = load(quantize(tmp_path / "dense", tmp_path / "packed"), 2)
    assert code != 0
    assert "expected input features a process that are a multiple of 8, got 76 of 152" in text


def test_packed_experts_are_refused(tmp_path):
    # Float ones need vLLM's compiled parts as soon as they are loaded.
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    code, text, _ = load(quantize(tmp_path / "dense", tmp_path / "packed"), 1)
    assert code != 0
    assert "expected float experts, got packed ones, which the vLLM plugin cannot run yet" in text


def test_a_directory_with_pickles_instead_is_refused(tmp_path):
    """vLLM itself would open the .bin."""
    tiny.model().save_pretrained(tmp_path / "dense")
    path = quantize(tmp_path / "dense", tmp_path / "packed")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    code, text, _ = load(path, 1)
    assert code != 0
    assert "pickles are never opened: 'pytorch_model.bin'" in text


def test_codes_that_are_not_canonical_are_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path / "dense")
    path = quantize(tmp_path / "dense", tmp_path / "packed")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, :] = 0x11
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    code, text, _ = load(path, 1)
    assert code != 0
    assert "expected canonical codes of 5-bit paper" in text
    assert "model.layers.1.mlp.down_proj" in text


def test_a_tied_output_layer_is_its_embedding(tmp_path):
    tiny.model(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    code, text, _ = load(quantize(tmp_path / "dense", tmp_path / "packed"), 1, BOTH[0])
    assert code == 0, text[-4000:]


@pytest.mark.parametrize(
    ("missing", "layer"),
    [
        ("model.layers.0.self_attn.k_proj.weight", "qkv_proj'"),
        ("model.layers.1.mlp.down_proj.weight_exp", "down_proj'"),
    ],
)
def test_what_is_missing_in_the_files_is_no_zero(tmp_path, missing, layer):
    tiny.model().save_pretrained(tmp_path / "dense")
    path = quantize(tmp_path / "dense", tmp_path / "packed")
    tensors = load_file(path / "model.safetensors")
    rows = len(tensors.pop(missing))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    code, text, _ = load(path, 1)
    assert code != 0
    assert f"{layer}: {missing.rpartition('.')[2]}: expected all of its" in text
    assert f"rows in the files, got none of {rows}" in text
