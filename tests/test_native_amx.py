"""The AMX kernels: on emulated tiles as products, and as the instructions in the compiled library.

``inq_cpu.emulate_amx`` puts isa amx in use on any machine with AVX-512 BF16. tests/native/test_amx.cpp runs the machine
code itself.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_native_linear as products
import torch
import torch.nn.functional as F
from support import FORMATS, assert_as_good_as_dense, generator, integer_case, plain, random_packed, same_bits

import inq_kernels as inq
from inq_kernels import reference

LIBRARY = Path(inq.__file__).parent / "_cpu.so"
torch.ops.load_library(str(LIBRARY))
ops = torch.ops.inq_cpu

# Around 16 rows of a tile, 32 of a micro-tile and 64 of a stream, and past a block of rows.
ROWS = (1, 15, 16, 17, 31, 32, 33, 48, 50, 64, 65, 270)
# N, K: around panels and tiles; past the ring of `stream` (2 to 8 tiles of k), what it takes at once (6), a chunk (12).
SHAPES = ((1, 1), (15, 31), (17, 33), (33, 17), (70, 290), (100, 130), (16, 600))

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
needs_avx512 = pytest.mark.skipif(
    ops.detected_isa() not in ("avx512", "amx"), reason="the emulated tiles are compiled for AVX-512 BF16"
)


@pytest.fixture
def amx():
    isa, threads = ops.isa(), torch.get_num_threads()
    assert ops.emulate_amx(True) == "amx"
    yield
    ops.emulate_amx(False)
    ops.set_isa(isa)
    torch.set_num_threads(threads)


def linear(x, packed, bias=None):
    fmt, k = packed.format, math.prod(packed.shape[1:])
    tail = fmt.bits, fmt.levels == "dense"
    weight = ops.prepack(packed.weight, k, *tail)
    return ops.linear(x, weight, packed.weight_exp, packed.weight_scale, bias, *tail)


# --- products ---------------------------------------------------------------------------------------------------------


@needs_avx512
@every_format
def test_integers_bit_for_bit(fmt, amx):
    for seed, (n, k) in enumerate(SHAPES):
        packed = random_packed(fmt, n, k, scale=True, seed=seed)
        bias = torch.randint(-9, 9, (n,), generator=generator(seed)).float()
        for m in ROWS:
            x = integer_case(fmt, k, (m, k), torch.bfloat16, seed)
            want = reference.linear(x, packed.weight, packed.weight_exp, packed.weight_scale, bias, packed.format)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(linear(x, packed, bias), want), (n, k, m, threads)


@needs_avx512
@every_format
def test_as_good_as_dense_and_the_same_for_all_threads(fmt, amx):
    for seed, (n, k) in enumerate(SHAPES):
        packed = random_packed(fmt, n, k, seed=seed)
        w = inq.unpack(plain(packed), torch.float64)
        for m in ROWS:
            x = torch.randn(m, k, generator=generator(seed)).bfloat16()
            torch.set_num_threads(1)
            y = linear(x, packed)
            dense = F.linear(x, w.bfloat16())
            unit = torch.exp2(packed.weight_exp.double()).view(-1)
            assert_as_good_as_dense(y, F.linear(x.double(), w), dense, unit)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert same_bits(linear(x, packed), y), (n, k, m, threads)


@needs_avx512
@pytest.mark.parametrize("bits", [4, 5])
def test_groups_of_columns_and_of_chunks(bits, amx):
    """More of both than are used together: 32 blocks of 32 columns, of 38, and 2 chunks of K, of 5."""
    fmt, n, k, m = inq.Format(bits), 1200, 1600, 128
    assert " cached=1024x768 " in ops.plan("linear", m, n, k, "bfloat16", "amx", 1)
    packed = random_packed(fmt, n, k, scale=True)
    x = integer_case(fmt, k, (m, k), torch.bfloat16)
    want = reference.linear(x, packed.weight, packed.weight_exp, packed.weight_scale, None, packed.format)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(linear(x, packed), want), threads


@needs_avx512
def test_a_row_does_not_depend_on_the_others(amx):
    # Streamed or in blocks, in one chunk or several: one order of summation.
    packed = random_packed(inq.Format(5), 70, 1100, scale=True)
    x = torch.randn(300, 1100, generator=generator()).bfloat16()
    whole = linear(x, packed)
    for first, last in ((0, 1), (5, 7), (10, 27), (100, 132), (20, 53), (30, 94), (100, 230)):
        assert same_bits(linear(x[first:last], packed), whole[first:last])


@needs_avx512
@pytest.mark.parametrize("case", products.CONVOLUTIONS)
def test_conv2d(case, amx):
    products.test_conv2d(case, "amx")


@needs_avx512
def test_what_holds_for_every_isa(amx):
    bf16 = torch.bfloat16
    for m in (1, 3, 40):
        products.test_not_finite(bf16, m, "amx")
    for m in (1, 4, 40):
        products.test_extreme_exponents_and_scales(bf16, m, "amx")
    products.test_subnormal_results_are_rounded_not_flushed(bf16, "amx")
    products.test_any_strides_and_leading_shape(bf16, "amx")
    products.test_conv2d_not_finite_and_padding("amx")
    products.test_empty("amx")


# --- which kernel, and whether it may be trusted ----------------------------------------------------------------------


def test_plan():
    def plan(m, n, k, dtype="bfloat16", op="linear", threads=2):
        return ops.plan(op, m, n, k, dtype, "amx", threads)

    stream = "stream isa=amx products=bfloat16"
    assert plan(1, 4096, 14336) == f"{stream} rows=1 group=4 threads=2"
    assert plan(16, 4096, 14336) == f"{stream} rows=16 group=4 threads=2"
    assert plan(17, 4096, 14336) == f"{stream} rows=17 group=2 threads=2"
    # From 33 rows on, some k are used by all panels of a task before the next.
    assert plan(33, 4096, 14336) == f"{stream} rows=33 group=128 k_chunk=192 threads=2"
    assert plan(64, 1024, 4096) == f"{stream} rows=64 group=32 k_chunk=192 threads=2"
    assert plan(64, 14336, 4096) == f"{stream} rows=64 group=112 k_chunk=192 threads=2"
    panels = "panels isa=amx products=bfloat16 tile=32x32"
    # cached: the columns whose sums, and the k whose packed rows, are in the second-level cache together.
    assert plan(65, 4096, 14336) == f"{panels} m_block=96 k_chunk=384 cached=512x1152 by=columns threads=2"
    assert plan(256, 4096, 14336) == f"{panels} m_block=256 k_chunk=384 cached=512x384 by=columns threads=2"
    assert plan(4096, 4096, 4096) == f"{panels} m_block=256 k_chunk=384 cached=512x384 by=rows threads=2"
    # Two blocks of rows would leave 46 of 48 threads idle; four of columns would leave a third of three threads idle.
    assert "by=columns" in plan(96, 4096, 4096, threads=48)
    assert "m_block=160 k_chunk=384 cached=128x384 by=rows" in plan(960, 128, 4096, threads=3)
    # A thread's packed rows are at most 8 MB.
    assert "m_block=128" in plan(4096, 4096, 32768)
    assert plan(784, 64, 576, op="conv2d").startswith(panels)
    # Products in float32 are AVX-512's.
    for text in (plan(1, 400, 400, "float32"), plan(99, 400, 400, "float32"), plan(99, 400, 400, op="linear_dx")):
        assert "isa=avx512 products=float32" in text


@needs_avx512
def test_emulation_is_off_unless_asked_for(amx):
    assert ops.isa() == "amx"
    assert ops.set_isa("avx2") == "amx"
    assert ops.emulate_amx(False) == ops.isa() != "avx2"
    if ops.detected_isa() != "amx":
        with pytest.raises(RuntimeError, match='set_isa: expected at most "avx512"'):
            ops.set_isa("amx")


@needs_avx512
def test_wrong_tiles_are_never_used(amx):
    # What happens at the first use where the processor's tiles multiply wrongly.
    with pytest.raises(RuntimeError, match=r"AMX: .* expected .* as AVX-512 gives, got .* INQ_CPU_ISA=avx512"):
        ops.emulate_amx(True, True)
    assert ops.isa() != "amx" or ops.detected_isa() == "amx"


# --- the compiled library ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.skipif(ops.detected_isa() == "portable", reason="the library is not compiled for x86-64")
def test_tile_instructions_are_in_the_amx_kernels_and_nowhere_else():
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    function, found = "", {}
    for line in text.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = header.group(1)
        elif instruction := re.search(r"\t(t(?:ile|dp)\w+|\w+tilecfg)", line):
            found.setdefault(instruction.group(1), set()).add(function)
    expected = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored", "tdpbf16ps"}
    assert set(found) == expected
    assert all("HardwareTiles" in name for names in found.values() for name in names), found
