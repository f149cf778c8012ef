"""The emulator of CUDA kernels on its own: right kernels give exact results and no fault, wrong ones are caught."""

import re
from pathlib import Path

import pytest
import torch
from support_emulator import EmulatorError, emulated, load, seeds

FOLDER = Path(__file__).resolve().parent / "emulator"
BAD = sorted(FOLDER.glob("kernels_bad*.cu"))
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def good():
    return load("good", "kernels_good.cu")


@pytest.fixture(scope="module")
def bad():
    return load("bad", *(file.name for file in BAD))


def integers(*shape, dtype=torch.int32, most=100):
    return torch.randint(-most, most + 1, shape).to(dtype)


def run_good(library, name, seed, a, b, shape, dtype, n=0, m=0, inout=False, **options):
    """c of ``shape``; b may be written where ``inout``, c begins with zeros then."""
    with emulated(library, seed, **options) as device:
        a = device.input(a, "a")
        if b is not None:
            b = device.inout(b, "b") if inout else device.input(b, "b")
        c = device.inout(torch.zeros(shape, dtype=dtype), "c") if inout else device.output(shape, dtype, "c")
        addresses = [0 if x is None else x.data_ptr() for x in (a, b, c)]
        device.call(library.run, name, *addresses, n, m)
    return c


@pytest.mark.parametrize("seed", seeds())
class TestGood:
    def test_reduction(self, good, seed):
        a = integers(5, 1000)
        c = run_good(good, "reduction", seed, a, None, (5,), torch.int32, 1000, 5)
        assert torch.equal(c, a.sum(1, dtype=torch.int32))

    @pytest.mark.parametrize("shape", [(64, 64), (45, 70)])
    def test_transpose(self, good, seed, shape):
        a = integers(*shape, dtype=torch.int16)
        c = run_good(good, "transpose", seed, a, None, shape[::-1], torch.int16, shape[1], shape[0])
        assert torch.equal(c, a.T)

    def test_mma_pipelined(self, good, seed):
        a, b = integers(16, 160, dtype=torch.half, most=8), integers(8, 160, dtype=torch.half, most=8)
        c = run_good(good, "mma_pipelined", seed, a, b, (16, 8), torch.float32, 160)
        assert torch.equal(c, a.float() @ b.float().T)

    def test_mma_transposed(self, good, seed):
        a, b = integers(2, 16, 16, dtype=torch.bfloat16, most=8)
        c = run_good(good, "mma_transposed", seed, a, b, (16, 16), torch.float32)
        assert torch.equal(c, a.float() @ b.float())

    def test_atomics(self, good, seed):
        a = torch.randint(0, 2**30, (200,), dtype=torch.int32)
        c = run_good(good, "atomics", seed, a, a, (3,), torch.int64, 200, inout=True)
        every = 0
        for x in a.tolist():
            every |= x
        assert c.view(torch.int32)[:3].tolist() == [every, a.max(), -a.max()]
        assert c[2] == a.sum()

    def test_stream_k(self, good, seed):
        a = integers(37, 100)
        c = run_good(good, "stream_k", seed, a, torch.zeros(38, dtype=torch.int32), (1,), torch.int32, 100, 37, True)
        assert c.item() == a.sum()

    def test_last_block(self, good, seed):
        a = integers(9, 32)
        c = run_good(good, "last_block", seed, a, torch.zeros(10, dtype=torch.int32), (1,), torch.int32, 0, 9, True)
        assert c.item() == a.sum()

    def test_histogram(self, good, seed):
        a = torch.randint(0, 50, (700,), dtype=torch.int32)
        c = run_good(good, "histogram", seed, a, None, (50,), torch.int32, 50, 700, True)
        assert torch.equal(c, torch.bincount(a, minlength=50).int())

    def test_named_barriers(self, good, seed):
        a = integers(64)
        c = run_good(good, "named_barriers", seed, a, None, (64,), torch.int32, 0, 5)
        assert torch.equal(c, a + 10)

    def test_warp_functions(self, good, seed):
        a = torch.randint(0, 2**31 - 1, (32,)).int()
        c = run_good(good, "warp_functions", seed, a, None, (6, 32), torch.int32)
        x, bits = a.long(), 1 << torch.arange(32)
        expected = [
            ((x % 2) * bits).sum().expand(32),
            (x == 77).any().long().expand(32),
            (((x % 4)[:, None] == (x % 4)[None, :]) * bits).sum(1),
            x.roll(-5),
            torch.cat([x[:3], x[:-3]]),
            # Four lanes hold a row of eight: as one matrix it is transposed.
            a.view(torch.int16).view(8, 8).T.contiguous().view(torch.int32).view(32).long(),
        ]
        assert torch.equal(c.long() & 0xFFFFFFFF, torch.stack(expected) & 0xFFFFFFFF)

    def test_bulk(self, good, seed):
        a = integers(512)
        assert torch.equal(run_good(good, "bulk", seed, a, None, (512,), torch.int32, 2048), a)

    @pytest.mark.parametrize("swizzled", [False, True])
    @pytest.mark.parametrize(("column", "row"), [(0, 0), (8, 3), (-5, -3), (40, 17), (60, 0), (0, -9)])
    def test_a_box_has_zeros_outside(self, good, seed, column, row, swizzled):
        b = integers(20, 56, dtype=torch.bfloat16)[:, :48]
        name = "box swizzled" if swizzled else "box"
        at = (row + 128) * 256 + column + 128
        c = run_good(good, name, seed, b, b, (8, 4, 8), torch.bfloat16, 0, at)
        padded = torch.zeros(60, 140, dtype=torch.bfloat16)
        padded[20:40, 40:88] = b
        expected = padded[20 + row : 28 + row, 40 + column : 72 + column].reshape(8, 4, 8)
        if swizzled:  # 16-byte columns of row r, of 64 bytes, are exchanged by r / 2 % 4
            place = torch.arange(4)[None, :] ^ (torch.arange(8) // 2)[:, None]
            expected = torch.zeros_like(expected).scatter(1, place[..., None].expand(8, 4, 8), expected)
        assert torch.equal(c, expected)

    @pytest.mark.parametrize(
        ("name", "columns", "dtype"), [("f16", 64, torch.half), ("bf16", 128, torch.bfloat16), ("e4m3", 32, E4M3)]
    )
    @pytest.mark.parametrize("k", [64, 352])
    def test_wgmma_ring(self, good, seed, name, columns, dtype, k):
        a, b = integers(64, k, dtype=dtype, most=8), integers(columns, k, dtype=dtype, most=8)
        with emulated(good, seed) as device:
            x, w, c = device.input(a, "a"), device.input(b, "b"), device.output((64, columns), torch.float32, "c")
            device.call(good.run, f"wgmma_{name}", x.data_ptr(), w.data_ptr(), c.data_ptr(), k, 0)
        assert torch.equal(c, a.float() @ b.float().T)

    def test_wgmma_written_by_threads(self, good, seed):
        a, b = torch.randn(64, 16).half(), torch.randn(16, 16).half()
        c = run_good(good, "wgmma_written_by_threads", seed, a, b, (64, 16), torch.float32)
        torch.testing.assert_close(c, (a.double() @ b.double().T).float(), rtol=1e-6, atol=1e-6)


def test_the_short_accumulator_of_e4m3(good):
    """With 14 bits 2^12 + 1 is exact, and 2^14 + 1 is not."""
    for large, kept in ((64.0, 1), (128.0, 0)):
        a, b = torch.zeros(64, 64), torch.zeros(32, 64)
        a[:, 0], b[:, 0], a[:, 1], b[:, 1] = large, large, 1, 1
        c = None
        for short in (0, 1):
            with emulated(good, 0, short_accumulator=short) as device:
                x, w = device.input(a.to(E4M3)), device.input(b.to(E4M3))
                c = device.output((64, 32), torch.float32)
                device.call(good.run, "wgmma_e4m3", x.data_ptr(), w.data_ptr(), c.data_ptr(), 64, 0)
            assert (c == large * large + (kept if short else 1)).all()


def kernels_that_are_wrong():
    """(name, its file, its first line, {(kind, line), …}) of each kernel, from its comments."""
    kernels = []
    for file in BAD:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if found := re.match(r"__global__ void (\w+)\(", line):
                kernels.append((found[1], file, number, set()))
            elif found := re.search(r"// caught: (.*)$", line):
                kernels[-1][3].update((kind, number) for kind in re.split(r"\s*(?:,|\bor\b)\s*", found[1]) if kind)
    return kernels


def run_bad(library, name, file, seed):
    a = torch.arange(1024, dtype=torch.int32)
    # Sixteen blocks of 128 threads are what one processor has room for.
    processors, crowd = (1, 17) if name == "grid_barrier" else (4, 1)
    with emulated(library, seed, processors=processors, seconds=0.2 if name == "endless_loop" else 60) as device:
        x, y = device.input(a, "a"), device.inout(torch.zeros(1024, dtype=torch.int32), "b")
        z = device.output((1024,), torch.int32, "c")
        blocks = 2 if name.startswith(("same_output", "handshake", "last_block")) else crowd
        threads = 384 if name == "too_many_registers" else 128
        run = getattr(library, f"run_{file.stem}")
        device.call(run, name, x.data_ptr(), y.data_ptr(), z.data_ptr(), blocks, threads)
    return z


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("kernel", kernels_that_are_wrong(), ids=lambda kernel: kernel[0])
def test_a_wrong_kernel_is_caught(bad, kernel, seed):
    name, source, first, expected = kernel
    if not expected:
        assert name == "wrong_swizzle"
        c = run_bad(bad, name, source, seed)
        a = torch.arange(1024, dtype=torch.int32).view(32, 32)
        assert not torch.equal(c[:32].view(8, 4), a[:8, 4:8])
        return
    with pytest.raises(EmulatorError) as caught:
        run_bad(bad, name, source, seed)
    faults = caught.value.faults
    # One mistake shows in several ways (a race from either side, and what has not been written); the one that the
    # comment says is among them, and nothing is said of lines outside the kernel.
    assert {(kind, line) for kind, file, line, *_ in faults} & expected, str(caught.value)
    last = max(line for kind, line in expected) + 8
    for kind, file, line, *_ in faults:
        assert file.endswith(f"/{source.name}"), str(caught.value)
        assert first < line <= last or kind == "race", str(caught.value)


@pytest.mark.parametrize(("capability", "name"), [(80, "wgmma_f16"), (100, "wgmma_f16"), (89, "bulk")])
def test_what_an_architecture_has_not(good, capability, name):
    """The files of Hopper's kernels are compiled for sm_90a alone; elsewhere they would do nothing."""
    a = torch.zeros(64, 64, dtype=torch.half)
    with pytest.raises(EmulatorError, match=f"capability.*on sm_{capability}"):
        run_good(good, name, 0, a, a, (64, 64), torch.float32, 64, capability=capability)


def test_shared_memory_of_an_architecture(bad):
    """100 KB, which Hopper has and an RTX 3090 has not."""
    for capability, fits in ((90, True), (80, True), (86, False), (120, False)):
        with emulated(bad, capability=capability) as device:
            if fits:
                device.call(bad.launch_with_shared, 100 << 10)
                continue
            assert bad.launch_with_shared(100 << 10) == 1
            assert [fault[0] for fault in bad._faults()] == ["launch"]
            bad._reset(0)


def test_conversions_round_to_nearest_even(good):
    """8- and 16-bit numbers both ways, and floats near the middle of two neighbours."""
    for dtype, bits, name in ((torch.half, 16, "f16"), (torch.bfloat16, 16, "bf16"), (E4M3, 8, "e4m3")):
        codes = torch.arange(0, 2**bits, 1 if bits == 8 else 7).to(torch.int16 if bits == 16 else torch.uint8)
        values = codes.view(dtype).float()
        back = torch.tensor([getattr(good, f"_from_{name}")(int(c) & (2**bits - 1)) for c in codes])
        assert ((back == values) | (back.isnan() & values.isnan())).all()
        finite = torch.arange(2**bits).to(codes.dtype).view(dtype).float()
        finite = finite[finite.isfinite()].unique()
        middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
        steps = torch.cat([middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1), finite])
        steps = steps[steps.abs() <= finite.max()][:: 1 if bits == 8 else 11]
        rounded = torch.tensor([getattr(good, f"_to_{name}")(float(x)) for x in steps])
        expected = steps.to(dtype).view(torch.int16 if bits == 16 else torch.uint8).int() & (2**bits - 1)
        zero = (rounded & (2 ** (bits - 1) - 1)) == 0
        assert torch.equal(rounded[~zero], expected[~zero])
