"""Builds shim.cpp and speaks to it: ``install()`` once in a script, then ``with armed(directory, mode, n, error):``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "shim.cpp"
COUNT, ONCE, FROM_HERE, SHORT, KILL, KILL_HALF = range(6)
FAILS = {"once": ONCE, "from here on": FROM_HERE, "after half a write": SHORT}

_library: ctypes.CDLL | None = None


def install(folder: Path) -> None:
    """Compile the library into ``folder``, and put it between this process, with its children, and the kernel."""
    global _library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise RuntimeError("faults need a C++ compiler: g++ and c++ were not found (CXX names one)")
    path = folder / "inq_faults.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.inq_fault_arm.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int)
    library.inq_fault_arm.restype, library.inq_fault_count.restype = None, ctypes.c_long
    library.inq_fault_name.argtypes, library.inq_fault_name.restype = (ctypes.c_long,), ctypes.c_char_p
    library.inq_fault_writes.argtypes = (ctypes.c_long,)
    if error := library.inq_fault_install():
        raise OSError(error, f"no seccomp filter: {os.strerror(error)}")
    _library = library


def arm(directory: Path, mode: int, n: int = 0, error: int = 0) -> None:
    """From now on calls about files under ``directory`` count, and the ``n``-th, from 1, has the fault."""
    _library.inq_fault_arm(os.fsencode(os.path.realpath(directory)), mode, n, error)


@contextlib.contextmanager
def armed(directory: Path, mode: int, n: int = 0, error: int = 0) -> Iterator[None]:
    arm(directory, mode, n, error)
    try:
        yield
    finally:
        _library.inq_fault_arm(b"", COUNT, 0, 0)


@contextlib.contextmanager
def counted(directory: Path) -> Iterator[list[tuple[str, bool]]]:
    """Fills a list with the calls of its body: the kind of each, and whether it could be done by half."""
    calls: list[tuple[str, bool]] = []
    arm(directory, COUNT)
    try:
        yield calls
    finally:
        count = _library.inq_fault_count()
        calls += [(_library.inq_fault_name(i).decode(), bool(_library.inq_fault_writes(i))) for i in range(count)]
        _library.inq_fault_arm(b"", COUNT, 0, 0)
