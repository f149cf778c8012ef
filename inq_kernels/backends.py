"""Which implementation runs an operator. Backends are loaded when first needed, and each absence has its reason."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import cpu, cuda, fragments, layouts, library, reference, slices
from .format import Format
from .layouts import CPU16, STORAGE

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "INQ_BACKEND"
INTERPRETER = "TRITON_INTERPRET"
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A100; tensor cores with bfloat16.
_LEAST_CAPABILITY = (8, 0)


class BackendError(RuntimeError):
    """A backend was asked for by name and is not there."""


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU: TRITON_INTERPRET, as Triton reads it."""
    return os.environ.get(INTERPRETER, "").lower() in ("1", "true", "on", "yes", "y")


def _triton_unavailable() -> str | None:
    """None if Triton's kernels can run, on a GPU or interpreted, else why not. Loads nothing where they cannot."""
    if not interpreting():
        if torch.version.hip is not None:
            return "its kernels decode in PTX, which AMD GPUs do not run"
        if not torch.cuda.is_available():
            return f"there is no CUDA device, and {INTERPRETER}=1, which runs kernels on the CPU, is not set"
        if (found := torch.cuda.get_device_capability()) < _LEAST_CAPABILITY:
            return f"it needs compute capability 8.0 or more, and the device has {found[0]}.{found[1]}"
    try:
        _triton_operators()
    except ImportError as error:
        return f"Triton does not load (pip install 'inq_kernels[triton]'): {error}"
    return None


@functools.cache
def _triton_operators() -> dict[str, Callable]:
    return importlib.import_module("inq_kernels.triton_ops.operators").OPERATORS


@functools.cache
def _availability() -> dict[str, str | None]:
    return {
        "reference": None,
        "cpu": cpu.unavailable(),
        "triton": _triton_unavailable(),
        "cuda": cuda.unavailable(),
    }


def availability() -> dict[str, str | None]:
    """For each backend, None if it can run here, else the reason why not."""
    return dict(_availability())


def select(
    op: str,
    requested: str,
    available: Mapping[str, str | None],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    interpreted: bool = False,
    capability: int = 90,
) -> str:
    """The backend that runs ``op``: a pure function of its arguments.

    Args:
        op: the operator's name.
        requested: a backend's name, or "" for the best there is. A request by name never falls back.
        available: as from ``availability()``.
        device: the type of the tensors' device.
        dtype: of the activations, or of the weights where there are none.
        interpreted: whether Triton's kernels run on the CPU, which is for tests: never chosen, but on request.
        capability: of a CUDA device, 90 for sm_90.

    Raises:
        ValueError: no backend has that name. BackendError: it has, but cannot run here.
    """
    if requested and requested not in available:
        raise ValueError(f"inq.{op}: backend: expected one of {BACKENDS}, got {requested!r}")
    why_not = dict(available)
    if why_not["cpu"] is None and device != "cpu":
        why_not["cpu"] = f"it computes on the CPU, got tensors on {device}"
    if why_not["cpu"] is None and dtype not in cpu.DTYPES:
        why_not["cpu"] = f"it computes in float32 and bfloat16, got {dtype}"
    if why_not["triton"] is None and device != "cuda" and not (device == "cpu" and interpreted):
        why_not["triton"] = f"it computes on CUDA devices, or on the CPU with {INTERPRETER}=1; got tensors on {device}"
    if why_not["triton"] is None and dtype not in TRITON_DTYPES:
        why_not["triton"] = f"it computes in float32, bfloat16 and float16, got {dtype}"
    if why_not["cuda"] is None:
        why_not["cuda"] = _cuda_lacks(op, device, dtype, capability)
    if not requested:
        order = ("cuda", "triton") if device == "cuda" else ("cpu",)
        return next((name for name in order if why_not[name] is None), "reference")
    if why_not[requested] is not None:
        raise BackendError(f"inq.{op}: backend {requested!r} was asked for and cannot run: {why_not[requested]}")
    return requested


def _cuda_lacks(op: str, device: str, dtype: torch.dtype, capability: int) -> str | None:
    """Why the CUDA library cannot run ``op``, if it cannot."""
    if device != "cuda":
        return f"it computes on CUDA devices, got tensors on {device}"
    if op not in cuda.OPERATORS:
        return "the CUDA library does not have it; Triton's backend does"
    if capability < 10 * _LEAST_CAPABILITY[0]:
        return f"it needs compute capability 8.0 or more, and the device has {capability / 10}"
    dtypes = cuda.PRODUCT_DTYPES if op in ("linear", "linear_dx") else cuda.DTYPES
    if dtype not in dtypes:
        names = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
        return f"it computes in {names}, got {dtype}"
    if op == "linear_fp8" and capability != 90:
        return f"it multiplies e4m3 numbers on compute capability 9.0 alone, and the device has {capability / 10}"
    return None


@functools.lru_cache(maxsize=1024)
def _select_here(op: str, requested: str, device: str, dtype: torch.dtype, index: int | None = None) -> str:
    """``index``: of the CUDA device; None is the current one."""
    # A reference that is asked for loads nothing.
    available = dict.fromkeys(BACKENDS) if requested == "reference" else _availability()
    capability = 90
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(index)
        capability = 10 * major + minor
    return select(op, requested, available, device, dtype, interpreting(), capability)


def choose(op: str, like: Tensor, dtype: torch.dtype, backend: str = "") -> str:
    """``select`` for this machine, for tensors on the device of ``like``; ``INQ_BACKEND`` counts as a request."""
    requested = backend or os.environ.get(ENVIRONMENT, "")
    if like.is_cpu:  # asked at each product: a device's type is a new string, whose making takes as long as the rest
        return _select_here(op, requested, "cpu", dtype)
    device = like.device
    at = (device.index,) if device.type == "cuda" else ()
    return _select_here(op, requested, device.type, dtype, *at)


def preferred_layout(device: str, dtype: torch.dtype, fmt: Format, backend: str = "", op: str = "linear") -> str:
    """The layout that ``op`` on ``device`` (a type: "cpu", "cuda") with activations of ``dtype`` is fastest from.

    A backend that was asked for and cannot run gets the storage layout: the product says so.
    """
    try:
        backend = _select_here(op, backend or os.environ.get(ENVIRONMENT, ""), device, dtype)
    except (BackendError, ValueError):
        return STORAGE
    if backend == "cuda":
        return cuda.LAYOUTS[dtype]
    return {"cpu": CPU16, "triton": slices.best(dtype, fmt)}.get(backend, STORAGE)


def plan(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, fmt: Format, capability: int, processors: int
) -> tuple[str, str, str]:
    """(backend, kernel, layout) of a product on a GPU of this kind, which need not be here. INQ_BACKEND counts."""
    there = dict.fromkeys(BACKENDS) | {"cuda": _availability()["cuda"]}
    if capability < 10 * _LEAST_CAPABILITY[0]:
        there["triton"] = f"it needs compute capability 8.0 or more, got {capability / 10:.1f}"
    backend = select(op, os.environ.get(ENVIRONMENT, ""), there, "cuda", dtype, capability=capability)
    if backend == "cuda":
        return (backend, *cuda.plan(op, m, n, k, dtype, fmt, capability, processors))
    if backend != "triton":
        return backend, "decode, then torch's dense product", STORAGE
    try:
        triton_plan = importlib.import_module("inq_kernels.triton_ops.plan")
    except ImportError as error:
        raise BackendError(
            f"a plan of Triton's kernels needs Triton: pip install 'inq_kernels[triton]': {error}"
        ) from error
    return (backend, *triton_plan.plan(op, m, n, k, dtype, fmt, capability, processors))


def layouts_on(device: str) -> tuple[str, ...]:
    """The layouts that some backend's products on ``device`` read as they are."""
    own = (CPU16,) if device == "cpu" and _availability()["cpu"] is None else ()
    gpu = slices.LAYOUTS if device == "cuda" or interpreting() else ()
    tensor_cores = fragments.LAYOUTS if device == "cuda" and _availability()["cuda"] is None else ()
    return (STORAGE, *own, *gpu, *tensor_cores)


def overlaps_itself(t: Tensor) -> bool:
    """Whether elements of ``t`` share memory, or may: an expanded tensor's do."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return False
    # Sorted by stride, each dimension must step over all that the smaller ones reach.
    reach = 0
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


# --- torch.ops.inq.* --------------------------------------------------------------------------------------------------

# Where products find their weight's layout, and the arguments that turn it back into the storage layout.
_FORMAT_FIELDS = {field.name for field in dataclasses.fields(Format)}
_TO_REFERENCE: dict[str, Callable] = {
    "prepack": lambda weight, k, fmt, layout: layouts.prepack(weight, k, fmt, layout),
    "unprepack": lambda weight, n, k, fmt, layout: layouts.unprepack(weight, n, k, fmt, layout),
}


def _row_length(given: Mapping) -> int:
    """K of a product's weight, from its other arguments."""
    if "k" in given:
        return given["k"]
    if "kernel_size" not in given:
        return given["x"].shape[-1]
    channels = (given["input_size"] if "input_size" in given else given["x"].shape)[1]
    return channels // given["groups"] * given["kernel_size"][0] * given["kernel_size"][1]


def _reference(op: str) -> Callable:
    """``reference.<op>`` with the operator's arguments: ``bits, levels, …`` as a Format, weights in any layout."""
    names = [argument.name for argument in getattr(torch.ops.inq, op).default._schema.arguments]
    function = _TO_REFERENCE.get(op) or getattr(reference, op)

    def call(*args):
        given = dict(zip(names, args, strict=True))
        given.pop("backend", None)
        fields = {name: given.pop(name) for name in _FORMAT_FIELDS & given.keys()}
        if fields:
            given["fmt"] = fmt = Format(**fields)
        if op not in _TO_REFERENCE and (layout := given.pop("layout", STORAGE)) != STORAGE:
            n, k = given["weight_exp"].shape[0], _row_length(given)
            given["weight"] = layouts.unprepack(given["weight"], n, k, fmt, layout)
        return function(**given)

    return call


def _attach(op: str) -> None:
    """Implement ``torch.ops.inq.<op>``: choose a backend and call it."""
    plain = _reference(op)
    arguments = getattr(torch.ops.inq, op).default._schema.arguments
    forced = arguments[-1].name == "backend"
    # unpack has no float tensor among its arguments; codes alone are moved in no dtype.
    dtype_at = next((i for i, argument in enumerate(arguments) if argument.name == "dtype"), None)
    bytes_only = op in ("prepack", "unprepack")
    written = [i for i, argument in enumerate(arguments) if argument.alias_info is not None]
    names = [argument.name for argument in arguments]
    has_threshold = "threshold" in names
    # Of operators on many tensors: a number or a tensor for each.
    lists = [i for i, argument in enumerate(arguments) if isinstance(argument.type, torch.ListType)]
    lists = lists if lists[:1] == [0] else []

    def product(*args):
        like = args[0]
        backend = choose(op, like, like.dtype, args[-1])
        return plain(*args) if backend == "reference" else _implementation(op, backend)(*args)

    def call(*args):
        like = args[0]
        for i in lists:
            _check_length(op, names[i], args[i], len(like))
        for i in written:
            _check_own_memory(op, names[i], args[i])
        if has_threshold:
            _check_threshold(op, args[names.index("threshold")], like)
        if isinstance(like, list):
            if not like:
                return None
            like = _hardest(like)
        dtype = torch.float32 if bytes_only else like.dtype if dtype_at is None else args[dtype_at]
        backend = choose(op, like, dtype)
        if backend == "reference":
            return plain(*args)
        if bytes_only:
            backend = _mover(backend, args[-1])
        result = _implementation(op, backend)(*args)
        for i in written:
            _count_as_written(args[i])
        return result

    library.implement(op, product if forced else call)


def _mover(backend: str, layout: str) -> str:
    """Who moves a weight into ``layout`` or out of it: Triton's kernels where it is theirs, for which the CUDA library
    has plain torch alone. A request is kept to."""
    theirs = backend == "cuda" and layout in slices.LAYOUTS and not os.environ.get(ENVIRONMENT)
    return "triton" if theirs and _availability()["triton"] is None else backend


def _implementation(op: str, backend: str) -> Callable:
    if backend == "cpu":
        return getattr(cpu, op)
    return cuda.OPERATORS[op] if backend == "cuda" else _triton_operators()[op]


def _hardest(tensors: list[Tensor]) -> Tensor:
    """One of those whose dtype the fewest backends compute with."""
    dtypes = [t.dtype for t in tensors]
    for dtype in (torch.float64, *(set(dtypes) - set(cpu.DTYPES))):
        if dtype in dtypes:
            return tensors[dtypes.index(dtype)]
    return tensors[0]


def _check_length(op: str, name: str, values: list, expected: int) -> None:
    """ValueError unless there is one for each tensor. Without momentum there are no buffers."""
    if len(values) != expected and not (name == "momentum_buffers" and not values):
        raise ValueError(f"inq.{op}: {name}: expected {expected}, got {len(values)}")


def _check_own_memory(op: str, name: str, tensors: Tensor | list[Tensor]) -> None:
    """ValueError, before anything is changed, for tensors that cannot be written back."""
    for i, t in enumerate(tensors if isinstance(tensors, list) else [tensors]):
        if overlaps_itself(t):
            at = f"[{i}]" if isinstance(tensors, list) else ""
            raise ValueError(
                f"inq.{op}: {name}{at}: expected memory of its own for each value, got shape {list(t.shape)} with "
                f"strides {t.stride()}"
            )


def _check_threshold(op: str, threshold: Tensor, w: Tensor) -> None:
    """TypeError, ValueError: no ``partition_threshold`` of ``w``. Kernels take its address as it is."""
    if threshold.dtype != torch.int64:
        raise TypeError(f"inq.{op}: threshold: expected torch.int64, got {threshold.dtype}")
    if list(threshold.shape) != [2] or threshold.device != w.device:
        raise ValueError(
            f"inq.{op}: threshold: expected shape [2] on {w.device}, got {list(threshold.shape)} on {threshold.device}"
        )


def _count_as_written(tensors: Tensor | list[Tensor]) -> None:
    """What a torch operator does to the tensors that it changes: autograd notices if it needed their old values."""
    tensors = [t for t in (tensors if isinstance(tensors, list) else [tensors]) if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)


for _op in library.SCHEMAS:
    _attach(_op)
