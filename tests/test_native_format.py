"""csrc/inq_format.h says the same as format.py, and the compiled library is built from torch's stable ABI alone."""

import subprocess
from pathlib import Path

import pytest
import torch
from support import FORMATS

import inq_kernels as inq
from inq_kernels import backends, format, reference

native = torch.ops.inq_cpu
LIBRARY = Path(inq.__file__).parent / "_cpu.so"


@pytest.fixture(autouse=True)
def _loaded():
    assert backends.availability()["cpu"] is None


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_fields_magnitudes_and_row_bytes(fmt):
    facts = native.format_facts(fmt.bits, fmt.levels == "dense")
    assert facts == [*fmt.fields, fmt.magnitudes, fmt.n2(0), fmt.row_bytes(11)]


def test_constants():
    names = ("N1_MIN", "N1_MAX", "N1_MIN_FLOAT16", "N1_MAX_FLOAT16", "N1_ZERO_ROW", "MSE_OCTAVES")
    assert native.format_constants() == [getattr(format, name) for name in names]


@pytest.mark.parametrize("n1", [-126, -125, -119, -1, 0, 3, 127])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equation_4_on_the_bits_of_a_float(fmt, n1):
    # Around every power of two and every 1.5·2^k that the levels can see, and at both ends of float32.
    centres = [e << 23 | m for e in (*range(n1 + 127 - 18, n1 + 131), 0, 1, 254) if 0 <= e < 255 for m in (0, 1 << 22)]
    bits = {b + d for b in centres for d in (-1, 0, 1) if 0 <= b + d < 0x7F800000}
    w = torch.tensor(sorted(bits), dtype=torch.int32).view(torch.float32)
    expected = reference.quantize(w[None], torch.full((1, 1), n1, dtype=torch.int8), fmt)[0].view(torch.int32)
    got = [native.quantize_magnitude(b, n1, fmt.bits, fmt.levels == "dense") for b in sorted(bits)]
    assert got == expected.tolist()


def test_bits_outside_the_formats_are_refused():
    with pytest.raises(ValueError, match="^inq_cpu.format_facts: bits: expected 2 to 5, got 6$"):
        native.format_facts(6, False)


def test_no_torch_cxx_symbol_is_inside():
    """Only C functions of torch's stable ABI: their names have no C++ mangling, so that any torch ≥ 2.11 has them."""
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in text.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    mangled = [name for name in names if name.startswith("_Z")]
    # C++ only of the C++ library itself: std::, operator new and delete.
    assert [n for n in mangled if any(word in n for word in ("c10", "at6", "torch", "2at", "caffe2"))] == []
    assert not any("Py" in name for name in names)


def test_the_target_version_is_the_oldest_torch_that_is_supported():
    assert "TORCH_TARGET_VERSION=0x020b000000000000" in (Path(__file__).parent.parent / "setup.py").read_text()
