"""Malformed entropy-coded checkpoints, as malformed.py has packed ones: what a coding may promise and what its streams
may hold. Streams are written with zstandard itself, so that they can hold anything."""

import hashlib
import zlib
from functools import cache

import malformed
import torch
import zstandard

import inq_kernels as inq
from inq_kernels import reference

CASES, case = malformed.registry()


# --- a good file, and how to take its streams apart -------------------------------------------------------------------


def good_entries():
    """Weights whose rows end inside a group of eight: "a" of 3 bits without zeros taken out, "m" of 4 bits with them
    taken out once and "s" twice; "five" of 5 bits; and a bias that is not packed."""
    entries = {}
    for name, bits, shape, zeros in (("a", 3, (15, 203), 0.2), ("m", 4, (32, 201), 0.8), ("s", 4, (65, 203), 0.97),
                                     ("five", 5, (32, 64), 0.0)):  # fmt: skip
        g = torch.Generator().manual_seed(bits)
        fmt = inq.Format(bits)
        w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) >= zeros)
        entries[f"{name}.weight"] = inq.pack(inq.quantize(w, fmt), fmt)
    return entries | {"a.bias": torch.arange(15.0)}


@cache
def good_bytes():
    return malformed.written(good_entries(), compress=True)


def frame(symbols, **parameters):
    """One zstd frame."""
    made = zstandard.ZstdCompressionParameters(window_log=17, **parameters)
    return zstandard.ZstdCompressor(compression_params=made).compress(bytes(symbols))


def raw_frame(symbols, window=17, size=None, dictionary=None, last=True):
    """A frame of one block that is not coded, with a header as one likes: 2^``window`` bytes of window (None: as many
    as its content), what it says of its size, and the dictionary that it wants. ``last``: that no block follows."""
    descriptor = (0xC0 if size is not None else 0) | (0x20 if window is None else 0) | (dictionary is not None)
    header = bytes([descriptor]) + (b"" if window is None else bytes([(window - 10) << 3]))
    header += (b"" if dictionary is None else bytes([dictionary])) + (
        b"" if size is None else size.to_bytes(8, "little")
    )
    return b"\x28\xb5\x2f\xfd" + header + (last | len(symbols) << 3).to_bytes(3, "little") + bytes(symbols)


SKIPPED = b"\x50\x2a\x4d\x18\x05\0\0\0hello"  # a frame that decoders pass over


@cache
def bomb():
    """A gigabyte of zeros in 33 kilobytes."""
    block = b"\x02\x00\x10\x00"  # 128 KiB of one byte
    return b"\x28\xb5\x2f\xfd\x00\x38" + block * 8192 + b"\x03\x00\x10\x00"


class File(malformed.File):
    """A good compressed file, taken apart."""

    good = staticmethod(good_bytes)

    def coding(self, name):
        return self.manifest[f"{name}.weight"]["coding"]

    def streams(self, name):
        """The stored bytes of each stream."""
        data, at, found = bytes(self.tensor(f"{name}.weight")), 0, []
        for size in self.coding(name)["streams"]:
            found.append(data[at : at + size])
            at += size
        return found

    def symbols(self, name):
        """What each stream decodes to."""
        return [bytearray(zstandard.ZstdDecompressor().decompress(stream)) for stream in self.streams(name)]

    def put(self, name, streams, least=None):
        """Store other streams of a weight, correctly signed; zero bytes follow, up to ``least``: a 64th of it."""
        n, k = self.manifest[f"{name}.weight"]["shape"]
        row = (k + 7) // 8 * self.manifest[f"{name}.weight"]["bits"]
        self.store(name, b"".join(streams).ljust(-(-n * row // 64) if least is None else least, b"\0"))
        self.coding(name)["streams"] = [len(stream) for stream in streams]
        return self.sign()

    def store(self, name, content):
        """Other bytes as a weight's tensor."""
        tensors = {key: bytes(self.tensor(key)) for key in self.manifest}
        tensors[f"{name}.weight"] = content
        self.header[f"{name}.weight"]["shape"] = [len(content)]
        self.data = bytearray()
        for key in sorted(tensors, key=lambda key: self.header[key]["data_offsets"]):
            begin = len(self.data)
            self.data += tensors[key]
            self.header[key]["data_offsets"] = [begin, len(self.data)]
        return self.sign()


# --- what the manifest promises, seen before any tensor is read -------------------------------------------------------


def coded(name, message, weight="m", **changes):
    """A case whose coding has other values, correctly signed; None removes the key."""

    def write_it(directory):
        file = File()
        for key, value in changes.items():
            file.coding(weight)[key] = value
            if value is None:
                del file.coding(weight)[key]
        return file.write(directory)

    write_it.__name__ = name
    case(message)(write_it)


_EXACTLY = r"tensor 'm.weight': coding: expected exactly coder, sha256, streams, values, zeros, got "
coded("coding_without_coder", _EXACTLY + r"\['sha256', 'streams', 'values', 'zeros'\]", coder=None)
coded("coding_without_sha256", _EXACTLY + r"\['coder', 'streams', 'values', 'zeros'\]", sha256=None)
coded("coding_without_streams", _EXACTLY + r"\['coder', 'sha256', 'values', 'zeros'\]", streams=None)
coded("coding_with_more", _EXACTLY + r"\['coder', 'level', 'sha256', 'streams', 'values', 'zeros'\]", level=3)
coded("coder_of_another", r"coding: coder: expected 'zstd', got 'lzma'", coder="lzma")
coded("coder_a_number", r"coding: coder: expected 'zstd', got '1'", coder=1)
coded("coder_long", r"coding: coder: expected 'zstd', got 'x{80}'$", coder="x" * 5000)
coded("zeros_negative", r"coding: zeros: expected an integer in \[0, 3\], got -1", zeros=-1)
coded("zeros_four", r"coding: zeros: expected an integer in \[0, 3\], got 4", zeros=4)
coded("zeros_bool", r"coding: zeros: expected an integer in \[0, 3\], got True", zeros=True)
coded("zeros_float", r"coding: zeros: expected an integer in \[0, 3\], got 1.0", zeros=1.0)
coded("zeros_a_list", r"coding: zeros: expected an integer in \[0, 3\], got \[1\]", zeros=[1])
_VALUES = r"coding: values: expected ascending codes in \[1, 15\], got "
coded("values_a_number", _VALUES + "7", values=7)
coded("values_descending", _VALUES + r"\[7, 4\]", values=[7, 4])
coded("values_twice", _VALUES + r"\[4, 4\]", values=[4, 4])
coded("values_with_zero", _VALUES + r"\[0, 4\]", values=[0, 4])
coded("values_beyond_the_bits", _VALUES + r"\[4, 16\]", values=[4, 16])
coded("values_bool", _VALUES + r"\[True, 4\]", values=[True, 4])
coded("values_of_no_zeros", r"values: expected none, since no zeros are taken out, got \[4\]", weight="a", values=[4])
_STREAMS = r"coding: streams: expected the bytes of each of 2, got "
coded("streams_a_number", _STREAMS + "9", streams=9)
coded("streams_too_few", _STREAMS + r"\[9\]", streams=[9])
coded("streams_too_many", _STREAMS + r"\[9, 9, 9\]", streams=[9, 9, 9])
coded("streams_negative", _STREAMS + r"\[10, -1\]", streams=[10, -1])
coded("streams_bool", _STREAMS + r"\[9, True\]", streams=[9, True])
coded("streams_beyond", _STREAMS + r"\[9, 562949953421312\]", streams=[9, 1 << 49])
coded("streams_larger_than_the_tensor", r"tensor 'm.weight': expected torch.uint8 \[281474976710665\] .* in streams of "
      r"\[9, 281474976710656\] bytes, got", streams=[9, 1 << 48])  # fmt: skip
coded("streams_smaller_than_the_tensor", r"tensor 'm.weight': expected torch.uint8 \[60\] .* bytes, got",
      streams=[30, 30])  # fmt: skip
coded("decoded_checksum_short", r"coding: sha256: expected 64 hexadecimal digits, got 'ab'", sha256="ab")
coded("decoded_checksum_a_number", r"coding: sha256: expected 64 hexadecimal digits, got 1", sha256=1)


@case(r"tensor 'm.weight': coding: expected exactly .*, got list")
def coding_a_list(directory):
    file = File()
    file.manifest["m.weight"]["coding"] = []
    return file.write(directory)


@case(r"tensor 'm.weight': coding: expected exactly .*, got NoneType")
def coding_null(directory):
    file = File()
    file.manifest["m.weight"]["coding"] = None
    return file.write(directory)


@case(r"tensor 'a.bias': expected the keys of a plain or of a packed tensor, got \['coding'")
def coding_of_a_bias(directory):
    file = File()
    file.manifest["a.bias"]["coding"] = file.coding("a")
    return file.write(directory)


@case(r"tensor 'a.weight': expected torch.uint8 \[15, 78\] for a weight of shape .* 3-bit .*, got torch.uint8 \[\d+\]")
def coding_hidden(directory):
    file = File()
    del file.manifest["a.weight"]["coding"]
    return file.write(directory)


@case(r"tensor 'a.weight': expected no coding in format version 1, got one")
def coding_in_version_1(directory):
    file = File()
    file.metadata["inq_format_version"], file.config["format_version"] = "1", 1
    return file.write(directory)


@case(r"inq_format_version: expected format version 1 of .*inq_config, got 2")
def configuration_of_version_1(directory):
    file = File()
    file.config["format_version"] = 1
    return file.write(directory)


@case(r"inq_format_version: expected format version 2 of .*inq.json, got 1")
def directory_of_two_versions(directory):
    path = malformed.model_directory(directory)
    text = (path / "inq.json").read_text()
    (path / "inq.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    return path


@case(r"inq_format_version: expected format version 2 at most, which inq_kernels .* reads, got 3")
def compressed_of_a_newer_version(directory):
    file = File()
    file.metadata["inq_format_version"] = "3"
    return file.write(directory)


@case(r"tensor 'm.weight': expected torch.uint8 \[\d+\] .*, got torch.uint8 \[1, \d+\]")
def stored_of_two_dimensions(directory):
    file = File()
    file.header["m.weight"]["shape"].insert(0, 1)
    return file.write(directory)


@case(r"tensor 'm.weight': expected torch.uint8 \[\d+\] .*, got torch.int8 \[\d+\]")
def stored_signed(directory):
    file = File()
    file.header["m.weight"]["dtype"] = "I8"
    return file.write(directory)


@case(r"tensor 's.weight': expected torch.uint8 \[34896609280\] for a weight of shape \[65, 68719476736\] in 4-bit")
def bomb_of_shape(directory):
    """Terabytes of zeros, which a few bytes may code: more than 64 times what is stored, so refused unseen."""
    file = File()
    file.manifest["s.weight"]["shape"] = [65, 1 << 36]
    return file.write(directory)


@case(r"tensor 's.weight': expected torch.uint8 \[1064960\] for a weight of shape \[65, 2097152\]")
def bomb_just_over_the_ratio(directory):
    file = File()
    file.manifest["s.weight"]["shape"] = [65, 1 << 21]
    return file.put("s", file.streams("s"), (65 << 20) // 64 - 1).write(directory)


# --- what the streams hold, correctly signed --------------------------------------------------------------------------


def streamed(name, message, weight, change):
    """A case whose weight has the streams that ``change`` makes of the good file's symbols."""

    def write_it(directory):
        file = File()
        return file.put(weight, change(file.symbols(weight))).write(directory)

    write_it.__name__ = name
    case(message, reads=True)(write_it)


def only(change):
    """The first stream as ``change`` makes it of its symbols, the others as frames of theirs."""
    return lambda symbols: [change(symbols[0]), *map(frame, symbols[1:])]


def last(change):
    return lambda symbols: [*map(frame, symbols[:-1]), change(symbols[-1])]


def place(number):
    """Where the symbol of a number is among the 8 times 191 of "a", which are in another order."""
    return number % 8 * 191 + number // 8


def edited(at, value):
    """Symbols with another one, as a frame."""

    def change(symbols):
        symbols[at] = value(symbols[at])
        return frame(symbols)

    return change


def behind_the_codes(symbols):
    """The inner mask of "s", whose last byte now has a bit behind the last code."""
    there = symbols[0][-1] & 2
    return symbols[1][:-1] + bytes([symbols[1][-1] | 0x80]) if there else symbols[1] + b"\x80"


A = r"tensor 'a.weight': stream 0: "
_NO_FRAME = A + r"expected a zstd frame, got: "
streamed("stream_of_noise", _NO_FRAME + ".*Unknown frame descriptor", "a", only(lambda s: bytes(range(1, 200))))
streamed("stream_of_another_coder", _NO_FRAME + ".*Unknown frame descriptor", "a", only(lambda s: zlib.compress(s)))
streamed("stream_empty", A + "expected 1528 symbols, got 0", "a", only(lambda s: b""))
streamed("stream_cut_short", A + r"expected 1528 symbols, got \d+", "a", only(lambda s: frame(s)[:-5]))
streamed("stream_of_fewer", A + "expected 1528 symbols, got 1527", "a", only(lambda s: frame(s[:-1])))
streamed("stream_of_more", A + "expected 1528 symbols, got more", "a", only(lambda s: frame(s + b"\0")))
streamed("stream_with_a_frame_behind", A + "expected 1528 symbols, got more", "a",
         only(lambda s: frame(s) + frame(b"\1")))  # fmt: skip
streamed("stream_with_noise_behind", _NO_FRAME + ".*Unknown frame descriptor", "a",
         only(lambda s: frame(s) + b"some noise"))  # fmt: skip
_WHOLE = A + r"expected one zstd frame of \d+ bytes, got "
streamed("stream_without_its_end", _WHOLE + r"one of \d+, that needs more", "a",
         only(lambda s: raw_frame(s, last=False)))  # fmt: skip
streamed("stream_cut_in_its_checksum", _WHOLE + r"one of \d+, that needs more", "a",
         only(lambda s: frame(s, write_checksum=True)[:-1]))  # fmt: skip
streamed("stream_that_begins_with_no_frame", _WHOLE + "another kind", "a", only(lambda s: SKIPPED + frame(s)))
for behind, more in (("skipped", SKIPPED), ("empty_frame", frame(b"")), ("half_a_header", frame(b"")[:3])):
    streamed(f"stream_with_{behind}_behind", _WHOLE + r"one of \d+, with others behind", "a",
             only(lambda s, more=more: frame(s) + more))  # fmt: skip
streamed("stream_of_two_frames", _WHOLE + r"one of \d+, with others behind", "a",
         only(lambda s: frame(s[:700]) + frame(s[700:])))  # fmt: skip
streamed("stream_that_wants_a_dictionary", _NO_FRAME + ".*ictionary", "a", only(lambda s: raw_frame(s, dictionary=7)))
streamed("stream_that_lies_of_its_size", _NO_FRAME + ".*", "a", only(lambda s: raw_frame(s, size=1 << 60)))
streamed("bomb_of_size", _NO_FRAME + ".*too much memory", "a",
         only(lambda s: raw_frame(s, size=1 << 60, window=None)))  # fmt: skip
streamed("bomb_of_window", _NO_FRAME + ".*too much memory", "a", only(lambda s: raw_frame(s, window=41)))
streamed("window_just_too_large", _NO_FRAME + ".*too much memory", "a", only(lambda s: raw_frame(s, window=18)))
streamed("bomb_of_zeros", A + "expected 1528 symbols, got more", "a", only(lambda s: bomb()))
streamed("bomb_of_zeros_behind", A + "expected 1528 symbols, got more", "a", only(lambda s: frame(s) + bomb()))
streamed("bomb_in_a_mask", r"tensor 'm.weight': stream 0: expected 804 symbols, got more", "m", only(lambda s: bomb()))
streamed("bomb_in_values", r"tensor 'm.weight': stream 1: expected \d+ symbols, got more", "m",
         last(lambda s: frame(s) + bomb()))  # fmt: skip
streamed("symbol_of_seven_bits", A + "expected symbols of 6 bits, got", "a",
         only(edited(5, lambda s: s | 64)))  # fmt: skip
streamed("symbol_of_six_bits", r"tensor 'five.weight': stream 0: expected symbols of 5 bits, got",
         "five", only(edited(-1, lambda s: s | 32)))  # fmt: skip
streamed("code_behind_the_last", A + "expected 3045 codes and zeros behind them, got more$", "a",
         only(edited(place(1522), lambda s: s | 0b010_000)))  # fmt: skip
streamed("symbol_behind_the_last", A + "expected 3045 codes and zeros behind them, got more", "a",
         only(edited(place(1523), lambda s: 0b000_010)))  # fmt: skip
streamed("mask_too_long", r"tensor 'm.weight': stream 0: expected 804 symbols, got more", "m",
         only(lambda s: frame(s + b"\0")))  # fmt: skip
streamed("mask_too_short", r"tensor 'm.weight': stream 0: expected 804 symbols, got 803", "m",
         only(lambda s: frame(s[:-1])))  # fmt: skip
streamed("mask_of_all", r"tensor 'm.weight': stream 1: expected 3216 symbols, got \d+", "m",
         only(lambda s: frame(b"\xff" * len(s))))  # fmt: skip
streamed("mask_of_none", r"tensor 'm.weight': stream 1: expected 0 symbols, got more", "m",
         only(lambda s: frame(bytes(len(s)))))  # fmt: skip
streamed("mask_beyond_the_codes", r"tensor 's.weight': stream 1: expected a mask of 13195 bits, got more", "s",
         lambda s: [frame(s[0][:-1] + bytes([s[0][-1] | 2])), frame(behind_the_codes(s)), frame(s[2])])  # fmt: skip
streamed("mask_beyond_the_mask", r"tensor 's.weight': stream 0: expected a mask of 1650 bits, got more", "s",
         only(edited(-1, lambda b: b | 4)))  # fmt: skip
streamed("zeros_in_an_outer_mask", r"tensor 's.weight': stream 1: expected no zeros, which are taken out, got some",
         "s", lambda s: [frame(s[0]), edited(7, lambda b: 0)(s[1]), frame(s[2])])  # fmt: skip
streamed("streams_in_another_order", r"tensor 'm.weight': stream 0: expected 804 symbols, got \d+", "m",
         lambda s: [frame(s[1]), frame(s[0])])  # fmt: skip


def masked(name, message, values, numbers, mask=None):
    """A case whose "m", of 4 bits, has five codes: their numbers in ``values`` are in the symbols ``numbers``."""

    def write_it(directory):
        file = File()
        file.coding("m")["values"] = values
        symbols = bytes([0b11111]) + bytes(803) if mask is None else mask
        return file.put("m", [frame(symbols), frame(numbers)]).write(directory)

    write_it.__name__ = name
    case(r"tensor 'm.weight': " + message, reads=True)(write_it)


masked("number_beyond_the_values", "stream 1: expected numbers of the 3 values, got others", [4, 5, 6], b"\x1b\0")
masked("number_of_no_values", "stream 1: expected numbers of the 0 values, got others", [], b"\0")
masked("number_behind_the_last", "stream 1: expected 5 codes, got more", [4, 5, 6], b"\0\x04")
masked("value_not_canonical", "coding: expected codes of sha256", [1, 5, 6], b"\0\0")


@case(r"tensor 's.weight': stream 2: expected no bytes for no symbols, got \d+", reads=True)
def stream_of_nothing(directory):
    file = File()
    file.coding("s")["values"] = []
    return file.put("s", [frame(bytes(207)), b"", frame(b"")]).write(directory)


@case(r"tensor 'm.weight': coding: expected codes of sha256 0000\w+, got \w+", reads=True)
def decoded_checksum_wrong(directory):
    file = File()
    file.coding("m")["sha256"] = "0" * 64
    return file.write(directory)


@case(r"tensor 'm.weight': expected sha256 \w+, got \w+: damaged data", reads=True)
def stored_bit_flipped(directory):
    file = File()
    file.tensor("m.weight")[100] ^= 1
    return file.write(directory)


@case(r"tensor 'a.weight': coding: expected codes of sha256 \w+, got \w+", reads=True)
def symbol_of_another_code(directory):
    file = File()
    return file.put("a", only(edited(5, lambda s: s ^ 0b100_100))(file.symbols("a"))).write(directory)


@case(r"tensor 'a.weight': expected canonical codes of 3-bit paper.* and zero padding, got 1 that are not", reads=True)
def reserved_code_forged(directory):
    """With all checksums as whoever forges it would write them: found by the check that packed codes go through."""
    file = File()
    symbols = file.symbols("a")[0]
    symbols[5] = symbols[5] & 0b111_000 | 0b001
    ordered = [symbols[place(number)] for number in range(1528)]
    codes = torch.tensor([code for s in ordered for code in (s & 7, s >> 3)][:3045], dtype=torch.uint8).view(15, 203)
    packed = reference.pack_codes(codes, 3)
    file.coding("a")["sha256"] = hashlib.sha256(bytes(packed.flatten().tolist())).hexdigest()
    return file.put("a", [frame(symbols)]).write(directory)


@case(r"tensor 'm.weight': exponent_range: expected \[-3, 5\] of the manifest, got", reads=True)
def compressed_range_lie(directory):
    file = File()
    file.manifest["m.weight"]["exponent_range"] = [-3, 5]
    return file.write(directory)


@case(r"tensor 's.weight': expected zero bytes after the streams, got others", reads=True)
def something_after_the_streams(directory):
    file = File()
    file.coding("s")["values"] = []
    file.put("s", [frame(bytes(207)), b"", b""])
    file.tensor("s.weight")[-1] = 1
    return file.sign().write(directory)


@case(r"tensor 's.weight': expected torch.uint8 \[106\] for a weight of shape \[65, 203\]")
def nothing_after_the_streams(directory):
    """All codes zero, in fewer bytes than a 64th of the weight."""
    file = File()
    file.coding("s")["values"] = []
    return file.put("s", [frame(bytes(207)), b"", b""], least=0).write(directory)
