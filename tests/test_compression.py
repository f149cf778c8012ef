"""Entropy-coded files: bit-exact at every format, near the entropy, refused where they are malformed, and plain files
as they were."""

import hashlib
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import malformed
import malformed_compressed
import numpy as np
import pytest
import torch
from golden import v2
from inq_kernels.bench import compress as bench_compress
from malformed_compressed import CASES, File, bomb, frame, raw_frame
from support import FORMATS, generator, random_packed, same_bits
from test_checkpoint import at_most, converted, same_entries, same_state, small_model, snapshot
from torch import nn

import inq_kernels as inq
from inq_kernels import compression, file_format, files, reference
from inq_kernels.checkpoint import inspect, verify
from inq_kernels.cli import main
from inq_kernels.compression import MAX_RATIO, decode, encode
from inq_kernels.transcode import rewrite

ZEROS = (0.0, 0.5, 0.9, 0.99)


def trained(fmt, shape, zeros=0.0, seed=0):
    """A Gaussian weight with the largest values left after pruning, packed."""
    w = torch.randn(shape, generator=generator(seed)) * 0.02
    if zeros:
        w[w.abs() < w.abs().flatten().kthvalue(int(zeros * w.numel())).values] = 0
    return inq.pack(inq.quantize(w, fmt), fmt)


def entropy(packed):
    codes = reference.unpack_codes(packed.weight, packed.format.bits, packed.k)
    counts = torch.bincount(codes.flatten().int()).tolist()
    return -sum(c / codes.numel() * math.log2(c / codes.numel()) for c in counts if c)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 8))
def test_narrow_and_widen_are_one_bit_stream(bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, 8 * 37, np.uint8)
    stream = compression._narrow(compression._eights(values), bits)
    assert int.from_bytes(stream.tobytes(), "little") == sum(int(v) << bits * i for i, v in enumerate(values))
    assert (compression._widen(stream, bits) == values).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 64), (5, 4, 3, 3), (40, 203), (17, 1000)])
def test_what_is_encoded_decodes_to_the_same(fmt, shape):
    for zeros in ZEROS:
        packed = random_packed(fmt, *shape)
        drop = torch.rand(shape[0], packed.k, generator=generator(1)) < zeros
        codes = reference.unpack_codes(packed.weight, fmt.bits, packed.k).masked_fill(drop, 0)
        weight = reference.pack_codes(codes, fmt.bits)
        coded = encode("here", weight, shape, fmt)
        if coded is not None:
            stored, coding = coded
            assert stored.numel() == compression.stored_bytes(coding, shape, fmt) < weight.numel()
            assert torch.equal(decode("here", stored, coding, shape, fmt), weight)
        else:
            assert weight.numel() < 4000


@pytest.mark.parametrize("zeros", range(4))
def test_every_depth_of_masks_and_pieces_of_any_size(monkeypatch, zeros):
    """Whatever encode would choose: taking out zeros once, twice, three times; and pieces that end anywhere."""
    fmt, shape = inq.Format(4), (27, 411)
    weight = trained(fmt, shape, 0.97).weight
    # The smallest is the one of so many streams.
    monkeypatch.setattr(compression, "_size", lambda streams: abs(len(streams) - zeros - 1))
    monkeypatch.setattr(compression, "_FEW_ZEROS", 1)
    monkeypatch.setattr(compression, "_BLOCK", 64)
    stored, coding = encode("here", weight, shape, fmt)
    assert (coding.zeros, len(coding.streams)) == (zeros, zeros + 1)
    for chunk in (8, 72, 1 << 16):
        monkeypatch.setattr(compression, "_BLOCK", chunk)
        assert torch.equal(decode("here", stored, coding, shape, fmt), weight)


def test_an_encoder_that_does_not_decode_is_found_out(monkeypatch):
    packed = trained(inq.Format(4), (64, 64))
    monkeypatch.setattr(compression, "decode", lambda *arguments: packed.weight + 1)
    with pytest.raises(inq.CheckpointError, match="here: expected codes that decode to what was encoded, got others"):
        encode("here", packed.weight, packed.shape, packed.format)


def test_decode_asks_for_just_the_stored_bytes():
    """Files are refused before; this is for whoever calls it with other bytes."""
    packed = trained(inq.Format(4), (64, 64))
    stored, coding = encode("here", packed.weight, packed.shape, packed.format)
    size = stored.numel()
    for other in (stored[:-1], torch.cat([stored, torch.zeros(1, dtype=torch.uint8)])):
        with pytest.raises(inq.CheckpointError, match=f"here: expected {size} stored bytes, got {other.numel()}"):
            decode("here", other, coding, packed.shape, packed.format)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_sizes_are_within_3_percent_of_the_entropy(fmt, granularity):
    fmt = inq.Format(fmt.bits, fmt.levels, granularity)
    for zeros in (0.0, 0.9):
        packed = trained(fmt, (512, 1024), zeros)
        stored, coding = encode("here", packed.weight, packed.shape, fmt)
        bound = entropy(packed)
        assert bound <= 8 * stored.numel() / 2**19 * 1.002  # a code may follow how frequencies change
        assert 8 * stored.numel() / 2**19 < 1.03 * bound, (fmt, zeros)
        assert (coding.zeros > 0) == (zeros > 0)


def test_where_nothing_is_gained_the_codes_stay_packed(tmp_path):
    """Codes that are all equally likely, of every kind; the version is that of files that may hold coded ones."""
    packed = random_packed(inq.Format(2), 16, 16)
    codes = torch.randint(0, 8, (64, 64), generator=generator(), dtype=torch.uint8)
    codes[codes == 4] = 3  # 3-bit dense has no code 100
    even = inq.PackedWeight(reference.pack_codes(codes, 3), torch.zeros(64, 1, dtype=torch.int8), None,
                            inq.Format(3, "dense"), (64, 64))  # fmt: skip
    entries = {"a.weight": packed, "b.weight": even, "c.weight": trained(inq.Format(5), (64, 64))}
    inq.save(entries, tmp_path / "x.safetensors", compress=True)
    checkpoint = file_format.open_checkpoint(tmp_path / "x.safetensors")
    codings = {name: checkpoint.manifest[name].coding for name in entries}
    assert codings["a.weight"] is None
    assert codings["c.weight"] is not None
    assert same_entries(inq.load(tmp_path / "x.safetensors"), entries)


def test_a_weight_is_at_most_64_times_what_is_stored_of_it(tmp_path):
    fmt = inq.Format(4)
    zero = inq.pack(torch.zeros(512, 1000), fmt)
    stored, coding = encode("here", zero.weight, zero.shape, fmt)
    assert sum(coding.streams) < zero.weight.numel() // MAX_RATIO == stored.numel()
    inq.save({"weight": zero}, tmp_path / "x.safetensors", compress=True)
    assert same_entries(inq.load(tmp_path / "x.safetensors"), {"weight": zero})


def test_a_long_row_takes_little_memory(tmp_path):
    """Of 32 million codes and one, 8 MiB, coded in 130 kB: a byte or four for each code at a time would be more."""
    fmt, shape = inq.Format(2), (1, (1 << 25) + 1)
    weight = torch.zeros(1, fmt.row_bytes(shape[1]), dtype=torch.uint8)
    packed = inq.PackedWeight(weight, torch.zeros(1, 1, dtype=torch.int8), None, fmt, shape)
    inq.save({"weight": packed}, tmp_path / "x.safetensors", compress=True)
    assert (tmp_path / "x.safetensors").stat().st_size < 1 << 18
    with at_most(64):
        loaded = inq.load(tmp_path / "x.safetensors")
    assert same_entries(loaded, {"weight": packed})


# --- files ------------------------------------------------------------------------------------------------------------


def mixed():
    """Every format, dense and sparse, with and without row scales, linear and convolution; and what is not packed."""
    entries = {}
    for i, fmt in enumerate(FORMATS):
        entries[f"l{i}.weight"] = trained(fmt, (24, 130), ZEROS[i % 4], i)
        entries[f"c{i}.weight"] = trained(fmt, (16, 8, 3, 3), seed=i)
        entries[f"s{i}.weight"] = random_packed(fmt, 9, 40, scale=True)
    return entries | {"norm.weight": torch.ones(5), "steps": torch.tensor(3)}


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_a_compressed_checkpoint_loads_bit_for_bit(tmp_path, name):
    entries = mixed()
    inq.save(entries, tmp_path / name, compress=True)
    assert same_entries(inq.load(tmp_path / name), entries)
    assert verify(tmp_path / name) == len(file_format.open_checkpoint(tmp_path / name).manifest)
    inq.save(entries, tmp_path / f"again-{name}", compress=True)  # the same model gives the same bytes
    for path in [tmp_path / name] if name.endswith("s") else (tmp_path / name).iterdir():
        again = tmp_path / f"again-{name}" if path.parent == tmp_path else tmp_path / f"again-{name}" / path.name
        assert again.read_bytes() == path.read_bytes()


def test_a_model_is_filled(tmp_path):
    model = converted()
    inq.save(model, tmp_path / "x.safetensors", compress=True)
    assert same_state(inq.load(tmp_path / "x.safetensors", small_model(1)), model)


def test_plain_files_are_byte_for_byte_what_they_were(tmp_path, monkeypatch):
    """The hash of what the version before compression wrote, whose name is in the file."""
    monkeypatch.setattr(inq, "__version__", "0.1.0")
    inq.save(malformed.good_entries(), tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "85e95ae87d0e868ceae66f817091e568d83eff1dd75d09c1f46856aab7930e9e"


def test_rewriting_there_and_back_gives_the_same_bytes(tmp_path):
    entries = mixed()
    inq.save(entries, tmp_path / "plain.safetensors")
    before, after = rewrite(tmp_path / "plain.safetensors", tmp_path / "small.safetensors", compress=True)
    assert (before, after) == tuple((tmp_path / n).stat().st_size for n in ("plain.safetensors", "small.safetensors"))
    assert after < before
    assert same_entries(inq.load(tmp_path / "small.safetensors"), entries)
    rewrite(tmp_path / "small.safetensors", tmp_path / "back.safetensors", compress=False)
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


@pytest.mark.parametrize("make", [malformed.model_directory, malformed.sharded_directory])
def test_rewriting_a_directory(tmp_path, make):
    """One file or shards; a model's config.json, whose other keys stay, and files that come along."""
    path = make(tmp_path)
    config = json.loads((path / "inq.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    (path / "tokenizer.json").write_text("{}")
    rewrite(path, tmp_path / "small", compress=True)
    rewrite(tmp_path / "small", tmp_path / "back", compress=False)
    assert {p.name for p in (tmp_path / "small").iterdir()} == {p.name for p in path.iterdir()}
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    assert small == {"model_type": "llama", "quantization_config": config | {"format_version": 2}}
    for where, version in (("small", "2"), ("back", "1")):
        assert same_entries(inq.load(tmp_path / where), inq.load(path))
        for file in (tmp_path / where).glob("*.safetensors"):
            assert files.read_header(file).metadata["inq_format_version"] == version
    assert json.loads((tmp_path / "back" / "inq.json").read_text()) == config


def test_rewriting_refuses_what_overlaps_or_does_not_fit(tmp_path):
    path = malformed.sharded_directory(tmp_path)
    with pytest.raises(ValueError, match="expected an output outside of the source"):
        rewrite(path, path / "x.safetensors", compress=True)
    with pytest.raises(ValueError, match="expected a directory for 2 files"):
        rewrite(path, tmp_path / "x.safetensors", compress=True)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    inq.save(malformed.good_entries(), path)
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        inq.save(mixed(), path, compress=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_inspect_shows_what_is_stored(tmp_path):
    packed = trained(inq.Format(5), (64, 100))
    inq.save({"a.weight": packed, "b.weight": trained(inq.Format(2), (8, 8))}, tmp_path / "x.safetensors", True)
    summary = inspect(tmp_path / "x.safetensors")
    infos = files.read_header(tmp_path / "x.safetensors").tensors
    stored = infos["a.weight"].shape[0] + 64
    a, b = summary.layers
    assert (a.bytes, a.bits, a.coding) == (stored, 8 * stored / 6400, "zstd")
    assert (b.bytes, b.coding) == (8 * 2 + 8, "packed")
    assert a.entropy == pytest.approx(entropy(packed))
    assert summary.weights == 6464
    assert summary.bits == pytest.approx(8 * (a.bytes + b.bytes) / 6464)
    assert summary.entropy == pytest.approx((6400 * a.entropy + 64 * b.entropy) / 6464)


# --- the golden file --------------------------------------------------------------------------------------------------


def test_the_golden_file_of_version_2_holds_what_it_always_held():
    digest = hashlib.sha256(v2.PATH.read_bytes()).hexdigest()
    assert digest == "66e6c7fed437766e65ac0a4c5953fe2ac6428fd2abc8dbf4741e6b7298bd0e3a"
    manifest = file_format.open_checkpoint(v2.PATH).manifest
    assert {manifest[name].coding.zeros for name in v2.WEIGHTS} == {0, 1, 2, 3}
    entries, expected = inq.load(v2.PATH), v2.expected()
    assert list(entries) == list(expected)
    for name, value in expected.items():
        if not isinstance(value, tuple):
            assert same_bits(entries[name], value), name
            continue
        w, n1, bits, levels = value
        got = entries[name]
        assert (got.format.bits, got.format.levels, got.shape) == (bits, levels, tuple(w.shape)), name
        assert got.weight_exp.flatten().tolist() == n1, name
        assert same_bits(inq.unpack(got), w), name


# --- what is refused --------------------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_its_base_is_good(tmp_path):
    assert len(CASES) >= 80
    assert same_entries(inq.load(File().sign().write(tmp_path)), malformed_compressed.good_entries())
    file = File()
    assert {name: file.coding(name)["zeros"] for name in ("a", "m", "s", "five")} == {"a": 0, "m": 1, "s": 2, "five": 0}
    for name in ("a", "m", "s", "five"):
        file.put(name, list(map(raw_frame, file.symbols(name))))
    assert same_entries(inq.load(file.write(tmp_path)), malformed_compressed.good_entries())


class Model(nn.Module):
    """What the corpus would be loaded into."""

    def __init__(self):
        super().__init__()
        self.a, self.m, self.s = nn.Linear(203, 15), nn.Linear(201, 32, bias=False), nn.Linear(203, 65, bias=False)
        self.five = nn.Linear(64, 32, bias=False)


@pytest.mark.parametrize("name", CASES)
def test_malformed_is_refused_with_its_message_in_little_memory(tmp_path, monkeypatch, name):
    case = CASES[name]
    path = case.write(tmp_path)
    if not case.reads:
        monkeypatch.setattr(files, "open_tensors", None)
    model = Model()
    before = snapshot(model)
    with at_most(64):
        for arguments in ((), (model,)):
            with pytest.raises(inq.CheckpointError, match=case.message) as caught:
                inq.load(path, *arguments)
            assert str(caught.value).startswith(str(tmp_path))
    assert snapshot(model) == before


def test_every_case_has_a_message_of_its_own():
    messages = [case.message for case in CASES.values()]
    assert len(set(messages)) >= 60


def test_integrations_refuse_it_by_name(tmp_path):
    from inq_kernels.integrations.packed_files import PackedFiles
    from inq_kernels.integrations.settings import Settings

    inq.save(mixed(), tmp_path / "x", compress=True)
    message = "expected format version 1 at most, got 2, whose codes may be entropy-coded: `inq save SRC OUT` writes"
    with pytest.raises(inq.CheckpointError, match=message):
        Settings.read("here", json.loads((tmp_path / "x" / "inq.json").read_text()))
    with pytest.raises(inq.CheckpointError, match=message):
        PackedFiles([tmp_path / "x" / "model.safetensors"])


def test_without_zstandard_the_package_is_named(tmp_path):
    """And plain files load as ever."""
    inq.save(malformed.good_entries(), tmp_path / "plain.safetensors")
    inq.save(mixed(), tmp_path / "small.safetensors", compress=True)
    script = """
        import sys
        sys.modules["zstandard"] = None
        import inq_kernels as inq
        from inq_kernels.cli import main
        folder = sys.argv[1]
        entries = inq.load(folder + "/plain.safetensors")
        for call in (
            lambda: inq.load(folder + "/small.safetensors"),
            lambda: inq.save(entries, folder + "/x.safetensors", compress=True),
        ):
            try:
                call()
            except ImportError as error:
                assert str(error).startswith(folder), error
                assert "need the package zstandard: pip install 'inq_kernels[compress]'" in str(error), error
            else:
                sys.exit("expected an error")
        assert main(["verify", folder + "/small.safetensors"]) == 1
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "inq: error: " in result.stderr
    assert "inq_kernels[compress]" in result.stderr
    assert not (tmp_path / "x.safetensors").exists()


# --- the check of codes, whichever way it is made ---------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("n1", [-126, -124, -112, 0, 127])
def test_codes_are_counted_as_the_definition_does(fmt, n1):
    """Every code in every place, and padding: the compiled library only ever says that all are right."""
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8).repeat(3, 3)[:, : 3 * (1 << fmt.bits) - 3]
    n1 = torch.full((3, 1), n1, dtype=torch.int8)
    k = codes.shape[1]
    whole = inq.PackedWeight(reference.pack_codes(codes, fmt.bits), n1, None, fmt, codes.shape)
    assert file_format._invalid_codes(whole) == reference.invalid_codes(whole.weight, n1, k, fmt)
    for code in range(1 << fmt.bits):
        for column in (0, k - 1, k):  # the last is padding
            one = torch.zeros(3, k + 1, dtype=torch.uint8)
            one[1, column] = code
            packed = inq.PackedWeight(reference.pack_codes(one, fmt.bits)[:, : fmt.row_bytes(k)], n1, None, fmt, (3, k))
            expected = reference.invalid_codes(packed.weight, n1, k, fmt)
            assert file_format._invalid_codes(packed) == expected, (code, column)


def test_a_frame_is_what_the_library_writes():
    """The corpus writes frames in two ways; the loader takes either."""
    symbols = bytes(range(64)) * 4
    checked = frame(symbols, write_checksum=True)
    for made in (frame(symbols), raw_frame(symbols), raw_frame(symbols, size=256), checked):
        stream = compression._Stream("here", np.frombuffer(made, np.uint8))
        assert stream.read(256).tobytes() == symbols
        stream.end()
        assert compression._frame_bytes(memoryview(made + b"behind")) == len(made)
    # Of blocks that repeat one byte.
    assert compression._frame_bytes(memoryview(bomb() + b"behind")) == len(bomb())


# --- inq bench compress -----------------------------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "compress"


def test_bench_compress_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_compress, "_SHAPE_QUICK", (8, 256))
    monkeypatch.setattr(bench_compress, "_FORMATS", [inq.Format(4)])
    assert main(["bench", "compress", "--quick", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "4 paper tensor, 90% pruned  zstd, zeros out" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    dense = results["rows"][0]
    assert dense["over_percent"] == pytest.approx(100 * (dense["bits"] / dense["entropy"] - 1))
    assert dense["others"]["zlib -6, packed"]["bits"] > dense["entropy"]
    assert results["machine"]["cpu"]
    assert (tmp_path / "out" / "results.txt").read_text() == out == bench_compress.text(results["rows"]) + "\n"


def test_bench_compress_takes_a_checkpoint_and_no_wrong_coder(tmp_path, monkeypatch, capsys):
    inq.save({"a.weight": trained(inq.Format(3), (64, 64))}, tmp_path / "x.safetensors", compress=True)
    assert main(["bench", "compress", "--quick", "--model", str(tmp_path / "x.safetensors")]) == 0
    assert re.search(r"^a\.weight +zstd ", capsys.readouterr().out, re.MULTILINE)
    wrong = {"wrong": ("codes", lambda symbols: (1, lambda: symbols + 1))}
    monkeypatch.setattr(bench_compress, "OTHERS", wrong)
    assert main(["bench", "compress", "--quick", "--model", str(tmp_path / "x.safetensors")]) == 1
    assert "a.weight: wrong: expected the same symbols after decoding, got others" in capsys.readouterr().err


def test_the_documented_table_is_that_of_the_committed_results():
    rows = json.loads((RESULTS / "results.json").read_text())["rows"]
    assert (RESULTS / "results.txt").read_text() == bench_compress.text(rows) + "\n"
    table = bench_compress.text(rows).split("\n\n")[0]
    page = (RESULTS.parent.parent.parent / "docs" / "bench.md").read_text()
    assert f"<!-- RESULTS: bench/results/compress -->\n```text\n{table}\n```" in page
    assert all(row["over_percent"] < 3 for row in rows)
