"""Structure-aware mutation: a file is taken apart, a part of it is spoiled, and it is put together and signed again.

Almost every change of raw bytes ends at a checksum. What a forger would do is further on: change a length, a dtype, a
name, a code, an exponent or the manifest, and compute the checksums anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# What of the metadata is JSON once more, and what is the SHA-256 of which text.
PLACES = "DCP_SHARDING_INFO"  # where the tensors of a sharded checkpoint's file belong
NESTED = ("inq_manifest", "inq_config", "inq_training", "inq_checksums", PLACES)
DIGESTS = {"inq_manifest": "inq_manifest_sha256", "inq_training": "inq_training_sha256"}
TRAINING_INDEX = "inq_training.json"
# Of the files in a directory; an input has their numbers: add at the end.
FILES = (
    "model.safetensors", "inq.json", "config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors",
    TRAINING_INDEX, "rank-00000.json", "rank-00001.json", "shard-00001-model-00001-of-00001.safetensors",
    "shard-00002-model-00001-of-00001.safetensors",
)  # fmt: skip

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "F4", "", "U16")
NAMES = (
    "weight",
    "a.weight",
    "fc.weight",
    "fc.weight_exp",
    "fc.weight_scale",
    "fc.bias",
    "../x",
    "",
    "a\nb",
    "é",
    "t.0",
    "fc.weight_packed",
    "rank.0.0",
)
NUMBERS = (
    0, 1, -1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 24, 127, 128, -127, -128, 255, 256, 1 << 31, 1 << 48, (1 << 48) + 1,
    (1 << 63) - 1, 1 << 63, -(1 << 63), -(1 << 63) - 1, 10**30, 0.0, -0.0, 0.5, 1.0, 2.0, -1.5, 1e308, 1e-320,
    float("inf"), float("nan"),
)  # fmt: skip
WORDS = (
    "paper", "dense", "max", "mse", "tensor", "channel", "inq", "float32", "bfloat16", "float16", "float8_e4m3fn",
    "uint8", "magnitude", "random", "SGD", "step", "state_dict", "optimizer", "params", "x" * 600, "0", "1", "nan",
    "\ud800", "\0", "٣", "group", "float", "mxfp4-pack-quantized", "float-quantized", "naive-quantized",
    *NAMES, *DTYPES,
)  # fmt: skip
KINDS = ("$tensor", "$tuple", "$items", "$counter", "$float", "$pickle")


@dataclass
class Parts:
    """A safetensors file taken apart: the header's entries and metadata, the JSON inside of those, and the data."""

    entries: dict
    metadata: dict
    data: bytearray
    nested: dict = field(default_factory=dict)

    def tensor(self, name: str) -> slice | None:
        """Where a tensor's bytes are, if its entry says it in a way that makes sense."""
        entry = self.entries.get(name)
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(v) is int for v in offsets):
            return None
        begin, end = offsets
        return slice(begin, end) if 0 <= begin <= end <= len(self.data) else None


def take_apart(content: bytes) -> Parts | None:
    """None if there is nothing to take apart."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        nested = {key: json.loads(metadata[key]) for key in NESTED if key in metadata}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
    return Parts(header, metadata, bytearray(content[8 + length :]), nested) if isinstance(metadata, dict) else None


def put_together(parts: Parts, signed: bool = True) -> bytes:
    """The bytes of a file; ``signed``: with the checksums that fit."""
    if signed:
        for key, entries in (("inq_manifest", parts.nested.get("inq_manifest")), ("inq_checksums", None)):
            entries = parts.nested.get(key) if entries is None else entries
            for name in entries if isinstance(entries, dict) else ():
                if (where := parts.tensor(name)) is not None:
                    digest = hashlib.sha256(parts.data[where]).hexdigest()
                    if key == "inq_checksums":
                        entries[name] = digest
                    elif isinstance(entries[name], dict):
                        entries[name]["sha256"] = digest
    for key, value in parts.nested.items():
        parts.metadata[key] = json.dumps(value)
        if signed and key in DIGESTS:
            parts.metadata[DIGESTS[key]] = hashlib.sha256(parts.metadata[key].encode()).hexdigest()
    header = {"__metadata__": parts.metadata, **parts.entries} if parts.metadata else parts.entries
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(parts.data)


# --- one value --------------------------------------------------------------------------------------------------------


def value(rng: random.Random) -> object:
    """Something that may not belong where it is put."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(WORDS)
    if kind == 5:
        return rng.choice((None, True, False, [], {}, [[]], [0], [1, 2], {"a": 1}))
    if kind == 6:
        return {rng.choice(KINDS): rng.choice(("t.0", "t.1", [], [1, [2]], [[1, 2]], [["a", []], ["a", 1]], "inf", 1))}
    nested: object = []
    for _ in range(rng.choice((2, 17, 70, 300, 450))):
        nested = [nested]
    return nested


def spoil_key(table: dict, names: Sequence[str], rng: random.Random) -> None:
    """A key of ``table`` gone, or its value under another of ``names`` as well, or two values swapped."""
    key, other = rng.choice(list(table)), rng.choice(list(table))
    kind = rng.randrange(3)
    if kind == 0:
        del table[key]
    elif kind == 1:
        table[rng.choice(names)] = table[key]
    else:
        table[key], table[other] = table[other], table[key]


def spoil(node: object, rng: random.Random) -> object:
    """Change something in a JSON value, in place where it is a container; what it is then."""
    if isinstance(node, dict) and node:
        key = rng.choice(list(node))
        if rng.random() < 0.7:
            node[key] = spoil(node[key], rng)
            return node
        if rng.random() < 0.75:
            spoil_key(node, WORDS, rng)
        else:
            node[key] = value(rng)
        return node
    if isinstance(node, list) and node:
        index = rng.randrange(len(node))
        if rng.random() < 0.6:
            node[index] = spoil(node[index], rng)
            return node
        kind = rng.randrange(4)
        if kind == 0:
            del node[index]
        elif kind == 1:
            node.insert(index, node[index])
        elif kind == 2:
            node.append(value(rng))
        else:
            node[index] = value(rng)
        return node
    if type(node) is int and rng.random() < 0.5:
        return rng.choice((node + 1, node - 1, -node, node * 2, node ^ (1 << rng.randrange(64))))
    if isinstance(node, str) and node and rng.random() < 0.3:
        at = rng.randrange(len(node))
        return node[:at] + rng.choice(("", "0", "\\", '"', "é", "\0", node)) + node[at + 1 :]
    return value(rng)


# --- the parts of a file ----------------------------------------------------------------------------------------------


def spoil_data(parts: Parts, rng: random.Random) -> None:
    """Codes, exponents, scales, values."""
    where = parts.tensor(rng.choice(list(parts.entries))) if parts.entries else None
    if where is None or where.start == where.stop:
        where = slice(0, len(parts.data))
    size = where.stop - where.start
    if size == 0:
        parts.data += bytes(rng.randrange(9))
    elif rng.random() < 0.2:
        patterns = (b"\0", b"\xff", b"\x80", b"\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\x11")
        parts.data[where] = (rng.choice(patterns) * size)[:size]
    else:
        for _ in range(rng.randrange(1, 5)):
            parts.data[where.start + rng.randrange(size)] = rng.randrange(256)


def spoil_exponents(parts: Parts, rng: random.Random) -> None:
    """Other exponents, of which the manifest tells the truth."""
    names = [name for name in parts.entries if name.endswith("weight_exp")]
    manifest = parts.nested.get("inq_manifest")
    where = parts.tensor(rng.choice(names)) if names else None
    if where is None or where.start == where.stop or not isinstance(manifest, dict):
        return spoil_data(parts, rng)
    low = rng.randrange(-128, 128)
    new = [max(-128, min(127, low + rng.randrange(4))) for _ in range(where.stop - where.start)]
    parts.data[where] = struct.pack(f"{len(new)}b", *new)
    for entry in manifest.values():
        if isinstance(entry, dict) and "exponent_range" in entry:
            entry["exponent_range"] = [min(new), max(new)]
    return None


def spoil_entry(parts: Parts, rng: random.Random) -> None:
    """A tensor's dtype, shape or place in the header."""
    if not parts.entries:
        parts.entries["weight"] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
        return
    name = rng.choice(list(parts.entries))
    entry = parts.entries[name]
    if not isinstance(entry, dict):
        parts.entries[name] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    elif rng.random() < 0.4:
        entry["dtype"] = rng.choice(DTYPES)
    else:
        key = rng.choice(("shape", "data_offsets", "dtype"))
        entry[key] = spoil(entry.get(key), rng)


def resize(parts: Parts, rng: random.Random) -> None:
    """Another number of bytes for one tensor, with all offsets after it moved, and its shape as U8 where asked for."""
    if not parts.entries:
        return
    name = rng.choice(list(parts.entries))
    where = parts.tensor(name)
    if where is None:
        return
    size = where.stop - where.start
    new = max(0, size + rng.choice((-size, -8, -4, -1, 1, 4, 8, size)))
    parts.data[where] = (bytes(parts.data[where]) * 2)[:new].ljust(new, b"\0")
    for other in parts.entries:
        span = parts.tensor(other) if other != name else None
        if span is not None and span.start >= where.stop:
            parts.entries[other]["data_offsets"] = [span.start + new - size, span.stop + new - size]
    entry = parts.entries[name]
    entry["data_offsets"] = [where.start, where.start + new]
    shape = entry.get("shape")
    if isinstance(shape, list) and shape and size and new % size == 0:
        shape[0] = shape[0] * new // size if type(shape[0]) is int else 1
    elif rng.random() < 0.7:
        entry["dtype"], entry["shape"] = "U8", [new]
    manifest = parts.nested.get("inq_manifest")
    if isinstance(manifest, dict) and isinstance(manifest.get(name), dict) and rng.random() < 0.7:
        manifest[name]["shape"] = entry.get("shape")


def rename(parts: Parts, rng: random.Random) -> None:
    """A tensor with another name, in the manifest too, or gone, or twice."""
    if not parts.entries:
        return
    name, new = rng.choice(list(parts.entries)), rng.choice((*NAMES, "fc.weight_exp", "norm.weight", "x.weight"))
    kind = rng.randrange(3)
    for table in (parts.entries, parts.nested.get("inq_manifest"), parts.nested.get("inq_checksums")):
        if not isinstance(table, dict) or name not in table:
            continue
        if kind != 1:
            table[new] = table[name]
        if kind != 2:
            del table[name]
    if kind == 1:
        close_holes(parts)


def close_holes(parts: Parts) -> None:
    """The data of the tensors that are there, one after the other."""
    data = bytearray()
    for name, entry in parts.entries.items():
        if (where := parts.tensor(name)) is not None:
            entry["data_offsets"] = [len(data), len(data) + where.stop - where.start]
            data += parts.data[where]
    parts.data = data


def swap_places(parts: Parts, rng: random.Random) -> None:
    """Two tensors' offsets, or shapes and dtypes."""
    names = [name for name, entry in parts.entries.items() if isinstance(entry, dict)]
    if len(names) < 2:
        return
    a, b = (parts.entries[name] for name in rng.sample(names, 2))
    for key in rng.choice((("data_offsets",), ("shape", "data_offsets"), ("dtype", "shape", "data_offsets"))):
        a[key], b[key] = b.get(key), a.get(key)


def spoil_nested(parts: Parts, rng: random.Random) -> None:
    """The manifest, the configuration or a training state."""
    if not parts.nested:
        return spoil_metadata(parts, rng)
    key = rng.choice(list(parts.nested))
    parts.nested[key] = spoil(parts.nested[key], rng)
    return None


def spoil_metadata(parts: Parts, rng: random.Random) -> None:
    if parts.metadata and rng.random() < 0.6:
        key = rng.choice(list(parts.metadata))
        parts.nested.pop(key, None)
        parts.metadata[key] = spoil(parts.metadata[key], rng)
    else:
        spoil(parts.metadata, rng)
        parts.nested = {key: value for key, value in parts.nested.items() if key in parts.metadata}


def spoil_format(parts: Parts, rng: random.Random) -> None:
    """Another format, in manifest and configuration alike."""
    change = {
        "bits": rng.choice((2, 3, 4, 5, 5, 4, 1, 6, 8)),
        "levels": rng.choice(("paper", "dense", "dense", "other")),
        "exponent_granularity": rng.choice(("tensor", "channel", "")),
        "exponent_rule": rng.choice(("max", "mse", 0)),
        "dtype": rng.choice(("float32", "float16", "bfloat16", "float64", "int8")),
        "format_version": rng.choice((1, 2, 0, "1")),
    }
    key = rng.choice(list(change))
    manifest, config = parts.nested.get("inq_manifest"), parts.nested.get("inq_config")
    for table in (config, *(manifest.values() if isinstance(manifest, dict) else ())):
        if isinstance(table, dict) and key in table:
            table[key] = change[key]


OPERATIONS: tuple[Callable[[Parts, random.Random], object], ...] = (
    spoil_data, spoil_data, spoil_exponents, spoil_entry, resize, rename, swap_places, spoil_nested, spoil_nested,
    spoil_nested, spoil_metadata, spoil_format,
)  # fmt: skip


def spoil_text(content: bytes, rng: random.Random) -> bytes:
    """The header as text: keys twice, deep nesting, long numbers, another length."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        return struct.pack("<Q", max(0, length + rng.choice((-1, 1, -8, 8, 1 << 24, 1 << 40)))) + text + data
    at = rng.randrange(1, len(text)) if len(text) > 1 else 0
    if kind == 1:
        at = text.find(b",", at) + 1
        pieces = (b'"a":1,', b'"fc.weight":{},"fc.weight":{},', b'"__metadata__":{},', b"\n \t", b'"\\ud800":0,')
        text = text[:at] + rng.choice(pieces) + text[at:]
    elif kind == 2:
        depth = rng.choice((10, 100, 1000, 4000))
        text = (
            text[:-1]
            + b',"x":'
            + rng.choice((b"[" * depth + b"]" * depth, b'{"x":' * depth + b"0" + b"}" * depth))
            + b"}"
        )
    elif kind == 3:
        pieces = (b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"1.0", b"true", b"null", b"\xff", b"\xef\xbb\xbf")
        text = text[:at] + rng.choice(pieces) + text[at + 1 :]
    elif kind == 4:
        text = text[:at]
    else:
        text += b" " * rng.randrange(1, 9)
    return struct.pack("<Q", len(text)) + text + data


def spoil_file(content: bytes, rng: random.Random) -> bytes | None:
    """A file with one or a few of its parts spoiled; None if it cannot be taken apart."""
    parts = take_apart(content)
    if parts is None:
        return None
    if rng.random() < 0.12:
        return spoil_text(content, rng)
    while True:
        rng.choice(OPERATIONS)(parts, rng)
        if rng.random() < 0.65:
            break
    return put_together(parts, signed=rng.random() < 0.95)


# --- directories ------------------------------------------------------------------------------------------------------


def read_files(content: bytes) -> dict[str, bytes]:
    """The files of a directory in an input: for each the number of its name, its length in four bytes, its bytes."""
    files, at = {}, 0
    while at + 5 <= len(content):
        length = int.from_bytes(content[at + 1 : at + 5], "little")
        files[FILES[content[at] % len(FILES)]] = content[at + 5 : at + 5 + length]
        at += 5 + length
    return files


def write_files(files: dict[str, bytes]) -> bytes:
    """The inverse of ``read_files``."""
    return b"".join(struct.pack("<BI", FILES.index(name), len(data)) + data for name, data in files.items())


def spoil_directory(content: bytes, rng: random.Random) -> bytes | None:
    files = read_files(content)
    if not files:
        return None
    name = rng.choice(list(files))
    if rng.random() < 0.3:
        spoil_key(files, FILES, rng)
    elif name == TRAINING_INDEX:
        spoiled = spoil_index(files, rng)
        if spoiled is None:
            return None
        files[name] = spoiled
    elif name.endswith(".json"):
        try:
            files[name] = json.dumps(spoil(json.loads(files[name]), rng)).encode()
        except (ValueError, RecursionError):
            return None
    else:
        spoiled = spoil_file(files[name], rng)
        if spoiled is None:
            return None
        files[name] = spoiled
    if TRAINING_INDEX in files and rng.random() < 0.95:
        sign_index(files)
    return write_files(files)


# --- the index of a sharded training checkpoint -----------------------------------------------------------------------


def open_index(files: dict[str, bytes]) -> tuple[dict, dict] | None:
    """The index and what is in it, which is JSON once more; None if it is not that."""
    try:
        index = json.loads(files[TRAINING_INDEX])
        content = json.loads(index["content"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return (index, content) if isinstance(index, dict) and isinstance(content, dict) else None


def close_index(index: dict, content: object) -> bytes:
    index["content"] = json.dumps(content)
    index["sha256"] = hashlib.sha256(index["content"].encode()).hexdigest()
    return json.dumps(index).encode()


def sign_index(files: dict[str, bytes]) -> None:
    """The checksums that the index has of the other files, and that of its content, as they should be."""
    if (opened := open_index(files)) is None:
        return
    known = opened[1].get("files")
    for name in known if isinstance(known, dict) else ():
        if name in files:
            known[name] = hashlib.sha256(files[name]).hexdigest()
    files[TRAINING_INDEX] = close_index(*opened)


def spoil_index(files: dict[str, bytes], rng: random.Random) -> bytes | None:
    """What the index says of the tensors, of the files, or of the state; or, less often, the index itself."""
    if (opened := open_index(files)) is None:
        return None
    index, content = opened
    kind = rng.randrange(8)
    if kind == 0:
        return json.dumps(spoil(index, rng)).encode()
    if kind == 1 and isinstance(content.get("tensors"), dict) and content["tensors"]:
        retype(files, content["tensors"], rng)
    else:
        content = spoil(content, rng)
    return close_index(index, content)


_SAME_SIZE = (("F64", "I64"), ("F32", "I32"), ("F16", "BF16", "I16"), ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"))


def retype(files: dict[str, bytes], tensors: dict, rng: random.Random) -> None:
    """Another dtype or shape of one tensor, of which index and files say the same."""
    name = rng.choice(list(tensors))
    if not isinstance(tensors[name], list) or len(tensors[name]) != 2 or not isinstance(tensors[name][1], list):
        return
    old, shape = tensors[name]
    dtype = rng.choice(next((group for group in _SAME_SIZE if old in group), DTYPES))
    flat = rng.random() < 0.5 and len(shape) > 1
    for file in files:
        if not file.endswith(".safetensors") or (parts := take_apart(files[file])) is None:
            continue
        entry, places = parts.entries.get(name), parts.nested.get(PLACES)
        if not isinstance(entry, dict) or not isinstance(places, dict):
            continue
        entry["dtype"] = dtype
        if flat:
            # Right for a part of whole rows.
            columns = _product(shape[1:])
            entry["shape"] = [_product(entry.get("shape"))]
            begin = places[name].get("saved_offsets") if isinstance(places.get(name), dict) else None
            places[name] = {"saved_offsets": [_product(begin[:1] if isinstance(begin, list) else None) * columns]}
        files[file] = put_together(parts)
    tensors[name] = [dtype, [_product(shape)] if flat else shape]


def _product(numbers: object) -> int:
    """Of a list of ints; 1 if it is anything else."""
    plain = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    return math.prod(numbers) if plain else 1


def mutate(
    data: bytes, limit: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes], directories: set[int]
) -> bytes:
    """Another input from ``data``, of at most ``limit`` bytes; the same for the same seed.

    Args:
        data: the target's number, then a file, or the files of a directory.
        mutate_bytes: what changes bytes without knowing what they are.
        directories: the targets that read a directory.
    """
    rng = random.Random(seed)
    if len(data) > 9 and rng.random() < 0.9:
        spoil_it = spoil_directory if data[0] in directories else spoil_file
        try:
            spoiled = spoil_it(data[1:], rng)
        except (RecursionError, ValueError):  # nested too deeply, or too long a number, for Python's own JSON
            spoiled = None
        if spoiled is not None and len(spoiled) < limit:
            return data[:1] + spoiled
    # The target stays: its files would be refused at once by most of the others.
    return data[:1] + mutate_bytes(data[1:], limit - 1) if data else mutate_bytes(data, limit)
