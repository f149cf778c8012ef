"""A corpus of malformed checkpoints: each case writes one below a directory and says with what message it is refused.

``CASES`` maps a name to ``Case(write, message, reads)``: ``write(directory)`` returns the path to load, ``message`` is
a regular expression, and ``reads`` says that the fault lies in the data, which is only seen when tensors are read.
"""

import hashlib
import json
import os
import pickle
import stat
import struct
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import inq_kernels as inq
from inq_kernels.file_format import write_file

MAX_HEADER = 16 << 20


@dataclass(frozen=True)
class Case:
    write: object
    message: str
    reads: bool


def registry():
    """A table of cases, and the decorator that puts a case into it under its function's name."""
    cases = {}

    def case(message, reads=False):
        def register(function):
            assert function.__name__ not in cases
            cases[function.__name__] = Case(function, message, reads)
            return function

        return register

    return cases, case


CASES, case = registry()


def written(entries, **how):
    """The bytes of the file that ``inq.save`` makes of ``entries``."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "good.safetensors")
        inq.save(entries, path, **how)
        return path.read_bytes()


# --- a good file, and how to take it apart ----------------------------------------------------------------------------


def good_entries():
    """fc.weight [3, 10] in 4 bits, paper, with a row scale; fc.bias; norm.weight and steps, which are not packed."""
    fmt = inq.Format(4)
    values = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.125, -0.125, 0.0]).repeat(3, 1)
    packed = inq.pack(values, fmt, torch.zeros(3, 1, dtype=torch.int8))
    scale = torch.tensor([[1.0], [-0.5], [3.0]])
    return {
        "fc.weight": inq.PackedWeight(packed.weight, packed.weight_exp, scale, fmt, packed.shape),
        "fc.bias": torch.tensor([1.0, 2.0, 3.0]),
        "norm.weight": torch.arange(6.0).view(2, 3),
        "steps": torch.tensor(7),
    }


@cache
def good_bytes():
    return written(good_entries())


class File:
    """A good file, taken apart: ``header`` (a dict), ``data`` (a bytearray), ``manifest`` and ``config`` (dicts)."""

    good = staticmethod(lambda: good_bytes())  # subclasses have another

    def __init__(self):
        raw = self.good()
        length = int.from_bytes(raw[:8], "little")
        self.header = json.loads(raw[8 : 8 + length])
        self.data = bytearray(raw[8 + length :])
        self.metadata = self.header["__metadata__"]
        self.manifest = json.loads(self.metadata["inq_manifest"])
        self.config = json.loads(self.metadata["inq_config"])

    def tensor(self, name):
        """The bytes of a tensor; assign to a slice to change them."""
        begin, end = self.header[name]["data_offsets"]
        return memoryview(self.data)[begin:end]

    def sign(self):
        """Checksums of the data and the manifest as they are now: what someone who forges a file would do."""
        for name in self.manifest:
            if name in self.header:
                self.manifest[name]["sha256"] = hashlib.sha256(self.tensor(name)).hexdigest()
        return self

    def drop(self, name):
        """Remove the last tensor of the data."""
        begin, end = self.header.pop(name)["data_offsets"]
        assert end == len(self.data)
        del self.data[begin:end]
        self.manifest.pop(name, None)

    def bytes(self, config=True):
        text = json.dumps(self.manifest)
        self.metadata["inq_manifest"] = text
        self.metadata["inq_manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        self.metadata["inq_config"] = json.dumps(self.config)
        if not config:
            del self.metadata["inq_config"]
        return assemble(self.header, self.data)

    def write(self, directory):
        return write(directory, self.bytes())


def assemble(header, data=b""):
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header)) + header + bytes(data)


def write(directory, content, name="model.safetensors"):
    path = directory / name
    path.write_bytes(content)
    return path


def one(directory, entry, data=b"", name="a"):
    """A file of one tensor whose header entry is ``entry`` (JSON text, or what makes one)."""
    entry = entry if isinstance(entry, str) else json.dumps(entry)
    return write(directory, assemble(f'{{"{name}":{entry}}}', data))


def info(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def model_directory(directory, file=None):
    """A good checkpoint directory."""
    path = directory / "model"
    path.mkdir()
    file = file or File()
    (path / "model.safetensors").write_bytes(file.bytes(config=False))
    (path / "inq.json").write_text(json.dumps(file.config))
    return path


def sharded_directory(directory, weight_map=None):
    """A good directory of two shards: fc and the rest."""
    path = directory / "model"
    path.mkdir()
    entries = good_entries()
    shards = {"a.safetensors": ["fc.weight", "fc.bias"], "b.safetensors": ["norm.weight", "steps"]}
    good_map = {}
    for shard, names in shards.items():
        write_file(path / shard, {name: entries[name] for name in names}, {})
        good_map |= dict.fromkeys(names, shard)
    good_map |= dict.fromkeys(["fc.weight_exp", "fc.weight_scale"], "a.safetensors")
    weight_map = good_map if weight_map is None else weight_map(good_map)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "inq.json").write_text(json.dumps(File().config))
    return path


# --- the file as a whole ----------------------------------------------------------------------------------------------


@case(r"model.safetensors: expected a file, got No such file")
def missing(directory):
    return directory / "model.safetensors"


@case(r"expected a safetensors file of at least 8 bytes, got 0")
def empty(directory):
    return write(directory, b"")


@case(r"at least 8 bytes, got 7")
def seven_bytes(directory):
    return write(directory, b"\x02" + bytes(6))


@case(r"expected a header of at most the file's 100 bytes, got 101")
def header_longer_than_file(directory):
    return write(directory, struct.pack("<Q", 101) + b"{" + b" " * 99)


@case(r"expected a header of at most 16777216 bytes, got 9223372036854775808")
def header_of_exabytes(directory):
    return write(directory, struct.pack("<Q", 1 << 63) + b"{}")


@case(r"expected a header of at most 16777216 bytes, got 16777217")
def header_over_the_limit(directory):
    path = write(directory, struct.pack("<Q", MAX_HEADER + 1) + b"{")
    os.truncate(path, MAX_HEADER + 100)
    return path


@case(r"expected a header that begins with '\{', got b'\\x00")
def header_of_zeros(directory):
    path = write(directory, struct.pack("<Q", MAX_HEADER))
    os.truncate(path, MAX_HEADER + 8)
    return path


@case(r"expected \d+ bytes of tensors, got \d+")
def truncated_data(directory):
    return write(directory, File().bytes()[:-1])


@case(r"expected \d+ bytes of tensors, got \d+")
def trailing_data(directory):
    return write(directory, File().bytes() + b"\0")


@case(r"expected a header of at most the file's")
def truncated_header(directory):
    return write(directory, File().bytes()[:200])


@case(r"expected a regular file, got a directory")
def directory_named_like_a_file(directory):
    path = directory / "model.safetensors"
    path.mkdir()
    return path


@case(r"expected a regular file, got a pipe")
def fifo(directory):
    path = directory / "model.safetensors"
    os.mkfifo(path)
    return path


@case(r"expected a regular file, got a socket")
def unix_socket(directory):
    path = directory / "model.safetensors"
    os.mknod(path, 0o600 | stat.S_IFSOCK)
    return path


@case(r"expected a regular file, got a device")
def device(directory):
    path = directory / "model.safetensors"
    path.symlink_to("/dev/zero")
    return path


@case(r"expected a file, got Too many levels of symbolic links")
def symlink_loop(directory):
    path = directory / "model.safetensors"
    path.symlink_to(path)
    return path


@case(r"got \d+ \(this is a ZIP file, as torch.save writes: pickles are never opened\)")
def zip_renamed(directory):
    path = directory / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    return path


@case(r"got \d+ \(this is a pickle: pickles are never opened\)")
def pickle_renamed(directory):
    return write(directory, pickle.dumps({"weight": [1.0] * 100}, protocol=2))


@case(r"model.bin: expected a .safetensors file, got .bin: formats that can hold a pickle, and so run code")
def bin_by_name(directory):
    return write(directory, good_bytes(), "model.bin")


@case(r"model.PT: expected a .safetensors file, got .PT: formats that can hold a pickle")
def pt_by_name(directory):
    return write(directory, good_bytes(), "model.PT")


@case(r"model.gguf: expected a name ending in .safetensors or a directory, got '.gguf'")
def other_suffix(directory):
    return write(directory, good_bytes(), "model.gguf")


# --- the header's JSON ------------------------------------------------------------------------------------------------


@case(r"header: expected UTF-8 text, got invalid start byte at 6")
def header_not_utf8(directory):
    return write(directory, assemble(b'{"a": \xff}'))


@case(r"header: expected JSON, got text that is not")
def header_not_json(directory):
    return write(directory, assemble("{hello}"))


@case(r"header: expected JSON, got text that is not: Extra data")
def header_of_two_objects(directory):
    return write(directory, assemble("{}{}"))


@case(r"expected a header that begins with '\{', got b'\[\]'")
def header_a_list(directory):
    return write(directory, assemble("[]"))


@case(r"expected a header that begins with '\{', got b' \{\}'")
def header_after_a_space(directory):
    return write(directory, assemble(" {}"))


@case(r"header: expected JSON with unique keys, got 'a' twice")
def duplicate_tensor(directory):
    entry = json.dumps(info())
    return write(directory, assemble(f'{{"a":{entry},"a":{entry}}}', bytes(8)))


@case(r"header: expected JSON with unique keys, got 'shape' twice")
def duplicate_key_inside(directory):
    return one(directory, '{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}', bytes(8))


@case(r"header: expected JSON with unique keys, got '__metadata__' twice")
def duplicate_metadata(directory):
    return write(directory, assemble('{"__metadata__":{},"__metadata__":{}}'))


@case(r"header: expected JSON without NaN and Infinity, got NaN")
def nan_in_header(directory):
    return one(directory, '{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}', bytes(8))


@case(r"header: expected finite numbers, got 1e999")
def overflowing_float(directory):
    return one(directory, '{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}', bytes(8))


@case(r"header: expected JSON of bounded depth")
def deep_nesting(directory):
    return write(directory, assemble('{"a":' + "[" * 5_000_000))


@case(r"header: expected JSON of bounded depth")
def deep_nesting_of_objects(directory):
    return write(directory, assemble('{"a":' * 1_000_000))


@case(r"header: expected integers of at most 64 bits, got 111111111111111111111111… \(1000000 digits\)")
def integer_of_a_million_digits(directory):
    return one(directory, '{"dtype":"F32","shape":[' + "1" * 1_000_000 + '],"data_offsets":[0,8]}', bytes(8))


@case(r"header: expected integers of at most 64 bits, got 18446744073709551616")
def integer_over_64_bits(directory):
    return one(directory, info(offsets=(0, 1 << 64)), bytes(8))


@case(r"__metadata__: expected an object of strings, got \[\]")
def metadata_a_list(directory):
    return write(directory, assemble('{"__metadata__":[]}'))


@case(r"__metadata__: expected an object of strings, got \{'format': 1\}")
def metadata_a_number(directory):
    return write(directory, assemble('{"__metadata__":{"format":1}}'))


@case(r"header: expected UTF-8 text, got surrogates not allowed")
def lone_surrogate(directory):
    return write(directory, assemble('{"__metadata__":{"format":"\\ud800"}}'))


# --- names, dtypes, shapes, offsets -----------------------------------------------------------------------------------


@case(r"expected tensor names of 1 to 512 of \[A-Za-z0-9_.\], got '../../etc/passwd'")
def traversal_name(directory):
    return one(directory, info(), bytes(8), "../../etc/passwd")


@case(r"expected tensor names of 1 to 512 of .*, got ''")
def empty_name(directory):
    return one(directory, info(), bytes(8), "")


@case(r"expected tensor names of 1 to 512 of .*, got 'nnnn")
def name_of_513(directory):
    return one(directory, info(), bytes(8), "n" * 513)


@case(r"expected tensor names of 1 to 512 of .*, got 'wéight'")
def name_not_ascii(directory):
    return one(directory, info(), bytes(8), "wéight")


@case(r"expected tensor names of 1 to 512 of .*, got 'a\\n'")
def name_with_a_newline(directory):
    return one(directory, info(), bytes(8), "a\\n")


@case(r"tensor 'a': dtype: expected one of F64, .*, got 'F128'")
def unknown_dtype(directory):
    return one(directory, info("F128"), bytes(8))


@case(r"tensor 'a': dtype: expected one of F64, .*, got \['F32'\]")
def dtype_a_list(directory):
    return one(directory, info(["F32"]), bytes(8))


@case(r"tensor 'a': expected exactly dtype, shape and data_offsets, got \{'dtype'")
def entry_without_offsets(directory):
    return one(directory, {"dtype": "F32", "shape": [2]}, bytes(8))


@case(r"tensor 'a': expected exactly dtype, shape and data_offsets, got \{'dtype'")
def entry_with_more(directory):
    return one(directory, info() | {"strides": [1]}, bytes(8))


@case(r"tensor 'a': expected exactly dtype, shape and data_offsets, got None")
def entry_null(directory):
    return one(directory, "null")


@case(r"tensor 'a': shape: expected at most 16 integers in \[0, 281474976710656\], got \[True\]")
def shape_bool(directory):
    return one(directory, info("U8", (True,), (0, 1)), bytes(1))


@case(r"tensor 'a': shape: expected at most 16 integers .*, got \[2.0\]")
def shape_float(directory):
    return one(directory, info(shape=(2.0,)), bytes(8))


@case(r"tensor 'a': shape: expected at most 16 integers .*, got \[-2, -1\]")
def shape_negative(directory):
    return one(directory, info(shape=(-2, -1)), bytes(8))


@case(r"tensor 'a': shape: expected at most 16 integers .*, got \[0, 4611686018427387904\]")
def shape_zero_times_2_62(directory):
    return one(directory, info(shape=(0, 1 << 62), offsets=(0, 0)))


@case(r"tensor 'a': shape: expected a product of at most 281474976710656, got \[0, 16777216, 16777216, 2\]")
def shape_with_a_large_product(directory):
    return one(directory, info(shape=(0, 1 << 24, 1 << 24, 2), offsets=(0, 0)))


@case(r"tensor 'a': shape: expected at most 16 integers .*, got \[1, 1")
def rank_17(directory):
    return one(directory, info("U8", [1] * 17, (0, 1)), bytes(1))


@case(r"tensor 'a': shape: expected at most 16 integers .*, got '2'")
def shape_a_string(directory):
    return one(directory, {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, bytes(8))


@case(r"tensor 'a': data_offsets: expected two integers ≥ 0, got \[False, True\]")
def offsets_bool(directory):
    return one(directory, info("U8", (1,), (False, True)), bytes(1))


@case(r"tensor 'a': data_offsets: expected two integers ≥ 0, got \[0, 8.0\]")
def offsets_float(directory):
    return one(directory, info(offsets=(0, 8.0)), bytes(8))


@case(r"tensor 'a': data_offsets: expected two integers ≥ 0, got \[0, 4, 8\]")
def three_offsets(directory):
    return one(directory, info(offsets=(0, 4, 8)), bytes(8))


@case(r"tensor 'a': data_offsets: expected two integers ≥ 0, got \[-8, 0\]")
def negative_offset(directory):
    return one(directory, info(offsets=(-8, 0)), bytes(8))


@case(r"tensor 'a': data_offsets: expected begin ≤ end, got \[8, 0\]")
def offsets_swapped(directory):
    return one(directory, info(offsets=(8, 0)), bytes(8))


@case(r"tensor 'a': data_offsets: expected 8 bytes for F32 \[2\], got 12")
def wrong_length(directory):
    return one(directory, info(offsets=(0, 12)), bytes(12))


@case(r"expected 4398046511104 bytes of tensors, got 8")
def claims_terabytes(directory):
    return one(directory, info("F32", (1 << 40,), (0, 1 << 42)), bytes(8))


@case(r"tensor 'b': expected to begin at 8, got 4: an overlap with 'a'")
def overlap(directory):
    header = {"a": info(offsets=(0, 8)), "b": info(offsets=(4, 12))}
    return write(directory, assemble(header, bytes(12)))


@case(r"tensor 'b': expected to begin at 8, got 0: an overlap with 'a'")
def same_bytes_twice(directory):
    return write(directory, assemble({"a": info(), "b": info()}, bytes(8)))


@case(r"tensor 'b': expected to begin at 8, got 12: a hole after 'a'")
def hole(directory):
    header = {"a": info(offsets=(0, 8)), "b": info(offsets=(12, 20))}
    return write(directory, assemble(header, bytes(20)))


@case(r"tensor 'a': expected to begin at 0, got 4: a hole after None")
def hole_at_the_start(directory):
    return one(directory, info(offsets=(4, 12)), bytes(12))


# --- versions and configuration ---------------------------------------------------------------------------------------


@case(r"expected an inq file, got plain safetensors without inq_format_version \(`inq quantize` makes one\)")
def plain_safetensors(directory):
    return one(directory, info(), bytes(8))


@case(r"inq_format_version: expected format version 2 at most, which inq_kernels 0.1.0 reads, got 3: a newer")
def newer_version(directory):
    file = File()
    file.metadata["inq_format_version"] = "3"
    return file.write(directory)


@case(r"format_version: expected format version 2 at most, which inq_kernels 0.1.0 reads, got 7: a newer")
def newer_version_in_config(directory):
    file = File()
    file.config["format_version"] = 7
    return file.write(directory)


@case(r"inq_format_version: expected an integer ≥ 1, got 0")
def version_zero(directory):
    file = File()
    file.metadata["inq_format_version"] = "0"
    return file.write(directory)


@case(r"inq_format_version: expected an integer ≥ 1, got 'one'")
def version_in_words(directory):
    file = File()
    file.metadata["inq_format_version"] = "one"
    return file.write(directory)


def configured(name, message, **changes):
    """A case whose configuration has other values; None removes the key."""

    def write_it(directory):
        file = File()
        for key, value in changes.items():
            file.config[key] = value
            if value is None:
                del file.config[key]
        return file.write(directory)

    write_it.__name__ = name
    case(message)(write_it)


configured("version_bool", r"format_version: expected an integer ≥ 1, got True", format_version=True)
configured("version_float", r"format_version: expected an integer ≥ 1, got 1.0", format_version=1.0)
configured("method_of_others", r"quant_method: expected 'inq', got 'gptq'", quant_method="gptq")
configured("bits_unknown", r"inq_config: Format: bits: expected one of \(2, 3, 4, 5\), got 6", bits=6)
configured("bits_bool", r"inq_config: Format: bits: expected an int, got True", bits=True)
configured("bits_float", r"inq_config: Format: bits: expected an int, got 4.0", bits=4.0)
configured("bits_missing", r"inq_config: Format: bits: expected an int, got None", bits=None)
configured("levels_unknown", r"inq_config: Format: levels: expected one of .*, got 'sparse'", levels="sparse")
configured("levels_long", r"inq_config: Format: levels: expected one of .*, got 'aaa.* … .*aaa'$", levels="a" * 10**6)
configured("levels_list", r"inq_config: Format: levels: expected one of .*, got \['paper'\]", levels=["paper"])
configured("granularity_unknown", r"Format: granularity: expected one of .*, got 'row'", exponent_granularity="row")
configured("rule_unknown", r"Format: exponent: expected one of .*, got 'min'", exponent_rule="min")
configured(
    "bits_of_others", r"tensor 'fc.weight': expected 5-bit paper.* of the configuration, got 4-bit paper", bits=5
)
configured("override_of_nothing", r"overrides: expected names of packed modules, got 'conv'", overrides={"conv": {}})
configured("override_a_number", r"overrides: expected an object of objects, got \{'fc': 4\}", overrides={"fc": 4})
configured("override_empty", r"overrides: 'fc': Format: bits: expected an int, got None", overrides={"fc": {}})
configured("ignore_packed", r"ignore: expected names of modules that are not packed, got 'fc'", ignore=["fc"])
configured("ignore_numbers", r"ignore: expected a list of names, got \[1\]", ignore=[1])


@case(r"inq_config: expected an object, got list")
def config_a_list(directory):
    file = File()
    file.config = []
    return file.write(directory)


@case(r"inq_config: expected JSON with unique keys, got 'bits' twice")
def config_with_duplicates(directory):
    file = File()
    content = file.bytes()
    file.metadata["inq_config"] = '{"bits":4,"bits":5}'
    assert content
    return write(directory, assemble(file.header, file.data))


@case(r"inq_config: expected in the header's metadata, got none: load the directory instead")
def shard_alone(directory):
    return write(directory, File().bytes(config=False))


# --- the manifest -----------------------------------------------------------------------------------------------------


@case(r"inq_manifest: expected sha256 '\w+', got '\w+'")
def manifest_changed(directory):
    file = File()
    file.bytes()
    file.metadata["inq_manifest"] = file.metadata["inq_manifest"].replace("[3, 10]", "[3, 16]")
    return write(directory, assemble(file.header, file.data))


@case(r"inq_manifest: expected sha256 None, got")
def manifest_unsigned(directory):
    file = File()
    file.bytes()
    del file.metadata["inq_manifest_sha256"]
    return write(directory, assemble(file.header, file.data))


@case(r"inq_manifest: expected JSON, got text that is not")
def manifest_missing(directory):
    file = File()
    file.bytes()
    del file.metadata["inq_manifest"]
    file.metadata["inq_manifest_sha256"] = hashlib.sha256().hexdigest()
    return write(directory, assemble(file.header, file.data))


@case(r"inq_manifest: expected an object, got list")
def manifest_a_list(directory):
    file = File()
    file.manifest = []
    return file.write(directory)


@case(r"inq_manifest: expected one entry a tensor, missing 'fc.bias'; got besides none")
def manifest_without_a_tensor(directory):
    file = File()
    del file.manifest["fc.bias"]
    return file.write(directory)


@case(r"inq_manifest: expected one entry a tensor, missing none; got besides 'ghost'")
def manifest_with_a_ghost(directory):
    file = File()
    file.manifest["ghost"] = dict(file.manifest["fc.bias"])
    return file.write(directory)


def lying(name, message, tensor, reads=False, **changes):
    """A case whose manifest has other values for a tensor, correctly signed; None removes the key."""

    def write_it(directory):
        file = File()
        for key, value in changes.items():
            file.manifest[tensor][key] = value
            if value is None:
                del file.manifest[tensor][key]
        return file.write(directory)

    write_it.__name__ = name
    case(message, reads)(write_it)


lying("checksum_wrong", r"tensor 'fc.bias': expected sha256 0000.*: damaged data", "fc.bias", reads=True,
      sha256="0" * 64)  # fmt: skip
lying("checksum_short", r"'fc.bias': sha256: expected 64 hexadecimal digits, got 'ab'", "fc.bias", sha256="ab")
lying("checksum_null", r"'fc.bias': expected the keys of a plain or of a packed tensor", "fc.bias", sha256=None)
lying("dtype_lie", r"'norm.weight': expected torch.int32 \[2, 3\] of the manifest, got torch.float32", "norm.weight",
      dtype="int32")  # fmt: skip
lying("dtype_of_nothing", r"'fc.bias': dtype: expected a known dtype, got 'float31'", "fc.bias", dtype="float31")
lying("packed_dtype_int", r"'fc.weight': dtype: expected a known float dtype, got 'int8'", "fc.weight", dtype="int8")
lying("shape_lie", r"'norm.weight': expected torch.float32 \[3, 2\] of the manifest, got .* \[2, 3\]", "norm.weight",
      shape=[3, 2])  # fmt: skip
lying("logical_shape_lie", r"'fc.weight': expected torch.uint8 \[3, 12\] for a weight of shape \[3, 17\]", "fc.weight",
      shape=[3, 17])  # fmt: skip
lying("logical_rows_lie", r"'fc.weight': expected torch.uint8 \[6, 4\] for a weight of shape \[6, 5\]", "fc.weight",
      shape=[6, 5])  # fmt: skip
lying("logical_shape_terabytes", r"'fc.weight': expected torch.uint8 \[3, 137438953472\]", "fc.weight",
      shape=[3, 1 << 38])  # fmt: skip
lying("logical_shape_bool", r"'fc.weight': shape: expected .* integers .*, got \[True, 10\]", "fc.weight",
      shape=[True, 10])  # fmt: skip
lying("logical_shape_empty", r"'fc.weight': shape: expected rank ≥ 1 and no 0, got \[\]", "fc.weight", shape=[])
lying("logical_shape_zero", r"'fc.weight': shape: expected rank ≥ 1 and no 0, got \[3, 0\]", "fc.weight", shape=[3, 0])
lying("manifest_bits_bool", r"'fc.weight': Format: bits: expected an int, got True", "fc.weight", bits=True)
lying("manifest_bits_lie", r"'fc.weight': expected torch.uint8 \[3, 10\] .* 5-bit paper.*, got torch.uint8 \[3, 8\]",
      "fc.weight", bits=5)  # fmt: skip
lying("manifest_levels_lie", r"'fc.weight': expected 4-bit paper.* of the configuration, got 4-bit dense", "fc.weight",
      levels="dense")  # fmt: skip
lying("range_lie", r"'fc.weight': exponent_range: expected \[-1, 0\] of the manifest, got \[0, 0\]", "fc.weight",
      reads=True, exponent_range=[-1, 0])  # fmt: skip
lying("range_swapped", r"exponent_range: expected \[least, largest\] within .*, got \[1, 0\]", "fc.weight",
      exponent_range=[1, 0])  # fmt: skip
lying("range_bool", r"exponent_range: expected \[least, largest\] within .*, got \[False, False\]", "fc.weight",
      exponent_range=[False, False])  # fmt: skip
lying("range_128", r"exponent_range: expected \[least, largest\] within \[-126, 127\], got \[0, 128\]", "fc.weight",
      exponent_range=[0, 128])  # fmt: skip
lying("manifest_with_more", r"'fc.weight': expected the keys of a plain or of a packed tensor", "fc.weight", zeros=0.5)


@case(r"tensor 'fc.weight': expected its format in the manifest, since weight_exp is there, got none")
def format_hidden(directory):
    file = File()
    entry = file.manifest["fc.weight"]
    file.manifest["fc.weight"] = {"sha256": entry["sha256"], "dtype": "uint8", "shape": [3, 8]}
    return file.write(directory)


@case(r"expected at least one packed weight, got none")
def nothing_packed(directory):
    file = File()
    entry = file.manifest["fc.weight"]
    file.manifest["fc.weight"] = {"sha256": entry["sha256"], "dtype": "uint8", "shape": [3, 8]}
    file.header["other"] = file.header.pop("fc.weight_exp")
    file.manifest["other"] = file.manifest.pop("fc.weight_exp")
    return file.write(directory)


@case(r"tensor 'fc.weight': expected its exponents 'fc.weight_exp' in the checkpoint, got none")
def exponents_missing(directory):
    file = File()
    file.header["other"] = file.header.pop("fc.weight_exp")
    file.manifest["other"] = file.manifest.pop("fc.weight_exp")
    return file.write(directory)


@case(r"tensor 'fc.weight_exp': expected torch.int8 \[3, 1\] .*, got torch.uint8 \[3, 1\]")
def exponents_unsigned(directory):
    file = File()
    file.header["fc.weight_exp"]["dtype"] = "U8"
    file.manifest["fc.weight_exp"]["dtype"] = "uint8"
    return file.write(directory)


@case(r"tensor 'fc.weight_scale': expected torch.float32 \[3, 1\] .*, got torch.float32 \[1, 3\]")
def scale_across(directory):
    file = File()
    file.header["fc.weight_scale"]["shape"] = [1, 3]
    file.manifest["fc.weight_scale"]["shape"] = [1, 3]
    return file.write(directory)


@case(r"tensor 'fc.bias': expected a packed weight's name to end in 'weight'")
def packed_bias(directory):
    file = File()
    file.manifest["fc.bias"] = file.manifest["fc.weight"] | {"shape": [3, 1]}
    return file.write(directory)


# --- the data of packed weights, correctly signed ---------------------------------------------------------------------


@case(r"tensor 'fc.weight': expected canonical codes of 4-bit paper.* and zero padding, got 1 that are not", reads=True)
def reserved_code(directory):
    file = File()
    file.tensor("fc.weight")[0] |= 0x02  # the first code, a zero: an index without the nonzero flag
    return file.sign().write(directory)


@case(r"tensor 'fc.weight': expected canonical codes .*, got 1 that are not", reads=True)
def negative_zero(directory):
    file = File()
    file.tensor("fc.weight")[0] |= 0x08
    return file.sign().write(directory)


@case(r"tensor 'fc.weight': expected canonical codes .* and zero padding, got 1 that are not", reads=True)
def padding_not_zero(directory):
    file = File()
    file.tensor("fc.weight")[7] = 0x70  # the last of codes 10 to 15, which K = 10 does not have
    return file.sign().write(directory)


@case(r"tensor 'fc.weight': expected canonical codes .*, got [1-9]\d* that are not", reads=True)
def level_under_the_least(directory):
    file = File()
    file.tensor("fc.weight_exp")[:] = b"\x82\x82\x82"  # −126: the smaller levels would be subnormal
    file.manifest["fc.weight"]["exponent_range"] = [-126, -126]
    return file.sign().write(directory)


def exponent(name, byte, value):
    def write_it(directory):
        file = File()
        file.tensor("fc.weight_exp")[1:2] = bytes([byte])
        return file.sign().write(directory)

    write_it.__name__ = name
    case(rf"'fc.weight_exp': expected exponents in \[-126, 127\], got \[{value}, 0\]", reads=True)(write_it)


exponent("exponent_minus_128", 0x80, -128)
exponent("exponent_minus_127", 0x81, -127)


@case(r"'fc.weight_exp': expected exponents in \[-24, 15\], got \[16, 16\]", reads=True)
def exponent_too_large_for_float16(directory):
    file = File()
    file.tensor("fc.weight_exp")[:] = bytes([16] * 3)
    file.manifest["fc.weight"] |= {"exponent_range": [16, 16], "dtype": "float16"}
    return file.sign().write(directory)


def bad_scale(name, value):
    def write_it(directory):
        file = File()
        file.tensor("fc.weight_scale")[4:8] = struct.pack("<f", value)
        return file.sign().write(directory)

    write_it.__name__ = name
    case(r"'fc.weight_scale': expected finite row scales, got 1 of 3 that are not", reads=True)(write_it)


bad_scale("scale_nan", float("nan"))
bad_scale("scale_inf", float("inf"))


@case(r"tensor 'norm.weight': expected sha256 \w+, got \w+: damaged data", reads=True)
def flipped_bit(directory):
    file = File()
    file.tensor("norm.weight")[5] ^= 1
    return file.write(directory)


# --- directories ------------------------------------------------------------------------------------------------------


@case(r"expected model.safetensors or model.safetensors.index.json, got neither$")
def directory_empty(directory):
    path = directory / "model"
    path.mkdir()
    return path


@case(r"got neither \(pickles are never opened: 'pytorch_model.bin'\)")
def directory_with_bin_only(directory):
    path = directory / "model"
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"PK")
    (path / "inq.json").write_text(json.dumps(File().config))
    return path


@case(r"expected model.safetensors or model.safetensors.index.json, got both")
def directory_with_both(directory):
    path = sharded_directory(directory)
    (path / "model.safetensors").write_bytes(good_bytes())
    return path


@case(r"expected inq.json, or quantization_config in config.json, got neither: not an inq checkpoint")
def directory_without_config(directory):
    path = model_directory(directory)
    (path / "inq.json").unlink()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@case(r"inq.json: expected the same as .*config.json: quantization_config, got another configuration")
def configs_that_disagree(directory):
    path = model_directory(directory)
    (path / "config.json").write_text(json.dumps({"quantization_config": File().config | {"ignore": ["x"]}}))
    return path


@case(r"expected inq.json, or quantization_config in config.json, got neither: not an inq checkpoint")
def config_null(directory):
    path = model_directory(directory)
    (path / "inq.json").rename(path / "config.json")
    (path / "config.json").write_text('{"quantization_config": null}')
    return path


@case(r"inq.json: expected a regular file, got a directory")
def config_a_directory(directory):
    path = model_directory(directory)
    (path / "inq.json").unlink()
    (path / "inq.json").mkdir()
    return path


@case(r"inq.json: expected a JSON file of at most 16777216 bytes, got 1099511627776")
def config_of_a_terabyte(directory):
    path = model_directory(directory)
    os.truncate(path / "inq.json", 1 << 40)
    return path


@case(r"inq.json: expected JSON without NaN and Infinity, got Infinity")
def config_with_infinity(directory):
    path = model_directory(directory)
    (path / "inq.json").write_text(json.dumps(File().config | {"x": float("inf")}))
    return path


def outside(directory, path, name):
    """Replace a file of a checkpoint by a link to it, outside of the checkpoint."""
    (path / name).rename(directory / name)
    (path / name).symlink_to(directory / name)
    return path


@case(r"model.safetensors: expected a file inside .*, got a link to")
def model_linked_out(directory):
    return outside(directory, model_directory(directory), "model.safetensors")


@case(r"inq.json: expected a file inside .*, got a link to")
def config_linked_out(directory):
    return outside(directory, model_directory(directory), "inq.json")


@case(r"config.json: expected a file inside .*, got a link to")
def transformers_config_linked_out(directory):
    path = model_directory(directory)
    (path / "config.json").write_text("{}")
    return outside(directory, path, "config.json")


@case(r"index.json: expected a file inside .*, got a link to")
def index_linked_out(directory):
    return outside(directory, sharded_directory(directory), "model.safetensors.index.json")


@case(r"b.safetensors: expected a file inside .*, got a link to")
def shard_linked_out(directory):
    return outside(directory, sharded_directory(directory), "b.safetensors")


def indexed(name, message, change):
    def write_it(directory):
        return sharded_directory(directory, change)

    write_it.__name__ = name
    case(message)(write_it)


def _to(file):
    return lambda weight_map: weight_map | {"steps": file}


_BASE = r"index.json: tensor 'steps': expected the base name of a .safetensors file, got "
indexed("index_traversal", _BASE + r"'../b.safetensors'", _to("../b.safetensors"))
indexed("index_absolute", _BASE + r"'/etc/b.safetensors'", _to("/etc/b.safetensors"))
indexed("index_subdirectory", _BASE + r"'sub/b.safetensors'", _to("sub/b.safetensors"))
indexed("index_hidden", _BASE + r"'.b.safetensors'", _to(".b.safetensors"))
indexed("index_bin", _BASE + r"'pytorch_model.bin'", _to("pytorch_model.bin"))
indexed("index_number", _BASE + r"'1'", _to(1))
indexed("index_nul", _BASE, _to("b\0.safetensors"))
indexed("index_empty", r"index.json: weight_map: expected an object from tensor to file", lambda weight_map: {})
indexed("index_list", r"index.json: weight_map: expected an object from tensor to file", lambda weight_map: ["a"])
indexed("shard_missing", r"c.safetensors: expected a file, got No such file",
        lambda weight_map: {k: v.replace("b.", "c.") for k, v in weight_map.items()})  # fmt: skip
indexed("tensor_in_another_shard", r"a.safetensors: expected the tensors that .* names, missing 'steps'",
        _to("a.safetensors"))  # fmt: skip
indexed("tensor_not_in_index", r"b.safetensors: expected the tensors that .* names, missing none; got besides 'steps'",
        lambda weight_map: {k: v for k, v in weight_map.items() if k != "steps"})  # fmt: skip
indexed("tensor_only_in_index", r"b.safetensors: expected the tensors that .* names, missing 'ghost'",
        lambda weight_map: weight_map | {"ghost": "b.safetensors"})  # fmt: skip


@case(r"index.json: expected JSON with unique keys, got 'steps' twice")
def index_with_duplicates(directory):
    path = sharded_directory(directory)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"steps": "a", "steps": "b"}}')
    return path


@case(r"index.json: weight_map: expected an object from tensor to file")
def index_a_list(directory):
    path = sharded_directory(directory)
    (path / "model.safetensors.index.json").write_text("[]")
    return path
