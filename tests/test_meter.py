"""meter: sizes by hand, and against files that hold just these streams."""

import json
import math

import pytest
import torch
from safetensors.torch import save
from torch import nn

import inq_kernels as inq
from inq_kernels.baselines import meter
from inq_kernels.baselines.meter import LayerSize
from inq_kernels.baselines.straight_through import project_
from inq_kernels.baselines.ternary import TWN
from inq_kernels.nn import replacement


def test_an_inq_layer_by_hand():
    """Two rows of 10 weights at 3 bits: codes are 2·10·3 = 60 bits; rows are filled up to 16 codes, 6 bytes, 96 bits in
    all: 36 of padding. One byte a row for n1. Half of the values are ½, half are 0: one bit each."""
    w = torch.tensor([[0.5, 0.0] * 5] * 2)
    packed = inq.pack(w, inq.Format(3))
    size = meter.inq_layer("fc", packed)
    assert (size.codes, size.padding, size.exponents, size.scales) == (60, 36, 16, 0)
    assert (size.bits, size.nonzero, size.numel, size.entropy) == (112, 10, 20, 20.0)
    assert size.bits == 8 * (packed.weight.nbytes + packed.weight_exp.nbytes)
    assert size.bits_per_weight == 5.6
    coded = meter.inq_layer("fc", packed, coded_bytes=5)
    assert (coded.codes, coded.padding, coded.exponents, coded.entropy) == (40, 0, 16, 20.0)
    scaled = inq.PackedWeight(packed.weight, packed.weight_exp, torch.ones(2, 1), packed.format, packed.shape)
    assert meter.inq_layer("fc", scaled).scales == 64


def test_entropy_by_hand():
    assert meter.entropy_bits(torch.tensor([1, 1, 1, 1])) == 0
    assert meter.entropy_bits(torch.tensor([0, 1, 2, 3])) == 8
    assert meter.entropy_bits(torch.tensor([0.5, 0.5, 0.5, -1.0])) == pytest.approx(3 * math.log2(4 / 3) + 2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5, bias=False))


def bytes_of(layers, floats):
    """A file with a stream for each part, whatever is in it."""
    streams = {
        f"{layer.name}.{part}": torch.full((-(-getattr(layer, part) // 8),), 7, dtype=torch.uint8)
        for layer in layers
        for part in meter.PARTS
        if part != "padding" and getattr(layer, part)
    }
    shapes = json.dumps({layer.name: layer.shape for layer in layers}, separators=(",", ":"))
    return len(save({**streams, **floats}, {"shapes": shapes})), sum(s.nbytes for s in streams.values())


def test_a_model_is_as_large_as_its_file():
    model = net()
    layers = project_(model, TWN(), skip="0")
    floats = {name: t for name, t in model.state_dict().items() if name != "3.weight"}
    size = meter.measure(model, layers, "TWN")
    # 720 weights of 2 bits, and α.
    assert size.weight_bytes == 180 + 4
    file, streams = bytes_of(layers, floats)
    assert streams == size.weight_bytes, "no layer here has padding"
    assert size.bytes == file
    assert size.header == file - 184 - sum(t.nbytes for t in floats.values())
    # conv 36 + 4, batch norm 4·4, and its int64 counter.
    assert size.floats == {name: t.nbytes for name, t in floats.items()}
    assert size.float32_bytes == 4 * (720 + 36 + 4 + 16) + 8
    assert size.ratio == size.float32_bytes / size.bytes
    assert size.weight_ratio == 4 * 720 / 184
    assert size.entropy_bytes <= 180


def test_inq_beside_its_own_file(tmp_path):
    """The same tensors: only the header differs, which has a manifest and checksums there."""
    model = net()
    inq.convert(model, inq.Format(4))
    size = meter.measure(model, meter.inq_layers(model), "INQ")
    inq.save(model, tmp_path / "model.safetensors")
    header = inq.files.read_header(tmp_path / "model.safetensors")
    assert set(size.floats) == {name for name in header.tensors if not name.startswith(("0.weight", "3.weight"))}
    data = (tmp_path / "model.safetensors").stat().st_size
    assert size.weight_bytes + sum(size.floats.values()) < data
    tensors = inq.files.read_tensors(tmp_path / "model.safetensors", header, None)
    assert size.weight_bytes + sum(size.floats.values()) == sum(t.nbytes for t in tensors.values())
    coded = meter.measure(model, meter.inq_layers(model, {"3": 100}), "coded")
    assert coded.part("codes") == 100 + 4 * 36 / 8


def test_a_converted_model_by_hand():
    """Three rows of 20 weights at 3 bits, 5 of them not zero, in the kernels' layout and with row scales: 180 bits of
    codes, rows filled up to 24 codes, so 36 of padding, 24 for n1 and 96 for the scales: 42 bytes. The bias takes two
    bytes a value, and counts four in float32; a buffer outside the state counts nowhere."""
    linear = nn.Linear(20, 3, dtype=torch.bfloat16)
    w = torch.zeros(3, 20)
    w[:, :5] = 0.5
    packed = inq.pack(w, inq.Format(3))
    scaled = inq.PackedWeight(
        packed.weight, packed.weight_exp, torch.tensor([[1.5], [3.0], [0.7]]), packed.format, (3, 20)
    )
    model = nn.Sequential(inq.prepack(replacement(linear, scaled)))
    model[0].register_buffer("cache", torch.ones(100), persistent=False)
    (layer,) = layers = meter.inq_layers(model)
    assert (layer.codes, layer.padding, layer.exponents, layer.scales) == (180, 36, 24, 96)
    assert layer.nonzero == 15
    assert layer.entropy == pytest.approx(15 * math.log2(60 / 15) + 45 * math.log2(60 / 45))
    size = meter.measure(model, layers, "INQ")
    assert (size.part("codes"), size.part("padding")) == (22.5, 4.5)
    assert (size.weight_bytes, size.floats, size.float32_bytes) == (42, {"0.bias": 6}, 4 * 63)
    streams = {"0.bias": torch.zeros(3, dtype=torch.bfloat16)}
    # The codes with their padding.
    for part, count in (("codes", 27), ("exponents", 3), ("scales", 12)):
        streams[f"0.{part}"] = torch.zeros(count, dtype=torch.uint8)
    assert size.bytes == len(save(streams, {"shapes": '{"0":[3,20]}'}))


def test_tied_weights_count_once():
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    size = meter.measure(model, project_(model, TWN()), "tied")
    assert [layer.name for layer in size.layers] == ["0"]
    assert size.floats == {"0.bias": 24, "1.bias": 24}
    assert size.float32_bytes == 4 * (36 + 12)
    tied = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    tied[1].weight = tied[0].weight
    plain = meter.measure(tied, [], "float32")
    assert "1.weight" not in plain.floats
    assert plain.weight_ratio == 1.0
    assert plain.bytes == plain.float32_bytes + plain.header


def test_the_table():
    model = net()
    text = str(meter.measure(model, project_(model, TWN(), skip="0"), "TWN"))
    first, headers, _, *rows = text.splitlines()
    assert first.startswith("TWN: ")
    assert "smaller than float32 (15.65× its weights alone)" in first
    assert headers.split() == [
        "layer",
        "weights",
        "nonzero",
        "codes",
        "scales",
        "bytes",
        "bits/weight",
        "entropy",
        "bound",
    ]
    assert rows[0].split()[:2] == ["3", "720"]
    assert [row.split()[0] for row in rows[1:]] == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("header", "all"),
    ]


def test_mistakes_have_one_clear_error():
    model = net()
    size = LayerSize("3", (5, 144), 1, 1.0, codes=8)
    with pytest.raises(ValueError, match=r"layer '3': expected shape \[5, 144\], got \[144, 5\]"):
        meter.measure(model, [LayerSize("3", (144, 5), 1, 1.0)], "x")
    with pytest.raises(ValueError, match="expected modules with a weight, got '2'"):
        meter.measure(model, [LayerSize("2", (5, 144), 1, 1.0)], "x")
    with pytest.raises(ValueError, match=r"expected each module once, got \['3', '3'\]"):
        meter.measure(model, [size, size], "x")
    inq.convert(model, inq.Format(4))
    with pytest.raises(ValueError, match="expected the sizes of all packed modules, got none of '0'"):
        meter.measure(model, [size], "x")
    with pytest.raises(ValueError, match=r"coded_bytes: expected packed modules \['0', '3'\], got 'fc'"):
        meter.inq_layers(model, {"fc": 3})
