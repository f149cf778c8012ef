"""The format tables: which values a weight may take, which bits name them, and how many weights a portion is."""

import dataclasses
import subprocess
import sys

import oracle
import pytest

from inq_kernels.format import BITS, LEVELS, Format, frozen_count

FORMATS = [Format(bits, levels) for bits in BITS for levels in LEVELS]


@pytest.mark.parametrize(("levels", "expected"), [("paper", [8, 4, 2, 1]), ("dense", [15, 7, 3, 1])])
def test_magnitudes(levels, expected):
    assert [Format(bits, levels).magnitudes for bits in (5, 4, 3, 2)] == expected


@pytest.mark.parametrize("bits", BITS)
def test_n2_is_equation_3_of_the_paper(bits):
    for n1 in (-126, -1, 0, 127):
        assert Format(bits).n2(n1) == n1 + 1 - 2 ** (bits - 1) // 2
        assert Format(bits, "dense").n2(n1) == n1 + 1 - (2 ** (bits - 1) - 1)


def test_code_levels_by_hand():
    # Code: sign, then the field. paper, 3 bits: the field's top bit says "nonzero", the other is the index e.
    assert Format(3).code_levels == (1, None, -1, 0, None, None, -1, 0)
    assert Format(3, "dense").code_levels == (1, -2, -1, 0, None, -2, -1, 0)
    assert Format(2).code_levels == Format(2, "dense").code_levels == (1, 0, None, 0)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_code_levels_against_the_definition(fmt):
    n1 = 3
    values = [0] + [sign * oracle.power(n1 - j) for j in range(fmt.magnitudes) for sign in (1, -1)]
    expected = [None] * 2**fmt.bits
    for value in values:
        level = oracle.floor_log2(abs(value)) - n1 if value else 1
        expected[oracle.code(value, n1, fmt.bits, fmt.levels)] = level
    assert list(fmt.code_levels) == expected
    # 2·magnitudes + 1 levels: 17/9/5/3 (paper) and 31/15/7/3 (dense).
    assert sum(level is not None for level in fmt.code_levels) == 2 * fmt.magnitudes + 1


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_row_bytes(fmt):
    assert [fmt.row_bytes(k) for k in (1, 8, 9, 64)] == [fmt.bits, fmt.bits, 2 * fmt.bits, 8 * fmt.bits]


def test_defaults_and_the_strict_paper():
    assert dataclasses.astuple(Format(4)) == (4, "paper", "tensor", "mse")
    assert dataclasses.astuple(Format.paper(4)) == (4, "paper", "tensor", "max")
    assert Format(4) == Format(4)
    assert hash(Format(4)) == hash(Format(4))
    assert str(Format.paper(5)) == "5-bit paper, n1 by max a tensor"


@pytest.mark.parametrize("bits", [True, 4.0, "4", None])
def test_bits_must_be_an_int(bits):
    with pytest.raises(TypeError, match="bits: expected an int, got"):
        Format(bits)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", 1), ("bits", 6), ("levels", "sparse"), ("granularity", "row"), ("exponent", "min"), ("levels", None)],
)
def test_values_outside_the_lists(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected one of .*, got {value!r}"):
        Format(**{"bits": 4, name: value})


def test_a_format_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Format(4).bits = 5


@pytest.mark.parametrize(
    ("portion", "numel", "expected"),
    [
        (0, 10, 0),
        (1, 10, 10),
        (1.0, 1, 1),
        (0.5, 1, 1),  # 0.5 + 0.5: a half goes up
        (0.49, 1, 0),
        (0.5, 5, 3),
        (0.3, 10, 3),
        (0.875, 100, 88),  # 87.5 goes up
        (0.1, 31, 3),
        (0.975, 1000, 975),
        (0.7, 2**31, 1503238554),  # 1503238553.6
        (1.0, 2**40 + 1, 2**40 + 1),
    ],
)
def test_frozen_count(portion, numel, expected):
    assert frozen_count(portion, numel) == expected


def test_format_needs_the_standard_library_only():
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    path = sys.modules[Format.__module__].__file__
    subprocess.run([sys.executable, "-c", code, path], check=True)
