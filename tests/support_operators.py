"""torch.ops.inq_cuda.* as csrc/register_cuda*.cpp makes them, with CPU tensors and the emulator for CUDA.

with on_device(capability=80) as device:
    y = cuda.linear(x, …)  # or torch.ops.inq_cuda.linear(x, …)
y  # the with statement has raised EmulatorError for what kernels did wrong, or a launch on another device or stream

Every tensor is on one device, but for those in ``elsewhere``. Tensors that an operator only reads may not be written.
"""

import contextlib
import functools
from pathlib import Path

import torch
from support_emulator import emulated, load

CSRC = Path(__file__).resolve().parent.parent / "csrc"
_kinds: dict[tuple[int, int], int] = {}
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@functools.cache
def library():
    """The emulated operators; loading them gives ``torch.ops.inq_cuda`` its CPU implementations."""
    module = load(
        "operators",
        *(f"../{path.name}" for path in sorted(CSRC.glob("register_cuda*.cpp"))),
        *(path.name for path in sorted(CSRC.glob("cuda/*.cu"))),
    )
    module.lib = torch.library.Library("inq_cuda", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("inq_cuda::") and name != "inq_cuda::plan":
            op = getattr(torch.ops.inq_cuda, name.removeprefix("inq_cuda::")).default
            module.lib.impl(op._schema.name, functools.partial(_call, op), "CPU")
    return module


def _call(op, *args):
    _place(op, args)
    guards = library()._guards()
    try:
        return op.redispatch(_CUDA, *args)
    finally:
        assert library()._guards() == guards, f"{op}: the device is not set back"


def _place(op, args):
    """Tell the emulator of the operator's tensors; those that share memory are one buffer."""
    found = []
    for argument, value in zip(op._schema.arguments, args, strict=False):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for i, t in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(t, torch.Tensor) and t.numel():
                size = t.element_size()
                reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                name = f"{argument.name}[{i}]" if isinstance(value, (list, tuple)) else argument.name
                found.append((t.data_ptr(), t.data_ptr() + reach * size, writes, min(size, 4), name))
    merged = []
    for begin, end, writes, granule, name in sorted(found):
        if merged and begin < merged[-1][1]:
            before = merged[-1]
            end, writes = max(end, before[1]), writes or before[2]
            merged[-1] = (before[0], end, writes, min(granule, before[3]), f"{before[4]}, {name}")
        else:
            merged.append((begin, end, writes, granule, name))
    library()._clear_buffers()
    for begin, end, writes, granule, name in merged:
        library()._add_buffer(name, begin, end - begin, writes, True, granule)


@contextlib.contextmanager
def on_device(capability=90, processors=4, seed=0, elsewhere=None, fails_at=-1, **options):
    """Operators run on a device of this kind. ``elsewhere``: {tensor: its device, −1 for the CPU}; ``fails_at``: the
    number of the launch, copy or clear that CUDA refuses."""
    others = {t.data_ptr(): index for t, index in (elsewhere or [])}
    with emulated(library(), seed, capability=capability, processors=processors, **options) as device:
        # Operators ask once what a device is, so each kind has a number of its own.
        library()._devices(10 + _kinds.setdefault((capability, processors), len(_kinds)), others, fails_at)
        yield device
