"""safetensors files: what is refused, and that a write is whole or not at all, whatever happens meanwhile."""

import errno
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support import generator, same_bits

from inq_kernels import CheckpointError, files
from inq_kernels.files import (
    DTYPES,
    parse_json,
    read_header,
    read_tensors,
    sha256,
    write_directory,
    write_safetensors,
    write_text,
)  # fmt: skip

OLD = {"a": torch.arange(1000.0)}
NEW = {"a": torch.arange(1000.0) + 0.5, "b": torch.ones(3, dtype=torch.int8)}


def read(path):
    return read_tensors(path, read_header(path))


def is_old(path):
    return same_bits(read(path)["a"], OLD["a"])


def test_bools_are_0_or_1(tmp_path):
    """torch keeps other bytes in some copies and not in others."""
    odd = torch.tensor([0, 1, 2] * 5, dtype=torch.uint8).view(torch.bool)
    save_file({"a": odd}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match="x.safetensors: tensor 'a': expected bool values of 0 and 1, got the byte"
    ):
        read(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="y.safetensors: tensor 'a': expected bool values of 0 and 1, got the byte 2"):
        write_safetensors(tmp_path / "y.safetensors", {"a": odd}, {})
    assert not (tmp_path / "y.safetensors").exists()


def hidden(directory):
    """What a write may have left behind."""
    return [name for name in os.listdir(directory) if name.startswith(".")]


def every_dtype():
    x = torch.randn(4, 6, generator=generator()) * 100
    return {name: x.to(dtype) for name, dtype in DTYPES.items()}


def fill_with(tensors):
    def fill(directory):
        write_safetensors(directory / "model.safetensors", tensors, {})
        write_text(directory / "inq.json", "{}")

    return fill


# --- what is written is what is read ----------------------------------------------------------------------------------


def test_every_dtype_round_trips(tmp_path):
    tensors = every_dtype()
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "größe": "ja"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt", "größe": "ja"}
    back = read_tensors(tmp_path / "x.safetensors", header, {name: sha256(t) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        assert header.tensors[name].dtype == tensor.dtype
        assert header.tensors[name].shape == (4, 6)
        assert same_bits(back[name], tensor), name
    # The library itself reads the same.
    assert all(same_bits(t, tensors[name]) for name, t in load_file(tmp_path / "x.safetensors").items())


def test_views_shared_memory_empty_and_scalar_tensors(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    tensors = {
        "x": x, "same": x, "t": x.t(), "part": x[1:3], "column": x[:, 1], "expanded": x[:1].expand(3, 6),
        "empty": x[:0], "none": torch.empty(0), "scalar": torch.tensor(3.0), "negative": torch._neg_view(x),
        "parameter": torch.nn.Parameter(x),
    }  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    back = read(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(back[name], tensor.detach().clone().contiguous()), name
    back["x"][0, 0] = 100
    assert back["same"][0, 0] == 0


def test_tensors_that_are_read_have_aligned_memory_of_their_own(tmp_path):
    """The file may put a float32 at an odd offset, and may be changed in place after it was checked."""
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abc" + struct.pack("<2f", 1, 2))
    b = read(path)["b"]
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<2f", 3, 4))
    assert b.tolist() == [1, 2]
    assert b.data_ptr() % 4 == 0


def test_only_the_named_tensors_are_read_and_checked(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", NEW, {})
    header = read_header(tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors", header, {"a": "0" * 64}, ["b"]).keys() == {"b"}
    with pytest.raises(CheckpointError, match="tensor 'a': expected sha256 0000.*: damaged data"):
        read_tensors(tmp_path / "x.safetensors", header, {"a": "0" * 64})


def test_sha256_is_of_the_bytes_in_the_file():
    tensor = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.bfloat16)
    assert sha256(tensor) == hashlib.sha256(bytes.fromhex("803f00c0003f4040")).hexdigest()
    assert sha256(tensor.t()) == hashlib.sha256(bytes.fromhex("803f003f00c04040")).hexdigest()
    assert sha256(torch.tensor(1, dtype=torch.int64)) == hashlib.sha256(b"\1" + bytes(7)).hexdigest()
    assert sha256(torch.empty(0, 3)) == hashlib.sha256().hexdigest()
    assert sha256(torch.tensor([True, False])) == hashlib.sha256(b"\1\0").hexdigest()


def test_sha256_copies_nothing():
    """1 GiB that no page was ever touched of would otherwise be seen in the peak of the resident memory."""
    script = """
        import resource, torch
        from inq_kernels.files import sha256
        x = torch.ones(1 << 25, dtype=torch.uint8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sha256(x)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"a/b": torch.ones(1)}, CheckpointError, r"expected tensor names .* got 'a/b'"),
        ({"a": torch.ones(1, device="meta")}, ValueError, "tensor 'a': expected a tensor with values, got .* meta"),
        ({"a": torch.ones(1).to_sparse()}, TypeError, "tensor 'a': expected a plain dense tensor, got a Tensor of lay"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, TypeError, "tensor 'a': expected a dtype .* got torch.complex64"),
        ({"a": [1.0]}, TypeError, r"tensor 'a': expected a torch.Tensor, got list"),
    ],
)
def test_tensors_that_files_cannot_hold(tmp_path, tensors, error, message):
    write_safetensors(tmp_path / "x.safetensors", OLD, {})
    with pytest.raises(error, match=message):
        write_safetensors(tmp_path / "x.safetensors", tensors, {})
    assert is_old(tmp_path / "x.safetensors")
    assert hidden(tmp_path) == []


def test_a_header_over_the_limit_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="expected a header of at most 16777216 bytes"):
        write_safetensors(tmp_path / "x.safetensors", OLD, {"long": "x" * (16 << 20)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permission_bits_are_those_of_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "x.safetensors", OLD, {})
        write_directory(tmp_path / "model", fill_with(OLD))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in ("x.safetensors", "model/model.safetensors", "model/inq.json"):
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o666 & ~umask, path
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "disk" / "x.safetensors")
    write_safetensors(tmp_path / "x.safetensors", OLD, {})
    assert (tmp_path / "x.safetensors").is_symlink()
    assert is_old(tmp_path / "disk" / "x.safetensors")
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "model")
    write_directory(tmp_path / "latest", fill_with(OLD))
    assert (tmp_path / "latest").is_symlink()
    assert is_old(tmp_path / "disk" / "model" / "model.safetensors")


def test_a_missing_parent_is_named(tmp_path):
    for write in (lambda p: write_safetensors(p, OLD, {}), lambda p: write_directory(p, fill_with(OLD))):
        with pytest.raises(FileNotFoundError, match="no such directory: '.*/nowhere'"):
            write(tmp_path / "nowhere" / "x.safetensors")


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "unique keys, got 'a' twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "unique keys, got 'a' twice"),
        ("[NaN]", "without NaN and Infinity, got NaN"),
        ("[-Infinity]", "got -Infinity"),
        ("[1e400]", "expected finite numbers, got 1e400"),
        ("9" * 30, "at most 64 bits"),
        ("[" * 100_000, "bounded depth"),
        ('"\\ud800"', "UTF-8"),
        ("", "expected JSON"),
        ("{} {}", "Extra data"),
        (b"\xff", "expected UTF-8 text, got invalid start byte at 0"),
    ],
)
def test_strict_json(text, message):
    with pytest.raises(CheckpointError, match=f"the text: .*{message}"):
        parse_json(text, "the text")


def test_json_that_passes():
    assert parse_json('{"a": [1, -2.5, true, null, "\\ud83d\\ude00"]}', "x") == {"a": [1, -2.5, True, None, "😀"]}
    assert parse_json(b'{"a": -9223372036854775808}', "x") == {"a": -(1 << 63)}
    assert parse_json('{"limit": [0.0, Infinity]}', "x", allow_nan=True) == {"limit": [0.0, float("inf")]}


# --- writes that fail -------------------------------------------------------------------------------------------------


def raising(error, after=0, real=None):
    """A function that raises ``error``, after ``after`` calls of ``real``."""
    calls = 0

    def function(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return real(*args, **kwargs)

    return function


FAULTS = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()]
STEPS = [
    (files.os, "open"), (files.os, "chmod"), (files.os, "fsync"), (files.os, "replace"),
    (files, "save_file"), (files, "read_header"), (files, "safe_open"), (files.torch, "equal"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=["ENOSPC", "EIO", "interrupt"])
@pytest.mark.parametrize(("module", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_failed_step_leaves_the_old_file(tmp_path, monkeypatch, module, name, fault):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, OLD, {})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, raising(fault))
        with pytest.raises(type(fault)):
            write_safetensors(path, NEW, {})
    assert path.read_bytes() == before
    assert hidden(tmp_path) == []
    write_safetensors(path, NEW, {})
    assert same_bits(read(path)["a"], NEW["a"])


def test_a_failed_sync_of_the_parent_leaves_the_new_file(tmp_path, monkeypatch):
    """After the rename there is no way back, and none is needed: the file is whole."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, OLD, {})
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", raising(OSError(errno.EIO, "I/O error"), 1, os.fsync))
        with pytest.raises(OSError, match=f"I/O error: '{tmp_path}'"):
            write_safetensors(path, NEW, {})
    assert same_bits(read(path)["a"], NEW["a"])
    assert hidden(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*could not be deleted")
@pytest.mark.parametrize("fault", FAULTS, ids=["ENOSPC", "EIO", "interrupt"])
@pytest.mark.parametrize("name", ["open", "chmod", "fsync", "replace", "mkdir", "scandir"])
@pytest.mark.parametrize("after", range(9))
def test_a_failed_step_leaves_the_old_directory(tmp_path, monkeypatch, name, after, fault):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    calls, real = [], getattr(os, name)

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == after + 1:
            raise fault
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, fails_once)
        failed = False
        try:
            write_directory(path, fill_with(NEW))
        except type(fault):
            failed = True
    # The last sync, and deleting the old directory, come after the exchange: then all of it is new.
    if failed and same_bits(read(path / "model.safetensors")["a"], OLD["a"]):
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    else:
        assert not failed or len(calls) > 3
        assert all(same_bits(t, NEW[name]) for name, t in read(path / "model.safetensors").items())
        assert sorted(os.listdir(path)) == ["inq.json", "model.safetensors"]
    # What cannot be deleted stays, and so does the old directory while it is not sure that the new one is on the disk.
    assert hidden(tmp_path) == [] or name in ("open", "scandir", "fsync")


def test_a_directory_that_cannot_be_listed_is_not_taken_for_synced(tmp_path, monkeypatch):
    real, calls = os.scandir, []

    def second_fails(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        return real(path)

    write_directory(tmp_path / "model", fill_with(OLD))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "scandir", second_fails)
        with pytest.raises(OSError, match="I/O error"):
            write_directory(tmp_path / "model", fill_with(NEW))
    assert is_old(tmp_path / "model" / "model.safetensors")


def test_a_library_that_writes_something_else_is_found_out(tmp_path, monkeypatch):
    def wrong_value(tensors, path, metadata):
        save_file(tensors | {"a": tensors["a"] + 1}, path, metadata)

    def wrong_name(tensors, path, metadata):
        save_file({"c": tensors["a"], "b": tensors["b"]}, path, metadata)

    def short(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) - 1)

    path = tmp_path / "x.safetensors"
    write_safetensors(path, OLD, {})
    for fake, message in (
        (wrong_value, "tensor 'a': expected the values that were written"),
        (wrong_name, "expected the header that was written"),
        (short, "expected 4003 bytes of tensors, got 4002"),
    ):
        monkeypatch.setattr(files, "save_file", fake)
        with pytest.raises(CheckpointError, match=message):
            write_safetensors(path, NEW, {})
        assert is_old(path)
        assert hidden(tmp_path) == []


def test_errors_of_the_library_are_ours(tmp_path, monkeypatch):
    """It tells of the system's errors in words only."""
    path = tmp_path / "x.safetensors"
    for text, error, message in (
        ("I/O error: No space left on device (os error 28)", OSError, f"No space left on device: '{path}'"),
        ('IoError(Os { code: 28, kind: StorageFull, message: "…" })', OSError, f"No space left on device: '{path}'"),
        ("no idea", CheckpointError, f"{path}: expected a safetensors file, got: no idea"),
    ):
        monkeypatch.setattr(files, "save_file", raising(SafetensorError(text)))
        with pytest.raises(error, match=message) as caught:
            write_safetensors(path, OLD, {})
        assert getattr(caught.value, "errno", 28) == errno.ENOSPC
        assert os.listdir(tmp_path) == []


def test_a_file_that_shrinks_while_its_header_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{}")
    monkeypatch.setattr(files, "check_regular", lambda path: 1 << 20)
    with pytest.raises(CheckpointError, match="expected a header of 1000 bytes, got 2"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_that_goes_away_is_named(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", OLD, {})
    header = read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x.safetensors"):
        read_tensors(tmp_path / "x.safetensors", header)


def test_a_file_that_changes_between_the_checks_and_the_reading(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, OLD, {})
    header = read_header(path)
    save_file({"a": torch.zeros(500)}, path)
    with pytest.raises(CheckpointError, match=r"expected torch.float32 \[1000\], got .* \[500\]: the file changed"):
        read_tensors(path, header)
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="expected a safetensors file, got: "):
        read_tensors(path, header)


# A file system of 1 MiB, where the kernel lets us make one; else a limit on file sizes, which fails in the same places.
NO_SPACE = """
    import errno, os, resource, sys
    from pathlib import Path
    import torch
    from inq_kernels.files import read_header, read_tensors, write_directory, write_safetensors, write_text

    directory, limited = Path(sys.argv[1]), sys.argv[2] == "limit"
    small, large = {"a": torch.arange(1000.0)}, {"a": torch.ones(300_000)}
    path, model = directory / "x.safetensors", directory / "model"

    def fill(tensors):
        def fill(target):
            write_safetensors(target / "model.safetensors", tensors, {})
            write_text(target / "inq.json", "{}")
        return fill

    write_safetensors(path, small, {})
    write_directory(model, fill(small))
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    for write, name in (
        (lambda: write_safetensors(path, large, {}), "x.safetensors"),
        (lambda: write_directory(model, fill(large)), "model.safetensors"),
    ):
        try:
            write()
        except OSError as error:
            assert error.errno == (errno.EFBIG if limited else errno.ENOSPC), error
            assert str(directory) in error.filename and name in error.filename, error
        else:
            sys.exit("expected no space")
        for file in (path, model / "model.safetensors"):
            assert torch.equal(read_tensors(file, read_header(file))["a"], small["a"])
        assert sorted(os.listdir(directory)) == ["model", "x.safetensors"], os.listdir(directory)
    print("ok")
"""


def run_on_a_full_disk(script, directory):
    """Run a script whose arguments are a directory on a disk of 1 MiB and "disk", or any directory and "limit"."""
    command = [sys.executable, "-c", textwrap.dedent(script), str(directory)]
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    if shutil.which("unshare"):
        for flags in ("-m", "-rm"):
            inside = ["unshare", flags, "sh", "-c", mount, str(directory), *command, "disk"]
            if subprocess.run(["unshare", flags, "sh", "-c", mount, str(directory), "true"], check=False).returncode:
                continue
            return subprocess.run(inside, check=False, capture_output=True, text=True)
    return subprocess.run([*command, "limit"], check=False, capture_output=True, text=True)


def test_no_space_leaves_the_old_file(tmp_path):
    result = run_on_a_full_disk(NO_SPACE, tmp_path)
    assert result.stdout == "ok\n", result.stderr


def test_a_limit_on_file_sizes_leaves_the_old_file(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(NO_SPACE), str(tmp_path), "limit"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_is_made_and_replaced(tmp_path):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))
    assert is_old(path / "model.safetensors")

    def other(directory):
        write_safetensors(directory / "other.safetensors", NEW, {})
        write_text(directory / "model.safetensors.index.json", '{"weight_map": {"a": "other.safetensors"}}')
        write_text(directory / "config.json", "{}")

    write_directory(path, other)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors.index.json", "other.safetensors"]
    write_directory(path, fill_with(OLD))
    assert sorted(os.listdir(path)) == ["inq.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


def test_an_empty_directory_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    write_directory(tmp_path / "model", fill_with(OLD))
    assert is_old(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        ["notes.txt"],
        ["config.json"],  # any project may have one
        ["config.json", "src/main.py"],
        ["inq.json", "src/main.py"],
        ["inq.json", ".git/HEAD"],
        ["config.json", "model.safetensors", "onnx/model.onnx"],
        ["config.json", "first.safetensors", "second.safetensors"],  # an experiment's, and its results
        ["config.json", "model.safetensors", "optimizer.pt"],  # a Trainer's checkpoint
        ["config.json", "model.safetensors", "inq.safetensors"],  # examples/train_trainer.py's
        ["inq.json", "model.safetensors", "model.gguf"],
        ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],  # no JSON
        ["inq_training.json", "rank-00000.json", "shard-00001-model-00001-of-00001.safetensors"],
        ["inq.json", "model.safetensors", "inq_training.json"],
    ],
)
def test_a_directory_of_something_else_is_not_replaced(tmp_path, content):
    path = tmp_path / "project"
    for name in content:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("precious")
    calls = []
    with pytest.raises(CheckpointError, match="project: expected nothing, an empty directory or an older checkpoint"):
        write_directory(path, calls.append)
    assert calls == []
    assert all((path / name).read_text() == "precious" for name in content)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        ["inq.json", "model.safetensors"],
        ["config.json", "model.safetensors"],
        ["inq_training.json", "log.txt"],
        ["rank-00000.json"],
        ["inq_training.json", "model.safetensors"],
        ["inq_training.json", "shards/rank-00000.json"],
    ],
)
def test_a_training_checkpoint_replaces_its_like_alone(tmp_path, content):
    path = tmp_path / "project"
    for name in content:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("precious")
    with pytest.raises(CheckpointError, match="project: expected nothing, an empty directory or an older checkpoint"):
        write_directory(path, fill_with(NEW), training=True)
    assert all((path / name).read_text() == "precious" for name in content)


def test_hidden_files_of_the_system_are_in_nobodys_way(tmp_path):
    for name, training in (("inq.json", False), ("inq_training.json", True)):
        path = tmp_path / name
        path.mkdir()
        (path / name).write_text("{}")
        (path / ".DS_Store").write_text("")
        write_directory(path, fill_with(NEW), training=training)
        assert same_bits(read(path / "model.safetensors")["a"], NEW["a"])


def test_a_directory_that_turns_into_something_else_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))

    def fill(directory):
        fill_with(NEW)(directory)
        (path / "src").mkdir()

    with pytest.raises(CheckpointError, match="expected nothing, an empty directory or an older checkpoint"):
        write_directory(path, fill)
    assert is_old(path / "model.safetensors")
    assert hidden(tmp_path) == []


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(CheckpointError, match="model: expected a directory or nothing, got a file"):
        write_directory(tmp_path / "model", fill_with(OLD))
    assert (tmp_path / "model").read_text() == "precious"


def test_a_filler_that_fails_leaves_the_old_directory(tmp_path):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))

    def fill(directory):
        fill_with(NEW)(directory)
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_directory(path, fill)
    assert is_old(path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model"]


class _NoExchange:
    """A libc whose file system cannot exchange."""

    def __init__(self, *args, **kwargs):
        self.renameat2 = lambda *arguments: files.ctypes.set_errno(errno.EINVAL) or -1


class _OldLibrary:
    def __init__(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("library", [_NoExchange, _OldLibrary])
def test_without_an_exchange_there_are_two_renames_and_a_way_back(tmp_path, monkeypatch, library):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))
    monkeypatch.setattr(files.ctypes, "CDLL", library)
    real = os.rename
    with monkeypatch.context() as patch:
        calls = []

        def second_fails(source, target):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.EIO, "I/O error")
            real(source, target)

        patch.setattr(files.os, "rename", second_fails)
        with pytest.raises(OSError, match="I/O error"):
            write_directory(path, fill_with(NEW))
    assert len(calls) == 3
    assert is_old(path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model"]
    write_directory(path, fill_with(NEW))
    assert same_bits(read(path / "model.safetensors")["a"], NEW["a"])
    assert os.listdir(tmp_path) == ["model"]


def test_other_errors_of_the_exchange_are_errors(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))

    class Broken:
        def __init__(self, *args, **kwargs):
            self.renameat2 = lambda *arguments: files.ctypes.set_errno(errno.EIO) or -1

    monkeypatch.setattr(files.ctypes, "CDLL", Broken)
    with pytest.raises(OSError, match=f"'{path}'"):
        write_directory(path, fill_with(NEW))
    assert is_old(path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model"]


def test_the_exchange_is_one_step(tmp_path, monkeypatch):
    """At no moment is there no checkpoint: nothing is renamed away."""
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))
    monkeypatch.setattr(files, "_exchange_by_renames", raising(AssertionError("renamed")))
    write_directory(path, fill_with(NEW))
    assert same_bits(read(path / "model.safetensors")["a"], NEW["a"])


def test_what_is_replaced_and_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_directory(path, fill_with(OLD))
    monkeypatch.setattr(files.shutil, "rmtree", raising(OSError(errno.EACCES, "Permission denied")))
    with pytest.warns(UserWarning, match="is written; what it replaces could not be deleted"):
        write_directory(path, fill_with(NEW))
    assert same_bits(read(path / "model.safetensors")["a"], NEW["a"])


# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from inq_kernels.files import read_header, read_tensors, sha256, write_directory, write_safetensors, write_text

    directory, kills = Path(sys.argv[1]), int(sys.argv[2])
    states = [{"a": torch.full((5000,), float(i)), "b": torch.arange(64) + i} for i in range(2)]
    sums = [{name: sha256(t) for name, t in state.items()} for state in states]
    path, model = directory / "x.safetensors", directory / "model"

    def fill(i):
        def fill(target):
            write_safetensors(target / "model.safetensors", states[i], {"state": str(i)})
            write_text(target / "inq.json", "{}")
        return fill

    def save(i):
        write_safetensors(path, states[i], {"state": str(i)})
        write_directory(model, fill(i))

    def verify(file):
        header = read_header(file)
        i = int(header.metadata["state"])
        read_tensors(file, header, sums[i])
        return i

    start = time.monotonic()
    save(0)
    save(1)
    span = (time.monotonic() - start)
    seen, rng = set(), random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            i = 0
            while True:
                save(i % 2)
                i += 1
        time.sleep(rng.random() * span)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        seen.add((verify(path), verify(model / "model.safetensors")))
        assert sorted(os.listdir(model)) == ["inq.json", "model.safetensors"]
    litter = [name for name in os.listdir(directory) if name not in ("x.safetensors", "model")]
    assert all(name.startswith(".") for name in litter), litter
    print(len(seen), len(litter) > 0)
"""


def test_killed_at_any_moment_what_is_on_disk_verifies(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "100"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    states, interrupted = result.stdout.split()
    # Else the kills came at the wrong moments and showed nothing.
    assert int(states) >= 2
    assert interrupted == "True"


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """The library writes metadata in another order each time; whoever hashes a model's file should not see that."""
    metadata = {key: f'value of {key}: é " \\ \n' for key in "hgfedcba"}
    written = set()
    for i in range(6):
        files.write_safetensors(tmp_path / f"{i}.safetensors", {"a": torch.arange(3), "b": torch.ones(2)}, metadata)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    assert files.read_header(tmp_path / "0.safetensors").metadata == metadata


def test_long_names_and_a_directory_in_the_way(tmp_path):
    path = tmp_path / ("模" * 78 + ".safetensors")
    files.write_safetensors(path, {"a": torch.ones(1)}, {})
    assert files.read_header(path).tensors
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="expected the name of a file.*x.safetensors"):
        files.write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "x.safetensors"])
