"""The compiled library packs and unpacks as the reference does: every format, dtype, instruction set, thread count."""

import pytest
import torch
from support import FORMATS, generator, same_bits

from inq_kernels import cpu, reference

# No skip: without the library this file fails, and says why. With INQ_BACKEND=reference nothing else loads it.
assert cpu.unavailable() is None, cpu.unavailable()
leaf = torch.ops.inq_cpu
ISAS = ("portable", "avx2", "avx512")
ISAS = ISAS[: ISAS.index(leaf.detected_isa().replace("amx", "avx512")) + 1]

pytestmark = pytest.mark.usefixtures("native_as_before")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_bits_of_the_reference(fmt, dtype, isa):
    dense = fmt.levels == "dense"
    leaf.set_isa(isa)
    for n, k, count in ((1, 1, 1), (3, 7, 2), (5, 257, 3), (40, 1000, 2), (40, 1000, 3)):
        torch.set_num_threads(count)
        n1 = torch.randint(-3, 3, (n, 1), generator=generator(k)).to(torch.int8)
        n1[0] = 127
        w = reference.quantize(torch.randn(n, k, generator=generator(n)).to(dtype), n1, fmt)
        codes = leaf.pack(w, n1, fmt.bits, dense)
        assert torch.equal(codes, reference.pack(w, n1, fmt))
        for scale in (None, torch.randn(n, 1, generator=generator(n))):
            got = leaf.unpack(codes, n1, scale, k, fmt.bits, dense, dtype)
            assert same_bits(got, reference.unpack(codes, n1, scale, k, fmt, dtype))
