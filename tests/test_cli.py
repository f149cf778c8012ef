"""The command line, every command run for real; a transformers-style directory goes in, and comes out again."""

import importlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import types
import weakref
from contextlib import contextmanager
from pathlib import Path

import malformed
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import generator, random_packed, same_bits
from test_files import run_on_a_full_disk
from torch import nn

import inq_kernels as inq
from inq_kernels import backends, cli, transcode
from inq_kernels.cli import main

FMT = inq.Format(4)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
H = 24


def llama_tensors():
    """Two shards as of a small Llama in bfloat16."""
    g = generator()

    def random(*shape):
        return (torch.randn(shape, generator=g) / 8).bfloat16()

    first, second = {"model.embed_tokens.weight": random(50, H)}, {}
    for layer, shard in enumerate((first, second)):
        prefix = f"model.layers.{layer}"
        shard[f"{prefix}.input_layernorm.weight"] = random(H)
        shard[f"{prefix}.self_attn.q_proj.weight"] = random(H, H)
        shard[f"{prefix}.self_attn.q_proj.bias"] = random(H)
        shard[f"{prefix}.mlp.experts.weight"] = random(2, H, H)
        shard[f"{prefix}.mlp.down_proj.weight"] = random(H, 2 * H + 3)
    second["lm_head.weight"] = random(50, H)
    return first, second


PACKED = [
    "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight",
]  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "llama"
    path.mkdir()
    weight_map = {}
    for name, tensors in zip(SHARDS, llama_tensors(), strict=True):
        save_file(tensors, path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "time_step_limit": [0.0, float("inf")]}))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer.model").write_bytes(b"\0\1")
    return path


@pytest.fixture
def dense(tmp_path):
    """A file of one Linear, one convolution, an embedding and a norm."""
    g = generator(1)
    tensors = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=g),
        "fc.weight": torch.randn(10, 36, generator=g),
        "fc.bias": torch.randn(10, generator=g),
        "tok_embeddings.weight": torch.randn(7, 6, generator=g),
        "norm.weight": torch.ones(6),
        "steps": torch.tensor(3),
    }
    save_file(tensors, tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


@pytest.fixture
def packed(tmp_path):
    entries = {
        "fc.weight": random_packed(FMT, 6, 20), "head.weight": random_packed(inq.Format(2), 4, 6),
        "fc.bias": torch.ones(6), "embedding.weight": torch.ones(3, 4),
    }  # fmt: skip
    inq.save(entries, tmp_path / "packed.safetensors")
    return tmp_path / "packed.safetensors"


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of one command."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def succeeds(capsys, *arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    return out


def fails(capsys, *arguments):
    """The message of a command that must fail: one line, no traceback."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, ""), (out, err)
    assert err.startswith("inq: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("inq: error: ").rstrip("\n")


def cells(out, name):
    """The cells of the table's row that begins with ``name``."""
    return next(line.split() for line in out.splitlines() if line.split()[:1] == [name])


# --- quantize: a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_quantize_a_file(capsys, tmp_path, dense, target):
    out = succeeds(capsys, "quantize", dense, tmp_path / target, "--bits", 5)
    source, entries = load_file(dense), inq.load(tmp_path / target)
    assert entries.keys() == source.keys()
    fmt = inq.Format(5)
    for name in ("fc.weight", "conv.weight"):
        w_hat = inq.quantize(source[name], fmt)
        assert entries[name].format == fmt
        assert same_bits(inq.unpack(entries[name]), w_hat)
        noise = (source[name] - w_hat).double().square().sum()
        sqnr = float(10 * torch.log10(source[name].double().square().sum() / noise))
        zeros = 100 * float((w_hat == 0).double().mean())
        bits = f"{8 * (entries[name].weight.nbytes + len(w_hat)) / w_hat.numel():.2f}"
        shape = "×".join(map(str, w_hat.shape))
        assert cells(out, name) == [name, shape, bits, "rounded", f"{sqnr:.1f}", f"{zeros:.1f}"]
    for name in ("fc.bias", "tok_embeddings.weight", "norm.weight", "steps"):
        assert same_bits(entries[name], source[name])
    assert "skipped by '*[Ee]mbed*'" in out
    assert "tok_embeddings.weight" in out
    assert "rank 1" in out
    assert "no .weight" in out
    assert "Default skip: *[Ee]mbed* " in out
    before, after = 4 * (108 + 360 + 10 + 42 + 6) + 8, 4 * (20 + 1) + 10 * (25 + 1) + 40 + 168 + 24 + 8
    assert f"{before / after:.2f} times smaller; {4 * 468 / before:.0%} of the bytes were packed" in out
    assert out.splitlines()[-1] == (
        "One-shot rounding to powers of two is not lossless: its SQNR saturates near 14 to 15 dB, however many bits. "
        "Retraining with inq.INQ is what makes it lossless."
    )


def test_quantize_takes_every_format(capsys, tmp_path, dense):
    out = succeeds(
        capsys, "quantize", dense, tmp_path / "q.safetensors", "--bits", 3, "--levels", "dense", "--granularity",
        "channel", "--exponent", "max",
    )  # fmt: skip
    fmt = inq.Format(3, "dense", "channel", "max")
    assert str(fmt) in out
    assert inq.load(tmp_path / "q.safetensors")["fc.weight"].format == fmt


def test_weights_on_the_grid_are_packed_exactly(capsys, tmp_path):
    """As after retraining: not by the rule, which would choose another exponent for them."""
    w = inq.unpack(random_packed(FMT, 8, 16, n1=-3))
    save_file({"a.weight": w, "b.weight": torch.randn(4, 4)}, tmp_path / "a.safetensors")
    out = succeeds(capsys, "quantize", tmp_path / "a.safetensors", tmp_path / "q.safetensors", "--bits", 4)
    assert cells(out, "a.weight")[3:5] == ["exact", "inf"]
    assert cells(out, "b.weight")[3] == "rounded"
    assert "is not lossless" in out
    assert same_bits(inq.unpack(inq.load(tmp_path / "q.safetensors")["a.weight"]), w)
    out = succeeds(
        capsys, "quantize", tmp_path / "a.safetensors", tmp_path / "q.safetensors", "--bits", 4, "--only", "a"
    )
    assert "All packed weights were powers of two of this format already: nothing was lost." in out
    assert "not among --only" in out


def test_skip_only_and_the_default_skip(capsys, tmp_path, dense):
    def chosen(*options):
        out = succeeds(capsys, "quantize", dense, tmp_path / "q.safetensors", *options)
        entries = inq.load(tmp_path / "q.safetensors")
        return sorted(n for n, v in entries.items() if isinstance(v, inq.PackedWeight)), out

    assert chosen()[0] == ["conv.weight", "fc.weight"]
    assert chosen("--skip", "fc")[0] == ["conv.weight"]
    assert "skipped by 'fc'" in chosen("--skip", "fc")[1]
    assert chosen("--only", "c*")[0] == ["conv.weight"]
    names, out = chosen("--no-default-skip")
    assert names == ["conv.weight", "fc.weight", "tok_embeddings.weight"]
    assert "Default skip" not in out
    assert chosen("--no-default-skip", "--skip", "tok*", "--skip", "conv")[0] == ["fc.weight"]
    assert fails(capsys, "quantize", dense, tmp_path / "x.safetensors", "--skip", "lm_head").startswith(
        "inq.quantize: skip: expected a pattern that matches a module, got 'lm_head'; there are"
    )
    error = fails(capsys, "quantize", dense, tmp_path / "x.safetensors", "--skip", "*")
    assert "expected a weight to pack, got none (" in error
    assert "conv.weight: skipped by '*'" in error
    assert not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_packed_says_why(capsys, tmp_path):
    tensors = {
        "a.weight": torch.randn(4, 4),
        "eight.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "whole.weight": torch.ones(4, 4, dtype=torch.int64),
        "empty.weight": torch.ones(0, 4),
        "conv1d.weight": torch.ones(4, 4, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    out = succeeds(capsys, "quantize", tmp_path / "a.safetensors", tmp_path / "q.safetensors")
    for reason, name in (
        ("dtype float8_e4m3fn", "eight"), ("dtype int64", "whole"), ("is empty", "empty"), ("rank 3", "conv1d"),
    ):  # fmt: skip
        assert f"{name}.weight" in next(line for line in out.splitlines() if line.startswith(reason))
    assert inq.load(tmp_path / "q.safetensors").keys() == tensors.keys()


def test_what_looks_like_an_embedding_stays_float():
    for name in (
        "model.embed_tokens", "transformer.wte", "transformer.wpe", "shared", "bert.embeddings.word_embeddings", "emb",
        "pos_emb", "decoder.token_emb.emb", "encoder.position_embedding", "vision.patch_embed.proj", "TokenEmbedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ):  # fmt: skip
        assert transcode.first_match(transcode.DEFAULT_SKIP, name), name
    for name in ("model.layers.0.self_attn.q_proj", "lm_head", "fc1", "conv1", "h.0.attn.c_attn", "member.proj"):
        assert not transcode.first_match(transcode.DEFAULT_SKIP, name), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quantize_and_export_keep_the_dtype(capsys, tmp_path, dtype):
    w = torch.randn(5, 9, generator=generator()).to(dtype)
    save_file({"a.weight": w, "a.bias": w[0].clone()}, tmp_path / "a.safetensors")
    succeeds(capsys, "quantize", tmp_path / "a.safetensors", tmp_path / "q.safetensors", "--bits", 4)
    out = succeeds(capsys, "export", "--to", "dense", tmp_path / "q.safetensors", tmp_path / "d.safetensors")
    assert "1 weights unpacked, bit-exact" in out
    back = load_file(tmp_path / "d.safetensors")
    assert same_bits(back["a.weight"], inq.quantize(w, FMT))
    assert same_bits(back["a.bias"], w[0])


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "got 1 NaN and 0 Inf of 360"), (float("-inf"), "got 0 NaN and 1 Inf of 360")],
)
def test_nan_and_inf_are_named_and_nothing_is_left(capsys, tmp_path, dense, value, message):
    tensors = load_file(dense)
    tensors["fc.weight"][3, 4] = value
    save_file(tensors, dense)
    for target in ("out.safetensors", "out"):
        error = fails(capsys, "quantize", dense, tmp_path / target)
        assert error == f"{dense}: tensor 'fc.weight': expected finite values, {message}"
    assert os.listdir(tmp_path) == ["dense.safetensors"]


# --- quantize: a directory --------------------------------------------------------------------------------------------


def test_quantize_a_directory_and_export_it_again(capsys, tmp_path, llama):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "state.pkl", "flax_model.msgpack"):
        (llama / name).write_bytes(b"\x80\x04")
    (llama / "consolidated.safetensors").write_bytes(b"")
    (llama / ".cache").mkdir()
    (llama / "onnx").mkdir()
    os.mkfifo(llama / "pipe")
    (tmp_path / "secret").write_text("secret")
    (llama / "notes.txt").symlink_to(tmp_path / "secret")
    source = {name: t for shard in llama_tensors() for name, t in shard.items()}

    out = succeeds(capsys, "quantize", llama, tmp_path / "q", "--bits", 4)
    assert sorted(os.listdir(tmp_path / "q")) == sorted(
        [*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer.model"]
    )
    not_copied = next(line for line in out.splitlines() if line.startswith("Not copied"))
    assert not_copied == (
        "Not copied: .cache (hidden), consolidated.safetensors (other weights), flax_model.msgpack (other weights), "
        "notes.txt (no regular file of the directory), onnx (no regular file of the directory), "
        "optimizer.pt (may hold a pickle), pipe (no regular file of the directory), "
        "pytorch_model.bin (may hold a pickle), state.pkl (may hold a pickle), training_args.bin (may hold a pickle)"
    )
    assert (tmp_path / "q" / "tokenizer.model").read_bytes() == b"\0\1"
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == {"model_type": "llama", "time_step_limit": [0.0, float("inf")]}
    assert settings["ignore"] == ["model.embed_tokens", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert (settings["quant_method"], settings["bits"]) == ("inq", 4)

    entries = inq.load(tmp_path / "q")
    assert [name for name, value in entries.items() if isinstance(value, inq.PackedWeight)] == sorted(
        PACKED, key=list(entries).index
    )
    assert sorted(PACKED) == sorted(n for n, v in entries.items() if isinstance(v, inq.PackedWeight))
    assert all(same_bits(v, source[n]) for n, v in entries.items() if n not in PACKED)
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "q" / shard)
    total = sum(t.nbytes for shard in SHARDS for t in load_file(tmp_path / "q" / shard).values())
    assert index["metadata"]["total_size"] == total

    # Over the old one, and back.
    succeeds(capsys, "quantize", llama, tmp_path / "q", "--bits", 4)
    succeeds(capsys, "export", "--to", "dense", tmp_path / "q", tmp_path / "d")
    assert sorted(os.listdir(tmp_path / "d")) == sorted(os.listdir(tmp_path / "q"))
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == config
    back = {name: t for shard in SHARDS for name, t in load_file(tmp_path / "d" / shard).items()}
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        assert same_bits(back[name], inq.quantize(tensor, FMT) if name in PACKED else tensor), name
    assert (
        json.loads((tmp_path / "d" / "model.safetensors.index.json").read_text())["weight_map"]
        == json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"]
    )
    # What was exported lies on the grid: quantizing it again is exact.
    assert "nothing was lost" in succeeds(capsys, "quantize", tmp_path / "d", tmp_path / "again", "--bits", 4)
    for shard in SHARDS:
        again, once = load_file(tmp_path / "again" / shard), load_file(tmp_path / "q" / shard)
        assert again.keys() == once.keys()
        assert all(same_bits(again[name], once[name]) for name in once)


def test_a_packed_directory_loads_into_its_model(capsys, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(6, 8), "fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    (tmp_path / "m").mkdir()
    save_file(model.state_dict(), tmp_path / "m" / "model.safetensors")
    succeeds(capsys, "quantize", tmp_path / "m", tmp_path / "q", "--bits", 5)
    assert sorted(os.listdir(tmp_path / "q")) == ["inq.json", "model.safetensors"]
    expected = inq.Linear.from_float(model["fc"], inq.Format(5))
    inq.load(tmp_path / "q", model)
    x = torch.randn(3, 8)
    assert same_bits(model["fc"](x), expected(x))


def test_a_tied_head_stays_float(capsys, tmp_path, llama):
    config = json.loads((llama / "config.json").read_text()) | {"tie_word_embeddings": True}
    (llama / "config.json").write_text(json.dumps(config))
    out = succeeds(capsys, "quantize", llama, tmp_path / "q")
    assert "tied to the embedding (config.json)" in out
    assert isinstance(inq.load(tmp_path / "q")["lm_head.weight"], torch.Tensor)


def test_the_hub_s_cache_is_a_source(capsys, tmp_path, llama):
    snapshot = tmp_path / "models--me--net" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--net" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, name in enumerate(sorted(os.listdir(llama))):
        (llama / name).rename(blobs / str(index))
        (snapshot / name).symlink_to(f"../../blobs/{index}")
    succeeds(capsys, "quantize", snapshot, tmp_path / "q")
    assert (tmp_path / "q" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "q" / "tokenizer.json").is_symlink()
    assert len(inq.load(tmp_path / "q")) == len(llama_tensors()[0]) + len(llama_tensors()[1])


def test_memory_is_that_of_one_tensor_and_one_packed_shard(tmp_path, llama, monkeypatch):
    """Source tensors that will be packed are gone before the next one is read."""
    alive, most, real = [], 0, transcode.files.open_tensors

    @contextmanager
    def watched(*arguments):
        with real(*arguments) as get:

            def read(name):
                nonlocal most
                tensor = get(name)
                if name in PACKED:
                    alive.append(weakref.ref(tensor))
                most = max(most, sum(reference() is not None for reference in alive))
                return tensor

            yield read

    monkeypatch.setattr(transcode.files, "open_tensors", watched)
    transcode.quantize(llama, tmp_path / "q", FMT)
    assert len(alive) >= len(PACKED)
    assert most == 1


@pytest.mark.parametrize("inside", ["", "/sub", "/../llama", "/../link", "/.."])
def test_an_output_that_overlaps_the_source(capsys, tmp_path, llama, inside):
    (tmp_path / "link").symlink_to(llama)
    before = sorted(os.listdir(llama))
    for command in (["quantize"], ["export", "--to", "dense"]):
        error = fails(capsys, *command, llama, f"{llama}{inside}")
        assert "expected an output outside of the source" in error
    assert sorted(os.listdir(llama)) == before


def test_a_file_is_not_its_own_output(capsys, tmp_path, dense, packed):
    (tmp_path / "link.safetensors").symlink_to(dense)
    for target in (dense, tmp_path / "link.safetensors", tmp_path):
        assert "expected an output outside of the source" in fails(capsys, "quantize", dense, target)
    assert "expected an output outside of the source" in fails(capsys, "export", "--to", "dense", packed, packed)


def test_nan_in_the_second_shard_leaves_nothing(capsys, tmp_path, llama):
    tensors = load_file(llama / SHARDS[1])
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, llama / SHARDS[1])
    error = fails(capsys, "quantize", llama, tmp_path / "q")
    assert error.startswith(f"{llama / SHARDS[1]}: tensor 'lm_head.weight': expected finite values, got 1 NaN")
    assert os.listdir(tmp_path) == ["llama"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
         "config.json: expected a float model, got one quantized by 'gptq'"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: expected an object, got list"),
        (lambda d: (d / SHARDS[1]).unlink(), f"{SHARDS[1]}: expected a file, got No such file or directory"),
        (lambda d: [(d / s).unlink() for s in (*SHARDS, "model.safetensors.index.json")],
         "expected model.safetensors or model.safetensors.index.json, got neither"),
        (lambda d: save_file({"lm_head.weight": torch.ones(2, 2), "lm_head.weight_exp": torch.ones(2)}, d / SHARDS[1]),
         "expected the tensors that model.safetensors.index.json names, missing 'model.layers.1"),
    ],
)  # fmt: skip
def test_directories_that_cannot_be_quantized(capsys, tmp_path, llama, change, message):
    change(llama)
    assert message in fails(capsys, "quantize", llama, tmp_path / "q")
    assert os.listdir(tmp_path) == ["llama"]


def test_other_sources_that_cannot_be_quantized(capsys, tmp_path, llama, dense, packed):
    out = tmp_path / "x.safetensors"
    assert "expected float weights, got an inq file: it is packed already" in fails(capsys, "quantize", packed, out)
    assert "expected a directory for 2 files, got the name of one file" in fails(capsys, "quantize", llama, out)
    assert "expected a file, got No such file" in fails(capsys, "quantize", tmp_path / "none.safetensors", out)
    assert "expected a .safetensors file, got .bin: formats that can hold a pickle" in fails(
        capsys, "quantize", tmp_path / "pytorch_model.bin", out
    )
    save_file({"a.weight": torch.ones(2, 2), "a.weight_exp": torch.ones(2)}, tmp_path / "taken.safetensors")
    assert "tensor 'a.weight_exp': expected that name to be free for packing" in fails(
        capsys, "quantize", tmp_path / "taken.safetensors", out
    )
    assert f"{tmp_path}/nowhere: no such directory" in fails(capsys, "quantize", dense, tmp_path / "nowhere" / "x")
    assert not out.exists()


def test_every_malformed_file_is_an_error_of_one_line(capsys, tmp_path):
    for name, case in malformed.CASES.items():
        directory = tmp_path / name
        directory.mkdir()
        path = case.write(directory)
        for command in (["verify"], ["inspect"]):
            fails(capsys, *command, path)
        fails(capsys, "export", "--to", "dense", path, tmp_path / "out.safetensors")
        shutil.rmtree(directory)
    assert os.listdir(tmp_path) == []


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_refuses_a_dtype_that_would_round(capsys, tmp_path):
    packed = random_packed(FMT, 4, 8, n1=20)
    inq.save({"a.weight": packed}, tmp_path / "q.safetensors")
    command = ["export", "--to", "dense", tmp_path / "q.safetensors", tmp_path / "d.safetensors"]
    error = fails(capsys, *command, "--dtype", "float16")
    assert "tensor 'a.weight': expected values that torch.float16 holds, got " in error
    assert not (tmp_path / "d.safetensors").exists()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        succeeds(capsys, *command, "--dtype", str(dtype).removeprefix("torch."))
        assert same_bits(load_file(tmp_path / "d.safetensors")["a.weight"], inq.unpack(packed, dtype))


def test_export_of_row_scales_is_exact_or_refused(capsys, tmp_path):
    packed = random_packed(FMT, 4, 8, scale=True)
    inq.save({"a.weight": packed, "n.weight": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "q.safetensors")
    command = ["export", "--to", "dense", tmp_path / "q.safetensors", tmp_path / "d.safetensors"]
    succeeds(capsys, *command)
    assert same_bits(load_file(tmp_path / "d.safetensors")["a.weight"], inq.unpack(packed))
    assert "that it would round" in fails(capsys, *command, "--dtype", "bfloat16")


def test_export_a_file_into_a_directory_and_back(capsys, tmp_path, packed):
    succeeds(capsys, "export", "--to", "dense", packed, tmp_path / "d")
    assert os.listdir(tmp_path / "d") == ["model.safetensors"]
    inq.save(inq.load(packed), tmp_path / "q")
    succeeds(capsys, "export", "--to", "dense", tmp_path / "q", tmp_path / "d.safetensors")
    one, other = load_file(tmp_path / "d" / "model.safetensors"), load_file(tmp_path / "d.safetensors")
    assert all(same_bits(one[name], other[name]) for name in other)


# --- save -------------------------------------------------------------------------------------------------------------


def test_save_compresses_and_writes_plain_again(capsys, tmp_path):
    fmt = inq.Format(5)
    w = torch.randn(64, 128, generator=generator())
    inq.save({"a.weight": inq.pack(inq.quantize(w, fmt), fmt)}, tmp_path / "plain.safetensors")
    small, plain = tmp_path / "small", tmp_path / "back.safetensors"
    out = succeeds(capsys, "save", tmp_path / "plain.safetensors", small, "--compress")
    assert re.fullmatch(r".*/small: 6\.\d KiB -> 4\.\d KiB, bit-exact\n", out)
    shown = succeeds(capsys, "inspect", small)
    assert re.search(r"^a +64×128 +5-bit paper.*  zstd +3\.\d KiB +3\.\d\d ", shown, re.MULTILINE)
    assert re.search(
        r"^packed weights: 3\.\d KiB, 3\.\d{3} bits a weight .* entropy of the codes 3\.\d{3}$", shown, re.MULTILINE
    )
    succeeds(capsys, "save", small, plain)
    assert plain.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert "expected an output outside of the source" in fails(capsys, "save", plain, plain)


# --- inspect, verify, doctor, demo ------------------------------------------------------------------------------------


def test_inspect_shows_every_layer(capsys, packed):
    out = succeeds(capsys, "inspect", packed)
    fc = inq.load(packed)["fc.weight"]
    low, high = int(fc.weight_exp.min()), int(fc.weight_exp.max())
    row = next(line for line in out.splitlines() if line.startswith("fc "))
    assert f"6×20  {FMT}" in row
    # 6 rows of 3 groups of 4 bytes, and 6 exponents, for 120 weights.
    zeros = 100 * float((inq.unpack(fc) == 0).double().mean())
    assert row.split()[-6:-1] == [f"{8 * (72 + 6) / 120:.2f}", str(low), "to", str(high), f"{zeros:.1f}"]
    assert "2-bit paper" in next(line for line in out.splitlines() if line.startswith("head "))
    size, float32 = packed.stat().st_size, 4 * (120 + 24 + 6 + 12)
    assert out.splitlines()[-1] == (
        f"float32 {float32} B, in 1 file(s) {size / 1024:.1f} KiB: {float32 / size:.2f} times smaller"
    )


def test_verify_says_ok_or_what_is_wrong(capsys, packed):
    assert succeeds(capsys, "verify", packed) == f"{packed}: ok, 6 tensors\n"
    content = bytearray(packed.read_bytes())
    content[-1] ^= 1
    packed.write_bytes(content)
    assert "damaged data" in fails(capsys, "verify", packed)


def test_doctor_names_everything(capsys, monkeypatch):
    monkeypatch.setenv("INQ_BACKEND", "reference")
    lines = dict(line.split(None, 1) for line in succeeds(capsys, "doctor").replace("backend ", "").splitlines())
    assert lines["inq_kernels"] == inq.__version__
    assert lines["python"].startswith(sys.version.split()[0])
    assert lines["torch"] == torch.__version__
    assert {"triton", "safetensors", "numpy", "zstandard", "rich"} <= lines.keys()
    assert lines["INQ_BACKEND"] == "reference"
    for name, reason in backends.availability().items():
        expected = "available" if reason is None else f"not available: {reason}"
        assert lines[name] == expected + (f": {backends.cpu.summary()}" if name == "cpu" and reason is None else "")


def test_doctor_says_which_instructions_and_why_no_better(capsys):
    assert backends.availability()["cpu"] is None  # asking loads the library
    native = torch.ops.inq_cpu
    try:
        native.set_isa("portable")
        assert f"portable, by INQ_CPU_ISA= (the machine has {native.detected_isa()})" in succeeds(capsys, "doctor")
    finally:
        native.set_isa(native.detected_isa())
    missing = native.why_not_better()
    assert f"{native.detected_isa()} ({missing})" in succeeds(capsys, "doctor") if missing else True


def test_doctor_without_the_compiled_library_says_why(tmp_path):
    """As installed where there is no compiler: the reason that setup.py left, and the reference runs."""
    package = Path(inq.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "_cpu.so", "_cpu_build.txt")
    shutil.copytree(package, tmp_path / "inq_kernels", ignore=ignored)
    (tmp_path / "inq_kernels" / "_cpu_build.txt").write_text("it was installed without one: no C++ compiler was found")
    script = (
        "import torch, inq_kernels as inq, inq_kernels.cli as cli; cli.main(['doctor']);"
        "p = inq.pack(torch.ones(3, 8), inq.Format(4)); print(inq.linear(torch.ones(1, 8), p).tolist());"
        "inq.linear(torch.ones(1, 8), p, backend='cpu')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "INQ_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    why = "there is no compiled library: it was installed without one: no C++ compiler was found"
    assert f"backend cpu        not available: {why}" in done.stdout
    assert "[[8.0, 8.0, 8.0]]" in done.stdout
    assert f"BackendError: inq.linear: backend 'cpu' was asked for and cannot run: {why}" in done.stderr


def test_doctor_prints_plans_for_any_machine(capsys):
    arguments = ("--op", "linear", "--m", 1, 300, "--n", 100, "--k", 64, "--dtype", "bfloat16", "float64")
    out = succeeds(capsys, "doctor", "--plan", *arguments, "--isa", "amx")
    rows = [line.split() for line in out.splitlines() if line.startswith("linear")]
    assert [(row[1], row[3], row[6]) for row in rows] == [
        ("bfloat16", "1", "cpu"), ("bfloat16", "300", "cpu"),
        ("float64", "1", "reference"), ("float64", "300", "reference"),
    ]  # fmt: skip
    again = succeeds(capsys, "doctor", "--plan", *arguments, "--isa", "amx")
    assert again == out
    assert succeeds(capsys, "doctor", "--plan", *arguments, "--isa", "portable") != out


def test_doctor_prints_plans_for_any_gpu(capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("INQ_TRITON_TILES", raising=False)
    arguments = ("--plan", "--device", "cuda", "--n", 4096, "--k", 4096)
    out = succeeds(capsys, "doctor", *arguments, "--m", 1, 4096, "--dtype", "bfloat16", "float64", "--op", "linear")
    assert "sm_90, 132 processors" in out
    rows = [line for line in out.splitlines() if line.startswith("linear")]
    assert [row.split()[6] for row in rows] == ["triton", "triton", "reference", "reference"]
    tile = importlib.import_module("inq_kernels.triton_ops.tiles").HOPPER["linear bf16"][16]
    shown = f"tile {tile.bn}×{tile.bm}×{tile.bk}, {tile.warps} warps, {tile.stages} stages, "
    assert re.search(re.escape(shown) + r"\d+ parts of K", rows[0])
    assert "decode once, then the library's product" in rows[1]
    assert [row.split()[-1] for row in rows] == ["slices_bf16"] * 2 + ["storage"] * 2

    def plan(op, capability, *more):
        shown = succeeds(capsys, "doctor", *arguments, "--op", op, "--m", 16, "--dtype", "bfloat16",
                         "--capability", capability, *more)  # fmt: skip
        return next(line for line in shown.splitlines() if line.startswith(op))

    assert plan("linear_fp8", 90).endswith("slices_e4m3")
    # No e4m3 products before sm_89: the same numbers as float16.
    assert plan("linear_fp8", 80).endswith("slices_fp16")
    assert plan("linear_fp8", 90, "--bits", 5).endswith("slices_bf16")
    assert plan("linear", 90, "--levels", "dense").endswith("slices_fp16")
    assert "parts of K" in plan("conv2d", 90)
    assert "parts of K" not in plan("linear", 80, "--processors", 1)
    assert "reference" in plan("linear", 75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda", "--isa", "amx"), "--isa is about CPUs: expected none with --device cuda, got amx"),
        (("--op", "linear_fp8"), "--op: expected one of .* with --device cpu, got 'linear_fp8'"),
        (("--device", "cuda", "--m", "0"), "--m: expected at least 1, got 0"),
    ],
)
def test_plans_that_cannot_be(capsys, arguments, message):
    assert main(["doctor", "--plan", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("isa", ["amx9", "sse"])
def test_an_unknown_instruction_set_is_an_error_and_no_fallback(isa):
    environment = {**os.environ, "INQ_CPU_ISA": isa}
    script = "import torch, inq_kernels as inq; inq.exponents(torch.ones(1, 1), inq.Format(4))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert f'INQ_CPU_ISA: expected portable, avx2, avx512 or amx, got "{isa}"' in done.stderr
    assert done.returncode == 1


def test_doctor_names_a_gpu(capsys, monkeypatch):
    monkeypatch.delenv("INQ_BACKEND", raising=False)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "get_device_name", lambda index: "Fast GPU")
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: types.SimpleNamespace(total_memory=80 << 30))
    out = succeeds(capsys, "doctor")
    assert "cuda:0             Fast GPU, sm_90, 80.0 GiB" in out
    assert "INQ_BACKEND        not set" in out


def test_demo_is_handed_over(capsys, monkeypatch):
    demo = types.ModuleType("inq_kernels.demo")
    demo.add_arguments = lambda parser: parser.add_argument("--seeds", type=int)
    demo.run = lambda args: 40 + args.seeds
    monkeypatch.setitem(sys.modules, "inq_kernels.demo", demo)
    assert run(capsys, "demo", "--seeds", 2)[0] == 42


# --- the frame --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["quantize", "a"], "required: OUT"),
        (["quantize", "a", "b", "--bits", "6"], "argument --bits: invalid choice: 6"),
        (["export", "a", "b"], "required: --to"),
        (["export", "--to", "gguf", "a", "b"], "argument --to: invalid choice: 'gguf'"),
    ],
)
def test_wrong_usage_is_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    "command", [[], ["quantize"], ["save"], ["inspect"], ["verify"], ["export"], ["import"], ["doctor"], ["demo"]]
)
def test_help(capsys, command):
    status, out, err = run(capsys, *command, "--help")
    assert (status, err) == (0, "")
    assert "usage: inq" in out


def raise_in_verify(monkeypatch, error):
    def verify(path):
        raise error

    monkeypatch.setattr("inq_kernels.checkpoint.verify", verify)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
        (ImportError("No module named 'sklearn'"), "No module named 'sklearn'"),
    ],
)
def test_an_error_is_one_line(capsys, monkeypatch, error, line):
    raise_in_verify(monkeypatch, error)
    assert fails(capsys, "verify", "x") == line


def test_a_mistake_of_ours_keeps_its_traceback(capsys, monkeypatch):
    raise_in_verify(monkeypatch, KeyError("x"))
    with pytest.raises(KeyError):
        main(["verify", "x"])


def test_an_interrupt_is_status_130(capsys, monkeypatch):
    raise_in_verify(monkeypatch, KeyboardInterrupt())
    assert run(capsys, "verify", "x") == (130, "", "inq: interrupted\n")


def command_line(*arguments):
    return [sys.executable, "-m", "inq_kernels.cli", *map(str, arguments)]


def test_as_a_process(packed):
    result = subprocess.run(command_line("verify", packed), check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{packed}: ok, 6 tensors\n", "")
    result = subprocess.run(command_line("verify", packed.parent), check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("inq: error: ")
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_error(packed):
    # Buffered, what could not be written is tried again when the interpreter ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command_line("inspect", packed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_stdout_without_unicode_still_shows_the_table(packed):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command_line("inspect", packed), check=False, capture_output=True, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"6?20" in result.stdout


def on_a_terminal(*arguments):
    """What a command writes where stdout and stderr are a terminal of 200 columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command_line(*arguments), stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        written = b""
        try:
            while piece := os.read(leader, 4096):
                written += piece
        except OSError:  # the terminal's way of saying that nobody writes any more
            pass
    os.close(leader)
    assert process.returncode == 0
    return written.decode()


def test_a_terminal_gets_rich_tables_and_progress(tmp_path, dense):
    written = on_a_terminal("quantize", dense, tmp_path / "q.safetensors")
    assert "┃" in written
    assert "skipped by '*[Ee]mbed*'" in written
    assert "fc.weight" in written
    assert "quantizing" in written
    # Drawn and wiped, so that the table stands alone.
    assert "\x1b[" in written


def test_without_rich_a_terminal_gets_plain_tables(capsys, monkeypatch, packed):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert not cli._rich_on(sys.stdout)
    assert "-----" in succeeds(capsys, "inspect", packed)


FULL_DISK = """
    import os, resource, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from inq_kernels.cli import main

    directory, limited = Path(sys.argv[1]), sys.argv[2] == "limit"
    save_file({"fc.weight": torch.randn(16, 16), "embed.weight": torch.ones(380, 380)}, directory / "a.safetensors")
    before = sorted(os.listdir(directory))
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    for target in ("q.safetensors", "q"):
        assert main(["quantize", str(directory / "a.safetensors"), str(directory / target)]) == 1
        assert sorted(os.listdir(directory)) == before, os.listdir(directory)
"""


def test_a_full_disk_is_an_error_of_one_line_and_nothing_is_left(tmp_path):
    result = run_on_a_full_disk(FULL_DISK, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("q.safetensors", "model.safetensors"), strict=True):
        assert line.startswith(f"inq: error: {tmp_path}/")
        assert f"{name}: " in line
        assert line.endswith(("No space left on device", "File too large"))


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    """As a daemon has them."""
    done = subprocess.run(
        f"{sys.executable} -m inq_kernels.cli doctor {closed}", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
