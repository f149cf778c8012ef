"""transformers itself, the oldest version and the newest: what is packed, written and read again is bit for bit one."""

import json
import os
import pickle
import shutil
import sys
import warnings

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import same_bits
from tiny import IDS, logits, packed, same_state
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

import inq_kernels as inq
from inq_kernels import checkpoint
from inq_kernels.cli import main
from inq_kernels.integrations.transformers import InqConfig, save_pretrained

FMT = inq.Format(4)
PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "llama"
    tiny.model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(dense):
    """Packed as it was read."""
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=InqConfig(FMT))


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "packed"
    save_pretrained(quantized, path)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(path, change):
    """Rewrite the one file of a checkpoint without its manifest, as other programs would, after ``change(tensors)``."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def edit_config(path, change):
    content = json.loads((path / "config.json").read_text())
    change(content["quantization_config"])
    (path / "config.json").write_text(json.dumps(content))


# --- packing while reading --------------------------------------------------------------------------------------------


def test_a_float_model_is_packed_as_it_is_read(dense, quantized):
    source = tiny.model()
    assert list(packed(quantized)) == LAYERS
    for name, module in packed(quantized).items():
        w = source.get_submodule(name).weight.detach()
        assert module.format == FMT
        assert same_bits(inq.unpack(module.packed), inq.quantize(w, FMT)), name
        assert not any(p.requires_grad for p in module.parameters() if p.dtype != torch.float32)
    assert type(quantized.lm_head) is torch.nn.Linear
    with torch.no_grad():
        for name in LAYERS:
            weight = source.get_submodule(name).weight
            weight.copy_(inq.quantize(weight, FMT))
    torch.testing.assert_close(logits(quantized), logits(source), rtol=1e-4, atol=1e-5)
    assert quantized.is_quantized
    assert quantized.quantization_method == "inq"


def test_the_report_says_what_stayed_float(quantized):
    report = quantized.hf_quantizer.report
    rows = {row.name: row for row in report.modules}
    assert [name for name, row in rows.items() if row.packed] == LAYERS
    assert "default" in rows["lm_head"].reason
    assert "Embedding" in rows["model.embed_tokens"].reason
    row = rows[LAYERS[0]]
    assert (row.bytes_before, row.bytes_after) == (64 * 64 * 4, 64 * 64 // 2 + 64)
    assert 5 < row.sqnr_db < 40
    assert quantized.config.quantization_config.to_dict()["ignore"] == ["lm_head", "model.embed_tokens"]


def test_skip_overrides_and_formats(dense):
    dense_fmt = inq.Format(3, "dense", "channel", "max")
    config = InqConfig(2, skip=["*.v_proj"], overrides={"model.layers.1.mlp.*": dense_fmt, "lm_head": 5})
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    modules = packed(model)
    assert set(modules) == {name for name in LAYERS if "v_proj" not in name} | {"lm_head"}
    assert modules["lm_head"].format == inq.Format(5)
    assert modules["model.layers.1.mlp.up_proj"].format == dense_fmt
    assert modules["model.layers.0.mlp.up_proj"].format == inq.Format(2)
    said = model.config.quantization_config.to_dict()
    floats = ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    assert said["ignore"] == floats
    assert set(said["overrides"]) == {"lm_head", *(n for n in LAYERS if n.startswith("model.layers.1.mlp"))}
    rows = {row.name: row.reason for row in model.hf_quantizer.report.modules}
    assert rows["model.layers.0.self_attn.v_proj"] == "skipped by '*.v_proj'"


@pytest.mark.parametrize("arguments", [dict(skip=["*.nothing"]), dict(overrides={"model.layer.*": 4})])
def test_a_pattern_without_a_match_is_an_error(dense, arguments):
    with pytest.raises(
        ValueError, match=r"expected a pattern that matches a module, got '(\*\.nothing|model\.layer\.\*)'"
    ):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=InqConfig(FMT, **arguments))


@pytest.mark.parametrize(
    ("pattern", "reason"), [("lm_head", "kept float by default"), ("model.embed_tokens", "no packed module"),
                            ("model.layers.0", "has no weight")],
)  # fmt: skip
def test_an_override_of_what_stays_float_is_an_error(dense, pattern, reason):
    config = InqConfig(FMT, overrides={pattern: 5})
    with pytest.raises(
        ValueError, match=rf"overrides: expected a pattern of what is packed, got '{pattern}' .*{reason}"
    ):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"fmt: expected an inq.Format, got '4'"):
        InqConfig("4")
    with pytest.raises(ValueError, match="bits"):
        InqConfig(7)
    with pytest.raises(TypeError, match="overrides: 'a'"):
        InqConfig(4, overrides={"a": None})


def test_nan_in_a_weight_names_it(dense, tmp_path):
    path = shutil.copytree(dense, tmp_path / "nan")
    edit(path, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7].fill_(float("nan")))
    with pytest.raises(Exception, match=r"model\.layers\.1\.mlp\.up_proj|conversion") as caught:
        AutoModelForCausalLM.from_pretrained(path, quantization_config=InqConfig(FMT))
    assert not isinstance(caught.value, AttributeError)


def test_tied_weights_stay_float(tmp_path):
    tiny.model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", quantization_config=InqConfig(FMT, skip=()))
    assert list(packed(model)) == LAYERS
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = {row.name: row for row in model.hf_quantizer.report.modules}
    assert "lm_head" not in rows or "tied" in rows["lm_head"].reason or "shared" in rows["lm_head"].reason
    save_pretrained(model, tmp_path / "packed")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


def test_dtypes(dense):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=InqConfig(FMT), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight_exp.dtype == torch.int8
    assert logits(model).dtype == torch.bfloat16


def test_convolutions_of_a_vision_model(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    load = transformers.ResNetForImageClassification.from_pretrained
    model = load(tmp_path / "resnet", quantization_config=InqConfig(FMT, skip=())).eval()
    kinds = {type(m) for m in packed(model).values()}
    assert kinds == {inq.Linear, inq.Conv2d}
    save_pretrained(model, tmp_path / "packed")
    checkpoint.verify(tmp_path / "packed")
    again = load(tmp_path / "packed").eval()
    assert same_state(again, model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x).logits, again(x).logits)


# --- round trips ------------------------------------------------------------------------------------------------------


def test_a_round_trip_is_bit_exact(quantized, saved, tmp_path):
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert same_state(again, quantized)
    assert torch.equal(logits(again), logits(quantized))
    assert all(not m.weight.requires_grad for m in packed(again).values())
    assert again.config.quantization_config == quantized.config.quantization_config
    checkpoint.verify(saved)
    save_pretrained(again, tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (saved / name).read_bytes(), name


def test_what_transformers_itself_saves_loads_as_well(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "plain")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), quantized)


@pytest.mark.parametrize("how", ["helper", "transformers"])
def test_shards(quantized, tmp_path, how):
    path = tmp_path / "sharded"
    if how == "helper":
        save_pretrained(quantized, path, max_shard_size="12KB")
        checkpoint.verify(path)
    else:
        quantized.save_pretrained(path, max_shard_size="12KB")
    shards = list(path.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(quantized.state_dict())
    assert same_state(AutoModelForCausalLM.from_pretrained(path), quantized)


def test_an_older_checkpoint_is_replaced_as_a_whole_or_not_at_all(quantized, saved, tmp_path):
    path = tmp_path / "model"
    save_pretrained(quantized, path, max_shard_size="12KB")
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    class Broken:
        def save_pretrained(self, directory):
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        save_pretrained(quantized, path, Broken())
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    save_pretrained(quantized, path)
    assert {p.name for p in path.iterdir()} == {p.name for p in saved.iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_inq_quantize_writes_what_from_pretrained_loads(dense, tmp_path):
    assert main(["quantize", str(dense), str(tmp_path / "out"), "--bits", "4"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(packed(model)) == {*LAYERS, "lm_head"}
    on_the_fly = AutoModelForCausalLM.from_pretrained(dense, quantization_config=InqConfig(FMT, skip=()))
    assert same_state(model, on_the_fly)
    assert torch.equal(logits(model), logits(on_the_fly))


def test_overrides_and_row_scales_survive(dense, tmp_path):
    config = InqConfig(FMT, overrides={"*.down_proj": inq.Format(5, "dense", "channel")})
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    module = model.get_submodule(LAYERS[0])
    scale = torch.linspace(0.5, 1.5, 64).view(64, 1)
    module._set_codes(module.weight.data, module.weight_exp.data, scale)
    save_pretrained(model, tmp_path / "scaled")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled", dtype=torch.float32)
    assert same_state(again, model)
    assert same_bits(again.get_submodule(LAYERS[0]).weight_scale.data, scale)
    assert not again.get_submodule(LAYERS[0]).weight_scale.requires_grad
    assert torch.equal(logits(again), logits(model))


def test_generate(quantized, saved):
    again = AutoModelForCausalLM.from_pretrained(saved)
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    tokens = again.generate(IDS, **options)
    assert tokens.shape == (2, 18)
    assert torch.equal(tokens, quantized.generate(IDS, **options))


def test_dequantize(dense, saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    before, weights = logits(model), {name: inq.unpack(m.packed) for name, m in packed(model).items()}
    model.dequantize()
    assert not packed(model)
    for name, w in weights.items():
        assert same_bits(model.get_submodule(name).weight.detach(), w)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert same_state(LlamaForCausalLM.from_pretrained(tmp_path / "dense"), model)


def test_dequantize_changes_nothing_if_one_weight_does_not_fit(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    last = model.get_submodule(LAYERS[-1])
    last._set_codes(last.weight.data, torch.full_like(last.weight_exp.data, -40), None)
    before = packed(model)
    with pytest.raises(ValueError, match=rf"dequantize: module '{LAYERS[-1]}': .*got torch.float16, which cannot hold"):
        model.dequantize(dtype=torch.float16)
    assert packed(model) == before


def test_a_base_model_loads_from_the_files_of_one_with_a_head(quantized, saved):
    base = LlamaModel.from_pretrained(saved)
    assert set(packed(base)) == {name.removeprefix("model.") for name in LAYERS}
    assert same_state(base, quantized.model)


def test_a_new_head_stays_float(saved):
    with pytest.warns(UserWarning, match=r"module 'score' is not in the files"):
        model = transformers.LlamaForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert len(packed(model)) == len(LAYERS)


# --- files that are not as they should be -----------------------------------------------------------------------------


def damaged(change):
    return lambda path: edit(path, change)


def set_byte(name, value):
    def change(tensors):
        tensors[name].view(torch.uint8).view(-1)[3] = value

    return damaged(change)


def drop(name):
    return damaged(lambda tensors: tensors.pop(name))


def put(name, tensor):
    return damaged(lambda tensors: tensors.update({name: tensor}))


W = f"{LAYERS[0]}.weight"
BAD = {
    # 4 bits, paper: code 1 has no flag.
    "codes": (set_byte(W, 0x11), r"q_proj'?/?.*expected canonical codes of 4-bit paper"),
    "exponents": (set_byte(f"{W}_exp", 0x80), r"expected exponents in \[-126, 127\], got \[-128"),
    "no exponents": (drop(f"{W}_exp"), r"expected packed codes for .*q_proj', .*got a float one"),
    "a float weight": (put(W, torch.zeros(64, 64)), r"expected packed codes for .*q_proj', .*got a float one"),
    "width": (put(W, torch.zeros(64, 40, dtype=torch.uint8)), r"expected torch.uint8 \[64, 32\] .*got .* \[64, 40\]"),
    "rows": (put(f"{W}_exp", torch.zeros(63, 1, dtype=torch.int8)), r"expected torch.int8 \[64, 1\] .*got .*\[63, 1\]"),
    "scale": (put(f"{W}_scale", torch.full((64, 1), float("inf"))), r"expected finite row scales"),
    "a packed embedding": (
        damaged(
            lambda t: t.update(
                {
                    "model.embed_tokens.weight": torch.zeros(96, 32, dtype=torch.uint8),
                    "model.embed_tokens.weight_exp": torch.zeros(96, 1, dtype=torch.int8),
                }
            )
        ),
        r"expected a module that can hold packed weights, got .*embed_tokens', Embedding",
    ),
    "ignored": (
        lambda path: edit_config(path, lambda c: c["ignore"].append(LAYERS[0])),
        r"expected a module that can hold packed weights, got .*q_proj', one that ignore names",
    ),
    "bits": (lambda path: edit_config(path, lambda c: c.update(bits=5)), r"expected torch.uint8 \[64, 40\]"),
    "version": (
        lambda path: edit_config(path, lambda c: c.update(format_version=3)),
        r"expected format version 2 at most, .* got 3: a newer inq_kernels is needed",
    ),
    "entropy-coded": (
        lambda path: edit_config(path, lambda c: c.update(format_version=2)),
        r"expected format version 1 at most, got 2, whose codes may be entropy-coded",
    ),
    "key": (lambda path: edit_config(path, lambda c: c.update(levels="even")), r"quantization_config: .*levels"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_clear_error(copied, case):
    change, message = BAD[case]
    change(copied)
    with pytest.raises((inq.CheckpointError, ValueError), match=message):
        AutoModelForCausalLM.from_pretrained(copied)


def test_no_pickle_and_no_bare_state_dict(quantized, copied):
    config = transformers.LlamaConfig.from_pretrained(copied)
    with pytest.raises(ValueError, match="expected the files of a packed model, got none"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=quantized.state_dict())
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(inq.CheckpointError, match="never opened"):
        LlamaForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("skip", [(), ("--skip", "*.gate")])
def test_packed_experts_are_refused(tmp_path, skip):
    """transformers puts the experts of a mixture into one tensor, for which packed ones are of another shape."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), *skip]) == 0
    with pytest.raises(inq.CheckpointError, match=r"experts\.0\.w1\.weight': expected float experts, .*--skip"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", ignore_mismatched_sizes=True)
    arguments = ("--skip", "*.gate", "*.experts.*")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "float"), *arguments]) == 0
    assert len(packed(AutoModelForCausalLM.from_pretrained(tmp_path / "float"))) == 5


def test_no_pickle_is_packed_either(dense, tmp_path):
    path = shutil.copytree(dense, tmp_path / "dense")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(inq.CheckpointError, match=r"pytorch_model\.bin: expected a \.safetensors file, .*never opened"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=InqConfig(FMT))


@pytest.mark.parametrize("way", ["index", "link"])
def test_nothing_outside_of_the_directory_is_read(copied, tmp_path, way):
    weights, outside = copied / "model.safetensors", tmp_path / "outside.safetensors"
    weights.rename(outside)
    if way == "link":
        weights.symlink_to(outside)
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(outside), "../outside.safetensors")}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(inq.CheckpointError, match="expected a file inside .*copy, got a link to .*outside"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_directory_of_the_hub_s_cache_has_its_files_elsewhere_in_it(copied, quantized, tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    copied.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert same_state(AutoModelForCausalLM.from_pretrained(snapshot), quantized)


class Payload:
    """Unpickling this makes a directory."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def asked_for():
    """What pickles ask for during a test. The audit hook stays for good, and does nothing afterwards."""
    found, active = [], [True]

    def audit(event, arguments):
        if active and event == "pickle.find_class":
            found.append(arguments)

    sys.addaudithook(audit)
    yield found
    active.clear()


def test_from_pretrained_unpickles_nothing(dense, saved, tmp_path, asked_for):
    """Packed files, and float ones that are packed as they are read; and directories with a pickle alone."""
    marker = tmp_path / "unpickled"
    for source, arguments in ((saved, {}), (dense, {"quantization_config": InqConfig(FMT)})):
        AutoModelForCausalLM.from_pretrained(source, **arguments)
        path = shutil.copytree(source, tmp_path / source.name)
        (path / "model.safetensors").unlink()
        torch.save(Payload(marker), path / "pytorch_model.bin")
        with pytest.raises(Exception, match="never opened|weights_only"):
            AutoModelForCausalLM.from_pretrained(path, **arguments)
    assert not asked_for
    assert not marker.exists()
    # Else the silence would say nothing.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert asked_for
    assert marker.exists()


def test_saving_refuses_what_it_would_do_wrong(quantized, dense, tmp_path):
    with pytest.raises(ValueError, match="expected a model with packed modules, got none"):
        save_pretrained(tiny.model(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"got \['variant'\]"):
        save_pretrained(quantized, tmp_path / "x", variant="fp16")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    with pytest.raises(inq.CheckpointError, match="older checkpoint to replace"):
        save_pretrained(quantized, other)
    assert not (tmp_path / "x").exists()


def test_files_say_what_they_are(saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata()["inq_format_version"] == "1"
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["producer"] == {"name": "inq_kernels", "version": inq.__version__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(inq.load(saved)) == sorted(k for k in load_file(saved / "model.safetensors") if "_exp" not in k)
