"""csrc/cuda/dense.cu and upload.cu in the emulator: what cuBLAS multiplies, and what becomes of its sums."""

import pytest
import torch
from support import FORMATS, generator, random_packed, same_bits
from support_emulator import emulated, load, seeds

from inq_kernels import fragments, reference, slices

TYPES = {torch.float16: (fragments.FP16, 0), torch.bfloat16: (fragments.BF16, 1), torch.float32: (None, 2)}
LEVELS = ("paper4", "dense4", "paper5", "dense5")
all_seeds = pytest.mark.parametrize("seed", seeds())


@pytest.fixture(scope="module")
def library():
    return load("dense", "dense.cu", "upload.cu")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@all_seeds
def test_decoded_weights_are_those_of_the_definition(library, dtype, fmt, seed):
    layout, number = TYPES[dtype]
    codec = fragments.codec(layout, fmt)
    for n, k in ((1, 1), (31, 64), (16, 100), (33, 257), (48, 96)):
        packed = random_packed(fmt, n, k, seed=seed)
        weight = fragments.prepack(reference.unpack_codes(packed.weight, fmt.bits, k), fmt, layout)
        with emulated(library, seed) as device:
            out = device.output((n, k), dtype, "out")
            given = device.input(weight, "weight")
            device.call(library.decode, given.data_ptr(), out.data_ptr(), n, k, number, LEVELS.index(slices.kind(fmt)))
        # Times 2^(n1 + 1 − magnitudes − base): exact in float64.
        unit = torch.exp2(packed.weight_exp.double() + 1 - fmt.magnitudes - codec.base)
        assert torch.equal(
            out.double() * unit, reference.unpack(packed.weight, packed.weight_exp, None, k, fmt, torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@all_seeds
def test_sums_get_their_rows_factors_and_bias(library, dtype, bias, scaled, seed):
    for m, n in ((1, 1), (7, 33), (9, 300)):
        g = generator(seed + n)
        sums = torch.randn(m, n, generator=g)
        exponents = torch.randint(-100, 101, (n, 1), generator=g).to(torch.int8)
        scale = torch.rand(n, 1, generator=g) + 0.5 if scaled else None
        offset = None if bias is None else torch.randn(n, generator=g).to(bias)
        y = sums * torch.exp2(exponents.double() - 3).T.float()
        y = y if scale is None else y * scale.T
        y = y if offset is None else y + offset.float()
        with emulated(library, seed) as device:
            out = device.output((m, n), dtype, "out")
            parts = [device.input(t, str(i)) for i, t in enumerate((sums, exponents, scale, offset))]
            places = [0 if t is None else t.data_ptr() for t in parts]
            kind = TYPES[bias or torch.float32][1]
            device.call(library.finish, *places, out.data_ptr(), m, n, -3, kind, TYPES[dtype][1])
        assert same_bits(out, y.to(dtype))


@pytest.mark.parametrize("size", [16, 4032, 4048, 10_000 // 16 * 16])
def test_tables_arrive_whole(library, size):
    table = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator(size))
    with emulated(library) as device:
        out = device.output((size,), torch.uint8, "table")
        device.call(library.upload, out.data_ptr(), bytes(table.tolist()))
    assert torch.equal(out, table)
