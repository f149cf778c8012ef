"""safetensors files that can be trusted: every check before any large allocation, every write whole or not at all.

Nothing here knows about models or number formats. The safetensors library moves the bytes; this module decides whether
it may: the library itself accepts duplicate names, ``../../etc/passwd`` as a name and shapes such as [0, 2^62].
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_JSON = 16 << 20  # bytes of a header or of a JSON file
# The file that makes a directory a training checkpoint of several processes.
TRAINING_INDEX = "inq_training.json"
MAX_RANK = 16
MAX_ELEMENTS = 1 << 48  # of a shape without its zeros, so that strides never overflow

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME = re.compile(r"[A-Za-z0-9_.]{1,512}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What torch.load or pickle would open, and run code from.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".zip")
# Weights in formats that this package neither reads nor writes.
FOREIGN_WEIGHTS = (".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".tflite", ".ot", ".mlmodel")


class CheckpointError(ValueError):
    """A file was refused: the message names the file, the tensor or key, what was expected and what came."""

    def __init__(self, message: str) -> None:
        # What came may be megabytes of somebody's JSON.
        super().__init__(message if len(message) <= 2000 else f"{message[:1500]} … {message[-400:]}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a header: its bytes are [begin, end) after ``Header.data_start``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: what the file holds, in the file's order, and where its data start, in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str, allow_nan: bool = False) -> object:
    """Strict JSON: no duplicate keys at any level, no NaN or Infinity, integers within int64, nesting bounded.

    Args:
        text: the JSON text, or its UTF-8 bytes.
        where: what the text is, for the message.
        allow_nan: let NaN and Infinity pass, which some models' config.json hold.

    Raises:
        CheckpointError: anything else than that.
    """

    def refuse(expected: str, got: str) -> None:
        raise CheckpointError(f"{where}: expected {expected}, got {got}")

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(items)
        if len(result) != len(items):
            twice = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
            refuse("JSON with unique keys", f"{twice!r} twice")
        return result

    def integer(digits: str) -> int:
        # Before int(), whose time is quadratic in the digits.
        if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 63:
            refuse("integers of at most 64 bits", f"{digits[:24]}… ({len(digits)} digits)")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not (math.isfinite(value) or allow_nan):
            refuse("finite numbers", digits[:24])
        return value

    def constant(word: str) -> float:
        if not allow_nan:
            refuse("JSON without NaN and Infinity", word)
        return float(word.replace("Infinity", "inf"))

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        result = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant)
        if "\\u" in text:
            # \ud800 alone is JSON, but no text: it could be neither printed nor written again.
            json.dumps(result, ensure_ascii=False).encode("utf-8")
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{where}: expected JSON of bounded depth, got too deep a nesting") from None
    except UnicodeError as error:
        raise CheckpointError(f"{where}: expected UTF-8 text, got {error.reason} at {error.start}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: expected JSON, got text that is not: {error}") from None
    return result


def is_int(value: object, low: int, high: int) -> bool:
    """Whether ``value`` is an int within [low, high]; True and 1.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def read_json(path: str | os.PathLike, allow_nan: bool = False) -> object:
    """The content of a JSON file of at most 16 MiB, by ``parse_json``. Raises CheckpointError, OSError."""
    path = Path(path)
    size = check_regular(path)
    if size > MAX_JSON:
        raise CheckpointError(f"{path}: expected a JSON file of at most {MAX_JSON} bytes, got {size}")
    return parse_json(path.read_bytes(), str(path), allow_nan)


# --- reading ----------------------------------------------------------------------------------------------------------


def check_regular(path: str | os.PathLike, root: Path | None = None) -> int:
    """The size of a file in bytes, if it is a regular one, and with ``root`` inside that directory, links followed.

    Raises:
        CheckpointError: it is missing, a directory, a pipe, a device, or leads out of ``root``.
    """
    path = Path(path)
    try:
        mode = path.stat()
        real = None if root is None else Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path}: expected a file, got {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode.st_mode):
        raise CheckpointError(f"{path}: expected a regular file, got a {_KINDS[stat.S_IFMT(mode.st_mode)]}")
    if real is not None and not real.is_relative_to(os.path.realpath(root)):
        raise CheckpointError(f"{path}: expected a file inside {root}, got a link to {real}")
    return mode.st_size


_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def check_name(where: str, name: str) -> None:
    """A CheckpointError unless ``name`` may name a tensor: 1 to 512 of A–Z, a–z, 0–9, "_" and "."."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise CheckpointError(f"{where}: expected tensor names of 1 to 512 of [A-Za-z0-9_.], got {shown!r}")


def read_header(path: str | os.PathLike) -> Header:
    """The header of a safetensors file, after every check that needs no tensor data.

    The file's data must be covered by the tensors exactly, without holes or overlaps. Nothing larger than the header
    (at most 16 MiB) is read, and nothing that the header merely claims is allocated.

    Raises:
        CheckpointError: the file is not exactly as it should be. OSError: it cannot be read.
    """
    path = Path(path)
    where = str(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{where}: expected a .safetensors file, got {path.suffix}: "
            "formats that can hold a pickle, and so run code, are never opened"
        )
    size = check_regular(path)
    if size < 8:
        raise CheckpointError(f"{where}: expected a safetensors file of at least 8 bytes, got {size}")
    with _naming(path), path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > MAX_JSON:
            raise CheckpointError(
                f"{where}: expected a header of at most {MAX_JSON} bytes, got {length}{_looks_like(prefix)}"
            )
        if length > size - 8:
            raise CheckpointError(f"{where}: expected a header of at most the file's {size - 8} bytes, got {length}")
        text = file.read(length)
    if len(text) != length:
        raise CheckpointError(f"{where}: expected a header of {length} bytes, got {len(text)}")
    if text[:1] != b"{":
        raise CheckpointError(f"{where}: expected a header that begins with '{{', got {text[:8]!r}")
    entries = parse_json(text, f"{where}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__: expected an object of strings, got {_short(metadata)}")
    tensors = {name: _tensor_info(where, name, entry) for name, entry in entries.items()}
    _check_layout(where, tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def _looks_like(prefix: bytes) -> str:
    if prefix.startswith(b"PK"):
        return " (this is a ZIP file, as torch.save writes: pickles are never opened)"
    if prefix[0] == 0x80 and prefix[1] <= 5:
        return " (this is a pickle: pickles are never opened)"
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def check_shape(where: str, shape: object) -> tuple[int, ...]:
    """``shape`` as a tuple if it is a list of at most 16 ints ≥ 0 with a bounded product, else CheckpointError."""
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(is_int(d, 0, MAX_ELEMENTS) for d in shape):
        raise CheckpointError(
            f"{where}: shape: expected at most {MAX_RANK} integers in [0, {MAX_ELEMENTS}], got {_short(shape)}"
        )
    if math.prod(max(d, 1) for d in shape) > MAX_ELEMENTS:
        raise CheckpointError(f"{where}: shape: expected a product of at most {MAX_ELEMENTS}, got {shape}")
    return tuple(shape)


def check_sha256(where: str, checksum: object) -> str:
    """``checksum`` if it is a SHA-256 in hex, else CheckpointError."""
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise CheckpointError(f"{where}: sha256: expected 64 hexadecimal digits, got {checksum!r}")
    return checksum


def _tensor_info(path: str, name: str, entry: object) -> TensorInfo:
    check_name(path, name)
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets, got {_short(entry)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, got {_short(entry['dtype'])}")
    shape = check_shape(where, entry["shape"])
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_int(v, 0, (1 << 63) - 1) for v in offsets):
        raise CheckpointError(f"{where}: data_offsets: expected two integers ≥ 0, got {_short(offsets)}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets: expected begin ≤ end, got {offsets}")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: data_offsets: expected {nbytes} bytes for {entry['dtype']} {list(shape)}, got {end - begin}"
        )
    return TensorInfo(dtype, shape, begin, end)


def _check_layout(where: str, tensors: Mapping[str, TensorInfo], data_size: int) -> None:
    position, before = 0, None
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "an overlap with" if info.begin < position else "a hole after"
            raise CheckpointError(
                f"{where}: tensor {name!r}: expected to begin at {position}, got {info.begin}: {what} {before!r}"
            )
        position, before = info.end, name
    if position != data_size:
        raise CheckpointError(f"{where}: expected {position} bytes of tensors, got {data_size}")


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 [nbytes], shared."""
    return tensor.reshape(-1).view(torch.uint8)


def check_bool(where: str, tensor: Tensor) -> None:
    """CheckpointError for a byte that is no bool's, which torch's copies may keep or not."""
    if tensor.dtype == torch.bool and tensor.numel() and (byte := int(tensor.view(torch.uint8).max())) > 1:
        raise CheckpointError(f"{where}: expected bool values of 0 and 1, got the byte {byte}")


def sha256(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's values as the file holds them: contiguous, little-endian, without shape or dtype.

    Copies only a tensor that is not contiguous or not on the CPU.
    """
    flat = _bytes(plain("sha256", tensor))
    if flat.numel() == 0:
        return hashlib.sha256().hexdigest()
    # torch needs numpy for a buffer of its memory; ctypes does not. ``flat`` keeps the memory alive.
    return hashlib.sha256((ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())).hexdigest()


@contextlib.contextmanager
def open_tensors(
    path: str | os.PathLike, header: Header, checksums: Mapping[str, str] | None = None
) -> Iterator[Callable[[str], Tensor]]:
    """A function from a tensor's name to its values, for reading one tensor at a time; as ``read_tensors``."""
    with contextlib.ExitStack() as stack:
        with _library_errors(path):
            file = stack.enter_context(safe_open(os.fspath(path), framework="pt", device="cpu"))

        def get(name: str) -> Tensor:
            info = header.tensors[name]
            with _library_errors(path):
                # The library's tensor is a view of the mapped file, perhaps misaligned. Ours is a copy, then checked.
                view = file.get_tensor(name)
                tensor = view.clone()
            check_bool(f"{path}: tensor {name!r}", view)
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise CheckpointError(
                    f"{path}: tensor {name!r}: expected {info.dtype} {list(info.shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}: the file changed while it was read"
                )
            expected = None if checksums is None else checksums.get(name)
            if expected is not None and (got := sha256(tensor)) != expected:
                raise CheckpointError(f"{path}: tensor {name!r}: expected sha256 {expected}, got {got}: damaged data")
            return tensor

        yield get


def read_tensors(
    path: str | os.PathLike,
    header: Header,
    checksums: Mapping[str, str] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file whose header ``read_header`` has checked, on the CPU, each with memory of its own.

    Args:
        path: the file.
        header: what ``read_header`` returned for it.
        checksums: name → sha256 in hex, verified for the names that it holds.
        names: which tensors to read; None reads all.

    Raises:
        CheckpointError: a checksum differs, a bool is neither 0 nor 1, or the file changed in between. OSError: it
            cannot be read.
    """
    with open_tensors(path, header, checksums) as get:
        return {name: get(name) for name in (header.tensors if names is None else names)}


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """OSErrors of reading and writing an open file, which say nothing of it, with its name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def _library_errors(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the safetensors library as ours: OSError with its number where it was one, else CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        # Versions before 0.6 print Rust's structure, "Os { code: 28, …".
        if number := re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error)):
            code = int(number[1] or number[2])
            raise OSError(code, os.strerror(code), os.fspath(path)) from error
        raise CheckpointError(f"{path}: expected a safetensors file, got: {error}") from error
    except RuntimeError as error:
        # torch maps the file for it: "unable to open file <…> in read-only mode: Input/output error (5)".
        if (number := re.search(r"^unable to .*\((\d+)\)", str(error), re.DOTALL)) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def plain(where: str, tensor: Tensor) -> Tensor:
    """``tensor`` detached, contiguous and on the CPU, in the same memory where it is that already.

    Raises:
        TypeError: not a dense tensor of a dtype that files hold. ValueError: on the meta device, or bools that are
            neither 0 nor 1.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
    tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout}"
        raise TypeError(
            f"{where}: expected a plain dense tensor, got a {kind} "
            "(gather sharded tensors first; for training, inq.save_sharded writes them in parts)"
        )
    if tensor.dtype not in DTYPES.values():
        raise TypeError(f"{where}: expected a dtype that files hold ({', '.join(DTYPES)}), got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{where}: expected a tensor with values, got one on the meta device")
    check_bool(where, tensor)
    return tensor.cpu().resolve_neg().contiguous()


def _prepared(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the library takes them: plain, and no two in the same memory."""
    prepared, seen = {}, set()
    for name, tensor in tensors.items():
        check_name(str(path), name)
        tensor = plain(f"{path}: tensor {name!r}", tensor)
        memory = tensor.untyped_storage().data_ptr()
        prepared[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return prepared


def _target(path: str | os.PathLike) -> Path:
    """The real path that is to be written (links followed, as open() would), in a directory that is there."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(target.parent))
    return target


def _beside(target: Path) -> Path:
    """A fresh hidden name in the directory of ``target``, so that a rename moves it there in one step.

    Only a process that is killed leaves such a ``.….tmp`` behind; it may be deleted.
    """
    # 100 bytes, not characters: file systems count those, to 255.
    name = os.fsdecode(os.fsencode(target.name)[:100]).encode("utf-8", "ignore").decode()
    return target.with_name(f".{name}.{secrets.token_hex(8)}.tmp")


def _fresh_file(path: Path) -> int:
    """Make an empty file that must not exist yet; the permission bits that umask gives it.

    This asks the file system instead of ``os.umask``, which would change the mask of all threads for a moment.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify_written(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    header = read_header(path)
    if header.metadata != metadata or set(header.tensors) != set(tensors):
        raise CheckpointError(f"{path}: expected the header that was written, got another")
    with open_tensors(path, header) as get:
        for name, tensor in tensors.items():
            back = get(name)
            same = back.dtype == tensor.dtype and back.shape == tensor.shape
            if not same or not torch.equal(_bytes(back), _bytes(tensor)):
                raise CheckpointError(f"{path}: tensor {name!r}: expected the values that were written, got others")


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all, and durably.

    A hidden file in the same directory is written, synced, read back and compared, and only then renamed onto ``path``.
    After any exception the old file, if there was one, is untouched. A link is followed. Permission bits are umask's.

    Args:
        path: the file; its directory must exist.
        tensors: name → dense tensor on any real device; views and shared memory are fine, each name is written.
        metadata: strings for the header's ``__metadata__``.

    Raises:
        CheckpointError: a name that files cannot have, or what was read back is not what was written.
        TypeError, ValueError: a tensor without values, or of a dtype or kind that files cannot have.
        OSError: no space, no directory, no permission; it names the path.
    """
    target = _target(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, got that of a directory", str(target))
    tensors, metadata = _prepared(target, tensors), dict(metadata)
    temporary = _beside(target)
    try:
        mode = _fresh_file(temporary)
        with _library_errors(target):
            save_file(tensors, temporary, metadata)
        _sort_metadata(temporary)
        os.chmod(temporary, mode)  # the library leaves 0600
        _fsync(temporary)
        _verify_written(temporary, tensors, metadata)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(target.parent)


def _sort_metadata(path: Path) -> None:
    """Put the metadata into the order of their keys, so that the same model gives the same bytes: the library writes
    them in another order each time."""
    with _naming(path), path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None)
        if not metadata:
            return
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        # The same JSON in another order takes the same room; the library pads it with spaces, too.
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a small UTF-8 file whole or not at all, durably; as ``write_safetensors``."""
    target = _target(path)
    temporary = _beside(target)
    try:
        _fresh_file(temporary)
        with _naming(target):
            temporary.write_bytes(text.encode("utf-8"))
        _fsync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(target.parent)


def write_file_by(path: str | os.PathLike, fill: Callable[[Path], None]) -> None:
    """Write one file that another library makes, whole or not at all, and durably: ``fill`` gets its name in a fresh
    directory, from which it is moved to ``path``.

    Raises:
        OSError: as ``write_safetensors``. And what ``fill`` raises.
    """
    target = _target(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, got that of a directory", str(target))
    temporary = _beside(target)
    try:
        temporary.mkdir()
        fill(temporary / target.name)
        _settle(temporary)
        os.replace(temporary / target.name, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(target.parent)


def write_directory(path: str | os.PathLike, fill: Callable[[Path], None], training: bool = False) -> None:
    """Write a directory whole or not at all, and durably: ``fill`` gets a fresh directory, which then becomes ``path``.

    An older checkpoint at ``path`` is exchanged in one step (where the file system can) and deleted afterwards; after
    any exception it is untouched. Every file gets umask's permission bits and is synced. A link is followed.

    Args:
        path: the directory to be; its parent must exist.
        fill: writes files, and directories, into the directory that it is given.
        training: it is a training checkpoint, and may replace one, instead of a model.

    Raises:
        CheckpointError: ``path`` exists and is not an empty directory or a checkpoint of that kind, files only: a model
            has inq.json, or config.json beside model.safetensors or its index, and no weights but its own; a training
            checkpoint has what ``save_sharded`` writes and nothing else. OSError: as in ``write_safetensors``. And
            ``fill``'s.
    """
    target = check_directory(path, training)
    temporary = _beside(target)
    try:
        temporary.mkdir()
        fill(temporary)
        _settle(temporary)
        # Again: fill may have taken hours.
        _check_replaceable(target, training)
        if target.is_dir():
            replaced = _exchange(temporary, target)
        else:
            replaced = None
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(target.parent)
    # Only now: until the exchange is on the disk, a crash may bring the old name back.
    if replaced is not None:
        try:
            shutil.rmtree(replaced)
        except OSError as error:
            warnings.warn(f"{target} is written; what it replaces could not be deleted: {error}", stacklevel=2)
        except BaseException:  # Ctrl-C: the new one is there, so finish
            shutil.rmtree(replaced, ignore_errors=True)
            raise


def check_directory(path: str | os.PathLike, training: bool = False) -> Path:
    """Raise as ``write_directory`` if ``path`` may not be written; its real path."""
    target = _target(path)
    _check_replaceable(target, training)
    return target


def _check_replaceable(target: Path, training: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: expected a directory or nothing, got a file")
    if reason := (_why_no_training if training else _why_no_model)(target):
        what = "training checkpoint" if training else "model"
        raise CheckpointError(
            f"{target}: expected nothing, an empty directory or an older checkpoint to replace "
            f"(a {what}, files only), got {reason}"
        )


def _why_no_model(target: Path) -> str | None:
    """Why ``target`` is more than an empty directory or a model's files, and must not be deleted; None: it is not."""
    names, reason = _files_of(target)
    if not names or reason:
        return reason
    index = "model.safetensors.index.json"
    if TRAINING_INDEX in names:
        return "a training checkpoint"
    if "inq.json" not in names and not ("config.json" in names and names & {"model.safetensors", index}):
        return "another directory"
    own = {"model.safetensors"}
    if index in names:
        # A damaged one names no files, and those that are there are not deleted.
        with contextlib.suppress(CheckpointError, AttributeError, KeyError):
            own |= set(map(str, read_json(target / index)["weight_map"].values()))
    for name in sorted(names - own):
        # An optimizer's state, say, or a checkpoint of its own.
        if Path(name).suffix.lower() in (".safetensors", *PICKLE_SUFFIXES, *FOREIGN_WEIGHTS):
            return f"one with {name!r}, which is not the model's"
    return None


def _why_no_training(target: Path) -> str | None:
    """As ``_why_no_model``, for a training checkpoint."""
    names, reason = _files_of(target)
    if not names or reason:
        return reason
    if TRAINING_INDEX not in names:
        return "another directory"
    # Hidden ones are the system's, such as .DS_Store and .nfs….
    strangers = (name for name in sorted(names) if not (name.startswith(".") or _TRAINING_FILE.fullmatch(name)))
    name = next(strangers, None)
    return None if name is None else f"one with {name!r}, which is not the checkpoint's"


_TRAINING_FILE = re.compile(rf"{re.escape(TRAINING_INDEX)}|rank-\d{{5}}\.json|shard-\d{{5}}-.*\.safetensors")


def _files_of(directory: Path) -> tuple[set[str], str | None]:
    """The names in a directory, and the first that is no file, for a message."""
    with os.scandir(directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    other = next((entry.name for entry in entries if not entry.is_file(follow_symlinks=False)), None)
    return {entry.name for entry in entries}, None if other is None else f"one with {other!r}, which is no file"


def _settle(directory: Path) -> None:
    """umask's permission bits for every file under ``directory``, and everything on the disk."""
    probe = directory / f".{secrets.token_hex(8)}.tmp"
    mode = _fresh_file(probe)
    probe.unlink()

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over what it cannot list

    for folder, _, names in os.walk(directory, topdown=False, onerror=refuse):
        for name in names:
            file = Path(folder, name)
            os.chmod(file, mode)
            _fsync(file)
        _fsync(Path(folder))


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _exchange(new: Path, old: Path) -> Path:
    """Put the directory ``new`` in the place of ``old``; where ``old`` went. In one step where the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not glibc ≥ 2.28
        code = errno.ENOSYS
    else:
        result = renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        code = ctypes.get_errno() if result else 0
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return _exchange_by_renames(new, old)
    if code:
        raise OSError(code, os.strerror(code), str(old))
    return new


def _exchange_by_renames(new: Path, old: Path) -> Path:
    """Two renames, with a way back: only a process that is killed in between leaves ``old`` under its hidden name."""
    aside = _beside(old)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    return aside
