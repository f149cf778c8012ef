"""Running emulated kernels from tests: guarded tensors, seeds, and one error that lists what the emulator saw.

library = load("linear")                       # tests/emulator/bind_linear.cpp and csrc/cuda/linear.cu
with emulated(library, seed=3) as device:
    x = device.input(x)                        # a copy between guards that kernels may only read
    y = device.output((m, n), torch.float16)   # unwritten: reading it is a fault
    device.call(library.linear, x.data_ptr(), y.data_ptr(), …)
y  # checked: the with statement raises EmulatorError if anything was wrong
"""

import contextlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "emulator"))
from build import load  # noqa: F401

GUARD = 512  # bytes before and behind each tensor
_POISON = 0xA5


def seeds():
    """The schedules each test tries: INQ_EMULATOR_SEEDS of them, 3 unless told."""
    return range(int(os.environ.get("INQ_EMULATOR_SEEDS", "3")))


class EmulatorError(AssertionError):
    """What kernels did wrong: ``faults`` are (kind, file, line, block, thread, count, detail)."""

    def __init__(self, faults, seed):
        self.faults = faults
        lines = [
            f"{kind} at {Path(file).name}:{line}, block {block}, thread {thread}"
            f"{f' ({count} times)' if count > 1 else ''}: {detail}"
            for kind, file, line, block, thread, count, detail in faults[:12]
        ]
        more = [f"… and at {len(faults) - 12} more places"] if len(faults) > 12 else []
        super().__init__("\n".join([f"the emulator, with seed {seed}, found:", *lines, *more]))


class Device:
    """The tensors that kernels may reach, each between guards and copied from the caller's."""

    def __init__(self, library, seed):
        self.library, self.seed, self._whole = library, seed, []

    def _place(self, shape, stride, dtype, name, writable, initialised, offset):
        size = torch.empty(0, dtype=dtype).element_size()
        count = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        whole = torch.full((count * size + 2 * GUARD + 256,), _POISON, dtype=torch.uint8)
        begin = -whole.data_ptr() % 256 + GUARD + offset
        self._whole.append((name, whole, begin, count * size))
        inside = whole[begin : begin + count * size]
        self.library._add_buffer(name, inside.data_ptr(), count * size, writable, initialised, min(size, 4))
        view = inside.view(dtype) if count else torch.empty(0, dtype=dtype)
        return view.as_strided(shape, stride)

    def _copy(self, tensor, name, writable, offset):
        copy = self._place(tensor.shape, tensor.stride(), tensor.dtype, name, writable, True, offset)
        return copy.copy_(tensor)

    def input(self, tensor, name="input", offset=0):
        """A copy with the same strides, ``offset`` bytes off a multiple of 256; a write to it is a fault."""
        return None if tensor is None else self._copy(tensor, name, False, offset)

    def inout(self, tensor, name="inout", offset=0):
        """A copy that kernels may read and write."""
        return self._copy(tensor, name, True, offset)

    def output(self, shape, dtype, name="output", offset=0, stride=None):
        """Bytes 0xA5 that kernels may write, and read behind their own writes."""
        shape = torch.Size(shape)
        stride = stride or torch.empty(shape, dtype=torch.uint8, device="meta").stride()
        return self._place(shape, stride, dtype, name, True, False, offset)

    def call(self, function, *arguments):
        """Calls an operator of the library, which returns its cudaError_t as an int, or nothing."""
        status = function(*arguments)
        if not self.library._faults():
            assert not status, f"{function.__name__} returned CUDA error {status}"

    def traffic(self):
        """{name: (bytes read, bytes written)} of what kernels have done with each tensor."""
        return self.library._traffic()

    def check(self):
        faults = self.library._faults()
        if faults:
            raise EmulatorError(faults, self.seed)
        for name, whole, begin, count in self._whole:
            for side, guard in (("before", whole[:begin]), ("behind", whole[begin + count :])):
                assert (guard == _POISON).all(), f"written {side} {name!r}"


@contextlib.contextmanager
def emulated(library, seed=0, **options):
    """A device with the schedule of ``seed``; the options are those of ``Options`` in engine.h."""
    defaults = dict(processors=4, capability=90, resident=8, capacity=0, short_accumulator=0, seconds=60)
    for name, value in {**defaults, **options}.items():
        library._option(name, value)
    library._reset(seed)
    library._clear_buffers()
    device = Device(library, seed)
    try:
        yield device
        device.check()
    finally:
        library._clear_buffers()
