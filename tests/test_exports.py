"""Exports to MXFP4 and FP8: exact for every format that fits, refused with the reason for all else."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import DTYPES, FORMATS, random_packed, same_bits
from support_exports import LINEAR, SHARDS, H, change_settings, settings, write_llama, write_packed
from test_cli import fails, succeeds

import inq_kernels as inq
from inq_kernels.integrations import exports, fp8, mxfp4

FMT = inq.Format(4)
FIT_MXFP4 = [fmt for fmt in FORMATS if fmt.magnitudes <= 4]
EXPORTS = {"mxfp4": exports.export_mxfp4, "fp8": exports.export_fp8}


def e2m1(codes, scales):
    """MXFP4 by the words of its specification: sign, two exponent bits of bias 1, one mantissa bit; 2^(byte − 127)."""
    nibbles = torch.stack((codes % 16, codes // 16), dim=2).flatten(1).tolist()
    rows = []
    for row, row_scales in zip(nibbles, scales.tolist(), strict=True):
        values = []
        for k, code in enumerate(row):
            sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
            magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            values.append((-magnitude if sign else magnitude) * 2.0 ** (row_scales[k // 32] - 127))
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def tensors_of(directory):
    found = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(".safetensors"):
            found |= load_file(directory / name)
    return found


def decoded(tensors, name, to):
    """The weight ``name`` of an export, by torch's own types and the specification's words."""
    stem = name.removesuffix("weight")
    if to == "mxfp4":
        return e2m1(tensors[f"{stem}weight_packed"], tensors[f"{stem}weight_scale"])
    return tensors[name].double() * tensors[f"{stem}weight_scale"].double()


# --- codecs -----------------------------------------------------------------------------------------------------------

N1S = [[-126, -125, -124, -123, -122], [-1, 0, 1, 2, 3], [123, 124, 125, 126, 127]]


@pytest.mark.parametrize("fmt", FIT_MXFP4, ids=str)
@pytest.mark.parametrize("n1", N1S)
def test_mxfp4_is_exact_at_every_exponent(fmt, n1):
    packed = random_packed(fmt, 5, 64, n1=torch.tensor(n1).view(5, 1))
    codes, scales = mxfp4.encode(packed, torch.bfloat16)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.uint8, (5, 32), torch.uint8, (5, 2))
    # No subnormal scale, no NaN.
    assert int(scales.min()) >= 1
    assert int(scales.max()) < 255
    exact = inq.unpack(packed, torch.float64)
    assert torch.equal(e2m1(codes, scales), exact)
    assert torch.equal(mxfp4.decode(codes, scales), exact)
    # What loaders do: both factors in bfloat16.
    values, factors = mxfp4.decode(codes, torch.full_like(scales, 127)), scales.double().sub(127).exp2()
    assert same_bits(values.bfloat16() * factors.bfloat16().repeat_interleave(32, dim=1), exact.bfloat16())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("n1", N1S)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_exact_at_every_exponent(fmt, n1, dtype):
    packed = random_packed(fmt, 5, 40, n1=torch.tensor(n1).view(5, 1))
    values, scales = fp8.encode(packed, dtype)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (torch.float8_e4m3fn, (5, 40), dtype, (5, 1))
    exact = inq.unpack(packed, torch.float64)
    assert torch.equal(values.double() * scales.double(), exact)
    assert torch.equal(fp8.decode(values, scales), exact)
    assert same_bits(values.to(dtype) * scales, exact.to(dtype))


@pytest.mark.parametrize("codec", [mxfp4, fp8], ids=["mxfp4", "fp8"])
@pytest.mark.parametrize("n1", [-24, -23, -22, -21, -14, -1, 15])
def test_float16_has_every_scale_and_value(codec, n1):
    """Down to the least subnormal; a row of zeros with an exponent of no float16 changes nothing."""
    fmt = inq.Format(3)
    packed = random_packed(fmt, 3, 64, n1=n1)
    w = inq.unpack(packed, torch.float64)
    w[w.abs() < 2.0**-24] = 0
    w[1] = 0
    packed = inq.pack(w, fmt, torch.tensor([[n1], [-100], [n1]], dtype=torch.int8))
    values, scales = codec.encode(packed, torch.float16)
    factors = scales.double() if codec is fp8 else scales.double().sub(127).exp2()
    assert torch.equal(factors.half().double(), factors)
    assert torch.equal(codec.decode(values, scales), w)


def test_a_decoder_takes_no_nan():
    codes, scales = mxfp4.encode(random_packed(FMT, 2, 32), torch.float32)
    scales[1, 0] = 255
    with pytest.raises(ValueError, match=r"expected scales that are numbers, got 1 NaN \(255\) of 2"):
        mxfp4.decode(codes, scales)
    values, scales = fp8.encode(random_packed(FMT, 2, 32), torch.float32)
    with pytest.raises(ValueError, match="expected scales that are finite, got 2 of 2"):
        fp8.decode(values, scales / 0)
    values[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected values that are finite, got 1 of 64"):
        fp8.decode(values, scales)


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", EXPORTS)
@pytest.mark.parametrize("tied", [True, False])
def test_export_of_a_transformers_directory(tmp_path, to, tied):
    source = write_packed(tmp_path, FMT, tied=tied)
    report = EXPORTS[to](source, tmp_path / "out")
    assert sorted(report.quantized) == sorted(LINEAR)
    assert report.bits_a_weight == pytest.approx(4.25 if to == "mxfp4" else 8 + 16 * 4 * H / (2 * H * H + 4 * H * H))
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(source))
    before, after = inq.load(source), tensors_of(tmp_path / "out")
    for name, value in before.items():
        if name in LINEAR:
            exact = inq.unpack(value, torch.float64)
            assert torch.equal(decoded(after, name, to), exact), name
            assert ("weight_packed" in "".join(after)) == (to == "mxfp4")
        else:
            assert same_bits(after[name], value), name
    assert set(after) == {
        *(name for name in before if name not in LINEAR),
        *(f"{name}_scale" for name in LINEAR),
        *(f"{name}_packed" if to == "mxfp4" else name for name in LINEAR),
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    for shard in SHARDS:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {name for name, of in index["weight_map"].items() if of == shard} == set(file.keys())

    content = settings(tmp_path / "out")
    assert {**content, "quantization_config": None} == {**settings(tmp_path / "float"), "quantization_config": None}
    quantization = content["quantization_config"]
    assert (quantization["quant_method"], quantization["quantization_status"]) == ("compressed-tensors", "compressed")
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    expected = {"mxfp4": ("mxfp4-pack-quantized", 4, "group"), "fp8": ("float-quantized", 8, "channel")}[to]
    weights = group["weights"]
    assert (quantization["format"], weights["num_bits"], weights["strategy"]) == expected
    assert weights.get("group_size") == (32 if to == "mxfp4" else None)
    # Also where no tensor tells of a tied output layer.
    assert {"lm_head", "model.embed_tokens"} <= set(quantization["ignore"])
    assert not {name.removesuffix(".weight") for name in LINEAR} & set(quantization["ignore"])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fp8_takes_every_format_and_mxfp4_those_of_four_magnitudes(tmp_path, fmt, granularity):
    fmt = inq.Format(fmt.bits, fmt.levels, granularity)
    source = write_packed(tmp_path, fmt)
    before = inq.load(source)
    exports.export_fp8(source, tmp_path / "fp8")
    after = tensors_of(tmp_path / "fp8")
    for name in LINEAR:
        assert torch.equal(decoded(after, name, "fp8"), inq.unpack(before[name], torch.float64))
    if fmt.magnitudes > 4:
        with pytest.raises(ValueError, match=f"{fmt.bits}-bit {fmt.levels} levels have {fmt.magnitudes} magnitudes"):
            exports.export_mxfp4(source, tmp_path / "mxfp4")
        assert not (tmp_path / "mxfp4").exists()
        return
    exports.export_mxfp4(source, tmp_path / "mxfp4")
    after = tensors_of(tmp_path / "mxfp4")
    for name in LINEAR:
        assert torch.equal(decoded(after, name, "mxfp4"), inq.unpack(before[name], torch.float64))


@pytest.mark.parametrize("to", EXPORTS)
def test_an_inq_file_becomes_a_directory_and_convolutions_stay_float(tmp_path, to):
    entries = {
        "fc.weight": random_packed(FMT, 6, 64), "conv.weight": random_packed(FMT, 4, 2, 3, 3),
        "fc.bias": torch.ones(6), "other.weight": torch.rand(3, 4), "steps": torch.tensor(3),
    }  # fmt: skip
    inq.save(entries, tmp_path / "m.safetensors")
    report = EXPORTS[to](tmp_path / "m.safetensors", tmp_path / "out")
    assert list(report.quantized) == ["fc.weight"]
    assert [name for name, _ in report.as_float] == ["conv.weight"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    after = tensors_of(tmp_path / "out")
    assert torch.equal(decoded(after, "fc.weight", to), inq.unpack(entries["fc.weight"], torch.float64))
    assert same_bits(after["conv.weight"], inq.unpack(entries["conv.weight"]))
    assert same_bits(after["other.weight"], entries["other.weight"])
    assert set(settings(tmp_path / "out")) == {"quantization_config"}
    assert "other" in settings(tmp_path / "out")["quantization_config"]["ignore"]
    # An older export is replaced, in one step.
    EXPORTS["fp8"](tmp_path / "m.safetensors", tmp_path / "out")
    assert after.keys() != tensors_of(tmp_path / "out").keys() or to == "fp8"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", EXPORTS)
def test_every_dtype(tmp_path, to, dtype):
    source = write_packed(tmp_path, FMT, dtype)
    EXPORTS[to](source, tmp_path / "out")
    after, before = tensors_of(tmp_path / "out"), inq.load(source)
    for name in LINEAR:
        assert torch.equal(decoded(after, name, to).to(dtype), inq.unpack(before[name], dtype))
        if to == "fp8":
            assert after[f"{name}_scale"].dtype == dtype


def test_row_scales_are_exact_in_fp8_where_the_dtype_holds_them(tmp_path):
    packed = random_packed(inq.Format(5), 6, 48, scale=True)
    packed.weight_scale.abs_()
    inq.save({"fc.weight": packed}, tmp_path / "m.safetensors")
    exports.export_fp8(tmp_path / "m.safetensors", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after["fc.weight_scale"].dtype == torch.float32
    assert same_bits(after["fc.weight"].float() * after["fc.weight_scale"], inq.unpack(packed))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(tmp_path, capsys, source, to, target="out"):
    """The message; and nothing was written."""
    before = sorted(os.listdir(tmp_path))
    message = fails(capsys, "export", "--to", to, source, tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == before
    return message


def saved(tmp_path, **weights):
    inq.save({f"{name}.weight": packed for name, packed in weights.items()}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_mxfp4_refuses_what_it_cannot_hold(tmp_path, capsys):
    fits = random_packed(FMT, 4, 64)
    for other, reason in (
        (random_packed(inq.Format(5), 4, 64), "5-bit paper levels have 8 magnitudes"),
        (random_packed(inq.Format(4, "dense"), 4, 64), "4-bit dense levels have 7 magnitudes"),
        (random_packed(FMT, 4, 64, scale=True), "it has row scales (weight_scale)"),
        (random_packed(FMT, 4, 40), "its rows of 40 weights are no multiple of MXFP4's groups of 32"),
    ):
        message = refused(tmp_path, capsys, saved(tmp_path, a=fits, b=other), "mxfp4")
        assert "tensor 'b.weight': expected a weight that mxfp4-pack-quantized holds exactly" in message
        assert reason in message


def test_fp8_refuses_row_scales_that_would_be_lost(tmp_path, capsys):
    packed = random_packed(FMT, 4, 64, scale=True)
    source = saved(tmp_path, a=packed)
    assert "tensor 'a.weight': expected row scales above 0, got 1 of 4" in refused(tmp_path, capsys, source, "fp8")
    packed.weight_scale.abs_()
    inq.save({"a.weight": packed}, tmp_path / "q")
    quantization = json.loads((tmp_path / "q" / "inq.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": quantization}))
    message = refused(tmp_path, capsys, tmp_path / "q", "fp8")
    assert "tensor 'a.weight': expected values that torch.bfloat16 holds, got " in message
    assert "and row scales)" in message


@pytest.mark.parametrize("to", EXPORTS)
@pytest.mark.parametrize("n1", [-30, 20])
def test_values_that_the_model_s_dtype_lacks_are_refused(tmp_path, capsys, to, n1):
    inq.save({"a.weight": random_packed(FMT, 4, 64, n1=n1)}, tmp_path / "q")
    quantization = json.loads((tmp_path / "q" / "inq.json").read_text())
    for content in ({"torch_dtype": "float16"}, {"text_config": {"dtype": "float16"}}):
        (tmp_path / "q" / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))
        message = refused(tmp_path, capsys, tmp_path / "q", to)
        assert "tensor 'a.weight': expected values that torch.float16 holds, got " in message
        assert f"(exponents {n1} to {n1})" in message
    (tmp_path / "q" / "config.json").write_text(json.dumps({"dtype": 7, "quantization_config": quantization}))
    EXPORTS[to](tmp_path / "q", tmp_path / "out")


@pytest.mark.parametrize("to", EXPORTS)
def test_other_refusals(tmp_path, capsys, to):
    source = saved(tmp_path, a=random_packed(FMT, 4, 64))
    message = refused(tmp_path, capsys, source, to, "out.safetensors")
    assert "expected the name of a directory, for config.json" in message
    message = refused(tmp_path, capsys, source, to, "m.safetensors/x")
    assert "expected an output outside of the source" in message
    inq.save({"c.weight": random_packed(FMT, 4, 2, 3, 3)}, source)
    assert "expected a packed weight of rank 2" in refused(tmp_path, capsys, source, to)
    if to == "mxfp4":
        inq.save({"a.weight": random_packed(FMT, 4, 64), "a.weight_packed": torch.ones(3)}, source)
        message = refused(tmp_path, capsys, source, to)
        assert "tensor 'a.weight_packed': expected that name to be free" in message
    write_llama(tmp_path / "float")
    assert "expected" in refused(tmp_path, capsys, tmp_path / "float", to)
    (tmp_path / "sub").mkdir()
    source = write_packed(tmp_path / "sub", FMT)
    with (source / SHARDS[1]).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert "expected sha256" in refused(tmp_path, capsys, source, to)


def test_a_codec_s_mistake_would_be_noticed(tmp_path, monkeypatch):
    source = saved(tmp_path, a=random_packed(FMT, 4, 64))
    right = mxfp4.encode

    def wrong(packed, dtype):
        codes, scales = right(packed, dtype)
        codes[0, 0] ^= 8
        codes[0, 1] ^= 1
        return codes, scales

    monkeypatch.setattr(mxfp4, "encode", wrong)
    with pytest.raises(ValueError, match="tensor 'a.weight': expected values that mxfp4-pack-quantized holds exactly"):
        exports.export_mxfp4(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.safetensors"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(tmp_path, capsys):
    source = write_packed(tmp_path, FMT, conv=True)
    out = succeeds(capsys, "export", "--to", "mxfp4", source, tmp_path / "out")
    assert "vision.patch.weight: written as floats: rank 4" in out
    assert "4 weights in mxfp4, 4.25 bits a weight, bit-exact" in out
    assert "CompressedTensorsConfig" not in out
    inq.save({"a.weight": random_packed(FMT, 4, 64)}, tmp_path / "m.safetensors")
    out = succeeds(capsys, "export", "--to", "mxfp4", tmp_path / "m.safetensors", tmp_path / "float32")
    assert "quantization_config=CompressedTensorsConfig(dequantize=True)" in out
    for option, value, needs in (("--dtype", "float32", "dense"), ("--model", "a:b", "pt2"), ("--input", "2x3", "pt2")):
        message = fails(capsys, "export", "--to", "mxfp4", source, tmp_path / "other", option, value)
        assert message == f"{option}: expected with --to {needs} alone, got --to mxfp4"


def test_the_model_s_config_needs_no_dtype(tmp_path):
    source = write_packed(tmp_path, FMT, torch.float16)
    change_settings(source, lambda content: content.pop("dtype"))
    exports.export_fp8(source, tmp_path / "out")
    assert tensors_of(tmp_path / "out")[f"{LINEAR[0]}_scale"].dtype == torch.float16
