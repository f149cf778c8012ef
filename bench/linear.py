"""``linear``, its gradient ``linear_dx`` and, on a GPU, ``linear_fp8``: products with packed weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import reference
from . import baselines, gpu_baselines, shapes
from .case import DTYPES, Case, Context, Op, Request, Work, as_good_as_dense, attempt, nbytes, normal, runner, some
from .weights import bits_in_use, rotated


def _grid(request: Request) -> Iterator[tuple[int, int, int, str, int]]:
    """(K, N, bits, dtype, M) of ``linear``."""
    if request.device == "cuda":
        yield from _grid_gpu(request)
        return
    held_down = request.isa != "native"
    wanted = request.shapes or (shapes.SHAPES[:1] if request.quick else shapes.SHAPES)
    for k, n in wanted:
        # Held down, the other shapes are sampled.
        few = held_down and not request.shapes and (k, n) != shapes.MAIN
        for bits in request.bits or ((4,) if few else (4, 5)):
            # Without AVX-512 there is no bfloat16 arithmetic: float32 is the dtype to compare there.
            for dtype in request.dtypes or (("float32",) if request.isa == "avx2" else ("bfloat16",)):
                grid = shapes.MS_MAIN if (k, n) == shapes.MAIN else shapes.MS_FEW if few else shapes.MS
                grid = shapes.MS_QUICK if request.quick else grid
                # Held down to AVX2, torch's bfloat16 product is slower than that of float32.
                most = shapes.MAX_FLOPS["float32" if request.isa == "avx2" else dtype]
                if (k, n) == shapes.MAIN and (request.isa, dtype) == ("avx2", "float32"):
                    most = shapes.MAX_FLOPS_AVX2_MAIN
                for m in request.ms or grid:
                    if request.ms or 2.0 * m * n * k <= most:
                        yield k, n, bits, dtype, m


def _grid_gpu(request: Request) -> Iterator[tuple[int, int, int, str, int]]:
    """The main shape in full; the others at 4 bits and bfloat16."""
    for k, n in request.shapes or (shapes.SHAPES_GPU[:1] if request.quick else shapes.SHAPES_GPU):
        main = (k, n) == shapes.MAIN_GPU and not request.quick
        ms = shapes.MS_GPU_QUICK if request.quick else shapes.MS_GPU_MAIN if main else shapes.MS_GPU
        for bits in request.bits or ((4, 5) if main else (4,)):
            dtypes = ("bfloat16", "float16", "float32") if main and bits == 4 else ("bfloat16",)
            for dtype in request.dtypes or dtypes:
                for m in request.ms or (shapes.MS_GPU_FLOAT32 if dtype == "float32" else ms):
                    yield k, n, bits, dtype, m


def _params(k: int, n: int, bits: int, dtype: str, m: int) -> dict[str, object]:
    return {"shape": f"{k}x{n}", "k": k, "n": n, "m": m, "bits": bits, "dtype": dtype}


def _cases(request: Request) -> Iterator[Case]:
    for k, n, bits, dtype, m in _grid(request):

        def build(context: Context, k=k, n=n, bits=bits, dtype=dtype, m=m) -> Work:
            return _linear(context, k, n, bits, dtype, m)

        yield Case("linear", _params(k, n, bits, dtype, m), build, (k, n))


def _linear(context: Context, k: int, n: int, bits: int, dtype: str, m: int) -> Work:
    w, packed, weights = rotated(context, n, k, bits, dtype)
    x = context.get(("x", m, dtype), lambda: normal((m, k), DTYPES[dtype], device=context.device))
    tail = (bits, packed.format.levels, packed.layout, context.backend)
    moved = nbytes(x, packed.weight, packed.weight_exp) + m * n * x.element_size()
    candidate = runner(torch.ops.inq.linear, [(x, *each, None, *tail) for each in weights], moved)

    def check() -> str | None:
        # The largest error is compared, which takes a few thousand to be worth something.
        rows, columns = some(m), some(n, max(96, 2048 // m))
        y = candidate.run()[rows][:, columns]
        exact = x[rows].double() @ w.dense(torch.float64, columns).T
        dense = torch.nn.functional.linear(x[rows], w.dense(x.dtype, columns))
        return as_good_as_dense(y, exact, dense, torch.exp2(w.n1[columns].double()).T)

    if context.device == "cuda":
        others = gpu_baselines.linear_baselines(context, w, m, dtype, x, packed)
    else:
        others = baselines.linear_baselines(context, w, m, dtype, x)
    return Work(
        candidate,
        others,
        check,
        2 * m * n * k,
        dtype,
        {"bits_per_weight": bits_in_use(packed), "layout": packed.layout},
    )


def _dx_cases(request: Request) -> Iterator[Case]:
    grid_ms = (64,) if request.quick else (1, 16, 256, 1024)
    if request.isa != "native":
        return
    for k, n in request.shapes or (shapes.MAIN_GPU if request.device == "cuda" else shapes.MAIN,):
        for bits in request.bits or (4,):
            for dtype in request.dtypes or ("bfloat16",):
                for m in request.ms or grid_ms:

                    def build(context: Context, k=k, n=n, bits=bits, dtype=dtype, m=m) -> Work:
                        return _linear_dx(context, k, n, bits, dtype, m)

                    yield Case("linear_dx", _params(k, n, bits, dtype, m), build, (k, n))


def _linear_dx(context: Context, k: int, n: int, bits: int, dtype: str, m: int) -> Work:
    w, packed, weights = rotated(context, n, k, bits, dtype)
    grad = normal((m, n), DTYPES[dtype], device=context.device)
    tail = (k, bits, packed.format.levels, packed.layout, context.backend)
    moved = nbytes(grad, packed.weight, packed.weight_exp) + m * k * grad.element_size()
    candidate = runner(torch.ops.inq.linear_dx, [(grad, *each, *tail) for each in weights], moved)

    def check() -> str | None:
        rows, groups = some(m), some((k + 7) // 8, 16)
        columns = (groups[:, None] * 8 + torch.arange(8)).view(-1)
        columns = columns[columns < k]
        dx = candidate.run()[rows][:, columns]
        part = w.dense(torch.float64, groups=groups)[:, : columns.numel()]
        exact, dense = grad[rows].double() @ part, grad[rows] @ part.to(grad.dtype)
        return as_good_as_dense(dx, exact, dense)

    def dense():
        full = context.copies(("dense", dtype), lambda: w.dense(DTYPES[dtype]))
        return runner(torch.mm, [(grad, each) for each in full], nbytes(grad, full[0]) + m * k * grad.element_size())

    baselines = {f"dense {dtype}": attempt(dense), **gpu_baselines.triton(context, packed, grad, "linear_dx", (k,))}
    return Work(candidate, baselines, check, 2 * m * n * k, dtype)


def _fp8_cases(request: Request) -> Iterator[Case]:
    if request.device != "cuda":
        return
    for k, n, bits, dtype, m in _grid_gpu(request):
        if dtype == "bfloat16":

            def build(context: Context, k=k, n=n, bits=bits, dtype=dtype, m=m) -> Work:
                return _linear_fp8(context, k, n, bits, dtype, m)

            yield Case("linear_fp8", _params(k, n, bits, dtype, m), build, (k, n))


def _linear_fp8(context: Context, k: int, n: int, bits: int, dtype: str, m: int) -> Work:
    """x is rounded to e4m3 in the call, which is timed with it."""
    w, packed, weights = rotated(context, n, k, bits, "e4m3")
    x = context.get(("x", m, dtype), lambda: normal((m, k), DTYPES[dtype], device=context.device))
    tail = (bits, packed.format.levels, packed.layout, context.backend)
    moved = nbytes(x, packed.weight, packed.weight_exp) + m * n * x.element_size()
    candidate = runner(torch.ops.inq.linear_fp8, [(x, *each, None, *tail) for each in weights], moved)

    def check() -> str | None:
        # Exact in the rounded x, up to the tensor core's accumulation: sums of 128 keep 14 bits (KERNELS.md, Pitfalls).
        rows, columns = some(m), some(n, max(96, 2048 // m))
        values, exponents = reference.quantize_rows_e4m3(x[rows])
        rounded = values.double() * torch.exp2(-exponents.double()).view(-1, 1)
        part = w.dense(torch.float64, columns)
        exact, size = rounded @ part.T, rounded.abs() @ part.abs().T
        y = candidate.run()[rows][:, columns].double()
        allowed = exact.abs() * torch.finfo(x.dtype).eps / 2 + size * 2.0**-13
        wrong = int((~((y - exact).abs() <= allowed)).sum())
        return f"{wrong} of {y.numel()} are further off than 14 bits allow for the rounded x" if wrong else None

    return Work(
        candidate,
        gpu_baselines.linear_baselines(context, w, m, dtype, x, packed, "linear_fp8"),
        check,
        2 * m * n * k,
        "float8_e4m3fn",
        {"bits_per_weight": bits_in_use(packed), "layout": packed.layout},
    )


LINEAR = Op("linear", ("linear",), _cases)
LINEAR_DX = Op("linear_dx", ("linear_dx",), _dx_cases)
LINEAR_FP8 = Op("linear_fp8", ("linear_fp8",), _fp8_cases)
