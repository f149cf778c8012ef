"""Imports of weights that are powers of two already: bit for bit or not at all, from floats, MXFP4 and FP8."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DTYPES, FORMATS, random_packed, same_bits
from support_exports import LINEAR, change_settings, settings, write_packed
from test_cli import fails, succeeds

import inq_kernels as inq
from inq_kernels import transcode
from inq_kernels.integrations import exports, imports, mxfp4

FMT = inq.Format(4)
EXPORTS = {"mxfp4": exports.export_mxfp4, "fp8": exports.export_fp8, "dense": transcode.export_dense}


def same_weight(a, b):
    return (a.format, a.shape) == (b.format, b.shape) and all(
        same_bits(getattr(a, part), getattr(b, part)) for part in ("weight", "weight_exp")
    )


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("fmt", "to"), [(f, to) for f in FORMATS for to in EXPORTS if to != "mxfp4" or f.magnitudes <= 4]
)
def test_what_was_exported_comes_back_bit_for_bit(tmp_path, fmt, granularity, to):
    fmt = inq.Format(fmt.bits, fmt.levels, granularity)
    source = write_packed(tmp_path, fmt)
    EXPORTS[to](source, tmp_path / "out")
    report = imports.import_packed(
        tmp_path / "out", tmp_path / "back", bits=fmt.bits, levels=fmt.levels, granularity=granularity
    )
    before, after = inq.load(source), inq.load(tmp_path / "back")
    assert sorted(row.name for row in report.packed) == sorted(LINEAR)
    assert set(before) == set(after)
    for name, value in before.items():
        assert same_weight(after[name], value) if name in LINEAR else same_bits(after[name], value), name
    # Configuration and all: the same directory.
    assert settings(tmp_path / "back") == settings(source)
    assert sorted(os.listdir(tmp_path / "back")) == sorted(os.listdir(source))


@pytest.mark.parametrize("to", EXPORTS)
def test_the_smallest_format_that_holds_all_is_found(tmp_path, to):
    source = write_packed(tmp_path, FMT)
    EXPORTS[to](source, tmp_path / "out")
    report = imports.import_packed(tmp_path / "out", tmp_path / "back")
    assert report.format == FMT
    assert report.kind == {"mxfp4": "mxfp4-pack-quantized", "fp8": "float-quantized", "dense": "float"}[to]
    floats = {row.name: row.reason for row in report.rows if row.format is None}
    assert set(floats) == {"model.embed_tokens.weight"}
    assert "skipped by" in floats["model.embed_tokens.weight"]
    before, after = inq.load(source), inq.load(tmp_path / "back")
    assert all(same_weight(after[name], before[name]) for name in LINEAR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", EXPORTS)
def test_every_dtype_comes_back(tmp_path, to, dtype):
    source = write_packed(tmp_path, FMT, dtype)
    EXPORTS[to](source, tmp_path / "out")
    imports.import_packed(tmp_path / "out", tmp_path / "back")
    transcode.export_dense(source, tmp_path / "one")
    transcode.export_dense(tmp_path / "back", tmp_path / "other")
    for shard in (name for name in os.listdir(tmp_path / "one") if name.endswith(".safetensors")):
        one, other = load_file(tmp_path / "one" / shard), load_file(tmp_path / "other" / shard)
        assert all(same_bits(one[name], other[name]) for name in one | other)


def test_a_retrained_network_in_floats_comes_back(tmp_path):
    """A file of floats, convolutions too, packed again and loaded into the model's modules."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 40))
    fmt = inq.Format(5)
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.weight.copy_(inq.quantize(module.weight, fmt))
    save_file(model.state_dict(), tmp_path / "floats.safetensors")
    report = imports.import_packed(tmp_path / "floats.safetensors", tmp_path / "packed.safetensors")
    assert report.format == fmt
    fresh = inq.load(tmp_path / "packed.safetensors", torch.nn.Sequential(*map(_like, model)))
    assert isinstance(fresh[2], inq.Linear)
    for name in ("0.weight", "2.weight"):
        packed = fresh[int(name[0])].packed
        assert same_bits(inq.unpack(packed), model.state_dict()[name])


def _like(module):
    if isinstance(module, torch.nn.Conv2d):
        return torch.nn.Conv2d(3, 8, 3)
    return torch.nn.Linear(8, 40) if isinstance(module, torch.nn.Linear) else module


# --- what a weight needs ----------------------------------------------------------------------------------------------


def imported(tmp_path, tensors, **options):
    save_file(tensors, tmp_path / "floats.safetensors")
    report = imports.import_packed(tmp_path / "floats.safetensors", tmp_path / "packed.safetensors", **options)
    return report, inq.load(tmp_path / "packed.safetensors")


def powers(*exponents):
    return torch.exp2(torch.tensor(exponents, dtype=torch.float32))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 0], [0, 0]], inq.Format(2)),
        ([[0, 0], [-9, -9]], inq.Format(2, granularity="channel")),
        ([[0, -1], [0, 0]], inq.Format(3)),
        ([[0, -1], [-2, 0]], inq.Format(3, "dense")),
        ([[0, -3], [-2, 0]], inq.Format(4)),
        ([[0, -3], [-9, -6]], inq.Format(4, granularity="channel")),
        ([[0, -6], [-2, 0]], inq.Format(4, "dense")),
        ([[0, -7], [-2, 0]], inq.Format(5)),
        ([[0, -14], [-2, 0]], inq.Format(5, "dense")),
        ([[0, -14], [-20, -20]], inq.Format(5, "dense", "channel")),
        ([[127, 127], [-126, -126]], inq.Format(2, granularity="channel")),
    ],
)
def test_the_smallest_format(tmp_path, rows, expected):
    w = torch.stack([powers(*row) for row in rows])
    w[0, 1] *= -1
    report, entries = imported(tmp_path, {"a.weight": w})
    assert report.format == expected
    assert same_bits(inq.unpack(entries["a.weight"]), w)


def test_what_does_not_fit_stays_float_and_says_why(tmp_path):
    good, tiny = powers(*[0, -1, -2, -3] * 2).view(2, 4), torch.tensor([[2.0**-127, 1.0]])
    tensors = {
        "good.weight": good, "rounded.weight": good * torch.tensor([1, 1, 1.5, 1]),
        "wide.weight": powers(0, -15).view(1, 2),
        "tiny.weight": tiny, "zeros.weight": torch.zeros(3, 4),
        "skipped.weight": good.clone(), "emb.weight": good.clone(),
        "norm.weight": torch.ones(4), "cube.weight": torch.ones(2, 2, 2), "steps": torch.tensor(3),
    }  # fmt: skip
    report, entries = imported(tmp_path, tensors, skip="skipped")
    assert report.format == FMT
    assert {row.name for row in report.packed} == {"good.weight", "zeros.weight"}
    reasons = {row.name: row.reason for row in report.rows if row.format is None}
    assert reasons == {
        "rounded.weight": "2 of 8 values are neither 0 nor a power of two",
        "wide.weight": "a row has powers of two 15 octaves apart, more than any format holds",
        "tiny.weight": "it has exponents -127 to 0, outside [-126, 127]",
        "skipped.weight": "skipped by 'skipped'",
        "emb.weight": "skipped by '*emb'",
        "cube.weight": "rank 3",
    }
    for name in (*reasons, "norm.weight", "steps"):
        assert same_bits(entries[name], tensors[name])
    for name in ("good.weight", "zeros.weight"):
        assert same_bits(inq.unpack(entries[name]), tensors[name])


def test_given_fields_narrow_the_choice(tmp_path):
    two, eight = powers(0, -1).view(1, 2), powers(0, -7).view(1, 2)
    for options, expected in (
        ({"bits": 5}, inq.Format(5)),
        ({"levels": "dense"}, inq.Format(5, "dense")),
        ({"granularity": "channel"}, inq.Format(5, granularity="channel")),
        ({"bits": 5, "levels": "dense", "granularity": "channel"}, inq.Format(5, "dense", "channel")),
    ):
        report, _ = imported(tmp_path, {"a.weight": two, "b.weight": eight}, **options)
        assert (report.format, len(report.packed)) == (expected, 2)
    report, entries = imported(tmp_path, {"a.weight": two, "b.weight": eight}, bits=3)
    assert [row.name for row in report.packed] == ["a.weight"]
    (row,) = (row for row in report.rows if row.format is None)
    assert row.reason == f"needs 8 magnitudes, {inq.Format(3)} has 2"
    assert same_bits(entries["b.weight"], eight)
    report, _ = imported(tmp_path, {"a.weight": two, "b.weight": eight}, only="b")
    assert [row.name for row in report.packed] == ["b.weight"]


def test_negative_zeros_are_counted(tmp_path, capsys):
    w = torch.tensor([[1.0, -0.0, 0.0, -0.0]])
    report, entries = imported(tmp_path, {"a.weight": w})
    assert report.packed[0].negative_zeros == 2
    assert same_bits(inq.unpack(entries["a.weight"]), torch.tensor([[1.0, 0, 0, 0]]))
    out = succeeds(capsys, "import", tmp_path / "floats.safetensors", tmp_path / "again.safetensors")
    assert "2 negative zeros became +0." in out


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"a.weight": torch.tensor([[1.5, 1.0]])}, {}, "a weight of powers of two, got none (a.weight: 1 of 2"),
        ({"a.bias": torch.ones(2)}, {}, "got none (a.bias: no .weight)"),
        ({"a.weight": powers(0, -7).view(1, 2)}, {"bits": 2}, "expected a weight that 2-bit paper"),
        ({"a.weight": torch.tensor([[torch.nan, 1.0]])}, {}, "weight 'a.weight': expected finite values, got 1 NaN"),
        ({"a.weight": torch.ones(1, 2)}, {"skip": "b"}, "skip: expected a pattern that matches a module, got 'b'"),
        ({"a.weight": torch.ones(1, 2)}, {"only": ["c"]}, "only: expected a pattern that matches a module, got 'c'"),
        ({"a.weight": torch.ones(1, 2), "a.weight_exp": torch.ones(1)}, {}, "'a.weight_exp': expected that name"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(tmp_path, tensors, options, message):
    save_file(tensors, tmp_path / "floats.safetensors")
    for target in ("packed.safetensors", "packed"):
        with pytest.raises(ValueError) as caught:
            imports.import_packed(tmp_path / "floats.safetensors", tmp_path / target, **options)
        assert message in str(caught.value)
        assert os.listdir(tmp_path) == ["floats.safetensors"]


def test_packed_sources_and_overlaps_are_refused(tmp_path, capsys):
    source = write_packed(tmp_path, FMT)
    assert "got an inq file: it is packed already" in fails(capsys, "import", source, tmp_path / "out")
    EXPORTS["mxfp4"](source, tmp_path / "out")
    assert "expected an output outside of the source" in fails(capsys, "import", tmp_path / "out", tmp_path / "out")
    message = fails(capsys, "import", tmp_path / "out", tmp_path / "one.safetensors")
    assert "expected a directory for 2 files" in message


# --- compressed-tensors -----------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """A function from "mxfp4" or "fp8" to an export with a single file, easy to damage."""

    def make(to):
        inq.save({"fc.weight": random_packed(FMT, 4, 64, n1=0), "fc.bias": torch.ones(4)}, tmp_path / "m.safetensors")
        EXPORTS[to](tmp_path / "m.safetensors", tmp_path / "out")
        return tmp_path / "out"

    return make


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_other_tools_weights_stay_float_exactly(tmp_path, exported):
    """MXFP4 has 1.5, 3 and 6, too: then all of the weight becomes floats of the model's dtype."""
    out = exported("mxfp4")
    inq.save({"other.weight": random_packed(FMT, 4, 64)}, tmp_path / "n.safetensors")

    def add(tensors):
        codes, scales = mxfp4.encode(random_packed(FMT, 4, 64), torch.float32)
        codes[0, 0] = 3 | 7 << 4
        tensors |= {"other.weight_packed": codes, "other.weight_scale": scales}

    change_tensors(out, add)
    tensors = load_file(out / "model.safetensors")
    exact = mxfp4.decode(tensors["other.weight_packed"], tensors["other.weight_scale"])
    for dtype in (None, "float32", "float16"):
        change_settings(out, lambda content, dtype=dtype: content.update({"dtype": dtype}))
        report = imports.import_packed(out, tmp_path / "back")
        assert [(row.name, row.reason) for row in report.rows if row.format is None] == [
            ("other.weight", "2 of 256 values are neither 0 nor a power of two")
        ]
        other = inq.load(tmp_path / "back")["other.weight"]
        assert other.dtype == getattr(torch, dtype or "bfloat16")
        assert torch.equal(other.double(), exact)

    def grow(tensors):
        tensors["other.weight_scale"].fill_(200)

    change_tensors(out, grow)
    with pytest.raises(ValueError, match=r"weight 'other.weight': expected values that torch.float16 holds, got \d+"):
        imports.import_packed(out, tmp_path / "back")


@pytest.mark.parametrize(
    ("strategy", "scales"), [("tensor", ()), ("tensor", (1,)), ("channel", (4,)), ("group", (4, 2))]
)
def test_other_scales_of_fp8(tmp_path, exported, strategy, scales):
    out = exported("fp8")
    size = 32 if strategy == "group" else None
    change_settings(
        out,
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
            {"strategy": strategy, "group_size": size}
        ),
    )

    def change(tensors):
        tensors["fc.weight_scale"] = torch.full(scales, 0.25, dtype=torch.bfloat16)
        if strategy == "group":
            tensors["fc.weight_scale"][1, 1] = 0.5

    change_tensors(out, change)
    tensors = load_file(out / "model.safetensors")
    factors = tensors["fc.weight_scale"].double()
    factors = factors.repeat_interleave(32, dim=1) if strategy == "group" else factors.reshape(-1, 1)
    exact = tensors["fc.weight"].double() * factors
    imports.import_packed(out, tmp_path / "back")
    assert torch.equal(inq.unpack(inq.load(tmp_path / "back")["fc.weight"], torch.float64), exact)


def _group(content):
    return content["quantization_config"]["config_groups"]["group_0"]


FP8_GROUP = {
    "format": "float-quantized",
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
}
CONFIGURATIONS = [
    (lambda c: c.update(quantization_config=[1]), "quantization_config: expected an object, got list"),
    (lambda c: c["quantization_config"].update(quant_method="awq"), "quant_method: expected 'compressed-tensors'"),
    (lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: expected none"),
    (lambda c: c["quantization_config"].update(sparsity_config={"format": "x"}), "sparsity_config: expected none"),
    (lambda c: c["quantization_config"].update(config_groups={}), "config_groups: expected an object of objects"),
    (lambda c: c["quantization_config"].update(config_groups={"a": 1}), "config_groups: expected an object of objects"),
    (lambda c: _group(c).update(format="nvfp4-pack-quantized"), "format: expected one of mxfp4-pack-quantized, "),
    (lambda c: _group(c).update(format=["x"]), "format: expected one of"),
    (lambda c: _group(c).update(input_activations={"num_bits": 8}), "input_activations: expected none"),
    (lambda c: _group(c).update(weights=None), "weights: expected an object, got None"),
    (lambda c: _group(c)["weights"].update(num_bits=True), "weights: num_bits: expected 4, got True"),
    (lambda c: _group(c)["weights"].update(num_bits=8.0), "weights: num_bits: expected 4, got 8.0"),
    (lambda c: _group(c)["weights"].update(type="int"), "weights: type: expected 'float', got 'int'"),
    (lambda c: _group(c)["weights"].update(symmetric=False), "weights: symmetric: expected True, got False"),
    (lambda c: _group(c)["weights"].update(dynamic=True), "weights: dynamic: expected False, got True"),
    (lambda c: _group(c)["weights"].update(actorder="group"), "weights: actorder: expected none, got 'group'"),
    (lambda c: _group(c)["weights"].update(group_size=16), "expected groups of 32, got strategy 'group' of 16"),
    (lambda c: _group(c)["weights"].update(group_size=True), "weights: expected groups of 32"),
    (
        lambda c: c["quantization_config"]["config_groups"].update(b=FP8_GROUP),
        "config_groups: expected one scheme for all, got 2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CONFIGURATIONS, ids=[message[:40] for _, message in CONFIGURATIONS])
def test_other_configurations_are_refused(tmp_path, exported, change, message):
    out = exported("mxfp4")
    change_settings(out, change)
    with pytest.raises(inq.CheckpointError) as caught:
        imports.import_packed(out, tmp_path / "back")
    assert message in str(caught.value)
    assert not (tmp_path / "back").exists()


FP8_CONFIGURATIONS = [
    (lambda c: _group(c)["weights"].update(strategy="block"), "strategy: expected 'tensor', 'channel' or 'group'"),
    (lambda c: _group(c)["weights"].update(strategy=["channel"]), "strategy: expected 'tensor', 'channel' or 'group'"),
    (lambda c: _group(c)["weights"].update(strategy="group"), "group_size: expected an int ≥ 1, got None"),
    (lambda c: _group(c)["weights"].update(strategy="group", group_size=24), "or F64 groups of 24"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FP8_CONFIGURATIONS)
def test_other_configurations_of_fp8_are_refused(tmp_path, exported, change, message):
    out = exported("fp8")
    change_settings(out, change)
    with pytest.raises(inq.CheckpointError) as caught:
        imports.import_packed(out, tmp_path / "back")
    assert message in str(caught.value)


def _replace(name, make):
    def change(tensors):
        tensors[name] = make(tensors[name])

    return change


U8, BIG = torch.uint8, torch.zeros(4, 2, dtype=torch.uint8)
DAMAGE = [
    ("mxfp4", lambda t: t.pop("fc.weight_scale"), "'fc.weight_packed': expected its scales"),
    ("mxfp4", lambda t: t.pop("fc.weight_packed"), "expected weights in mxfp4-pack-quantized, got none"),
    ("mxfp4", lambda t: t.update({"fc.weight": torch.ones(4, 64)}), "expected no 'fc.weight' beside it"),
    ("mxfp4", _replace("fc.weight_scale", lambda s: s.float()), "'fc.weight_scale': expected U8 [4, 2]"),
    ("mxfp4", _replace("fc.weight_scale", lambda s: s[:, :1].contiguous()), "'fc.weight_scale': expected U8 [4, 2]"),
    ("mxfp4", _replace("fc.weight_packed", lambda w: w[:, :30].contiguous()), "expected U8 groups of 32"),
    ("mxfp4", _replace("fc.weight_packed", lambda w: w[None].clone()), "'fc.weight_packed': expected rank 2 and no 0"),
    ("mxfp4", _replace("fc.weight_packed", lambda w: w[:0].clone()), "'fc.weight_packed': expected rank 2 and no 0"),
    ("mxfp4", _replace("fc.weight_scale", lambda s: torch.full_like(s, 255)), "expected scales that are numbers"),
    ("mxfp4", lambda t: t.update({"fc.weight_zero_point": BIG}), "alone, got 'fc.weight_zero_point'"),
    ("mxfp4", lambda t: t.update({"b.weight_scale": BIG}), "alone, got 'b.weight_scale'"),
    ("fp8", lambda t: t.pop("fc.weight_scale"), "'fc.weight': expected its scales 'fc.weight_scale', got none"),
    ("fp8", _replace("fc.weight_scale", lambda s: s.int()), "expected F32 or BF16 or F16 or F64 [4, 1]"),
    ("fp8", _replace("fc.weight_scale", lambda s: s[:3].clone()), "'fc.weight_scale': expected F32"),
    ("fp8", _replace("fc.weight_scale", lambda s: s / 0), "'fc.weight': expected scales that are finite, got 4 of 4"),
    ("fp8", _replace("fc.weight", lambda w: w.view(U8).fill_(127).view(w.dtype)), "values that are finite, got 256"),
    ("fp8", lambda t: t.update({"fc.input_scale": torch.ones(1)}), "alone, got 'fc.input_scale'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("to", "change", "message"), DAMAGE, ids=[f"{to} {message[-40:]}" for to, _, message in DAMAGE]
)
def test_damaged_weights_are_refused(tmp_path, exported, to, change, message):
    out = exported(to)
    change_tensors(out, change)
    with pytest.raises(inq.CheckpointError) as caught:
        imports.import_packed(out, tmp_path / "back")
    assert message in str(caught.value)
    assert not (tmp_path / "back").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(tmp_path, capsys):
    source = write_packed(tmp_path, FMT)
    succeeds(capsys, "export", "--to", "fp8", source, tmp_path / "fp8")
    out = succeeds(capsys, "import", tmp_path / "fp8", tmp_path / "back")
    assert "model.embed_tokens.weight  skipped by '*[Ee]mbed*'" in out
    assert f"4 of 5 weights packed, bit-exact, {FMT}" in out
    assert succeeds(capsys, "verify", tmp_path / "back")
    out = succeeds(capsys, "import", tmp_path / "fp8", tmp_path / "five", "--bits", 5, "--levels", "dense")
    assert "4 of 5 weights packed, bit-exact, 5-bit dense" in out
    assert json.loads((tmp_path / "five" / "config.json").read_text())["quantization_config"]["bits"] == 5
