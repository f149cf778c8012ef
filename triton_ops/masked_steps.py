"""Optimizer steps with the mask of frozen weights inside: one launch for all parameters of a dtype on a device.

Memory is what takes the time: every operand is read and written once, the mask adds 1/8 of a byte a weight. A frozen
weight and its state are written back as they were read, bit for bit. Arithmetic is float32's whatever the parameters'
dtype; numbers arrive as float32 too, since a caller that compiles would pass Python's floats as float64.
"""

# Constexprs are in capitals, and look like constants to the linter.

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .launch import Configuration, configuration, on_device
from .tables import CHUNK, DTYPES, GROUPS, WARPS

# Columns of the table after the first program and the number of weights; state that there is none of has address 0.
_P, _GRAD, _FIRST, _SECOND, _MASK = (tl.constexpr(i) for i in range(2, 7))
_COLUMNS = tl.constexpr(7)
_STATE = torch.float32


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _float(bits, DTYPE: tl.constexpr):
    return tables.widen(bits, DTYPE).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return tables.narrow(x.to(tl.int32, bitcast=True), DTYPE)


@triton.jit
def _sgd_tile(
    weights, grads, buffers, _, mask, first, left, numbers, options, DTYPE: tl.constexpr, FULL: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    lr, momentum, dampening_left, weight_decay = numbers
    MOMENTUM: tl.constexpr = options[0]
    DECAY: tl.constexpr = options[1]
    NESTEROV: tl.constexpr = options[2]
    MAXIMIZE: tl.constexpr = options[3]
    FIRST_STEP: tl.constexpr = options[4]
    place = tables.positions(GROUPS)
    inside = place < left
    frozen = tables.spread(tables.load_bytes(mask, first, left, 0, FULL, GROUPS))
    bits = tables.load(weights + first + place, inside, FULL)
    w = _float(bits, DTYPE)
    d = _float(tables.load(grads + first + place, inside, FULL), DTYPE)
    if MAXIMIZE:
        d = -d
    if DECAY:
        d += weight_decay * w
    if MOMENTUM:
        old = tables.load(buffers + first + place, inside, FULL)
        buffer = d
        if not FIRST_STEP:
            buffer = old.to(tl.float32, bitcast=True) * momentum + dampening_left * d
        new = tl.where(frozen, old, buffer.to(tl.int32, bitcast=True))
        tables.store(buffers + first + place, new, inside, FULL)
        d = d + momentum * buffer if NESTEROV else buffer
    new = _rounded(w - lr * d, DTYPE)
    tables.store(weights + first + place, tl.where(frozen, bits, new), inside, FULL)


@triton.jit
def _adamw_tile(
    weights, grads, firsts, seconds, mask, first, left, numbers, options, DTYPE: tl.constexpr, FULL: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    beta1, beta1_left, beta2, beta2_left, decay, step_size, inverse_correction2, eps = numbers
    NEAR_ONE: tl.constexpr = options[0]
    MAXIMIZE: tl.constexpr = options[1]
    place = tables.positions(GROUPS)
    inside = place < left
    frozen = tables.spread(tables.load_bytes(mask, first, left, 0, FULL, GROUPS))
    bits = tables.load(weights + first + place, inside, FULL)
    old_m = tables.load(firsts + first + place, inside, FULL)
    old_v = tables.load(seconds + first + place, inside, FULL)
    w = _float(bits, DTYPE)
    d = _float(tables.load(grads + first + place, inside, FULL), DTYPE)
    if MAXIMIZE:
        d = -d
    m = old_m.to(tl.float32, bitcast=True)
    v = old_v.to(tl.float32, bitcast=True)
    # torch.lerp, which is exact at both ends.
    if NEAR_ONE:
        m = d - (d - m) * beta1
    else:
        m = m + beta1_left * (d - m)
    v = v * beta2 + beta2_left * d * d
    denominator = tl.sqrt_rn(v) * inverse_correction2 + eps
    w = w * decay - tl.div_rn(step_size * m, denominator)
    new = tl.where(frozen, old_m, m.to(tl.int32, bitcast=True))
    tables.store(firsts + first + place, new, inside, FULL)
    new = tl.where(frozen, old_v, v.to(tl.int32, bitcast=True))
    tables.store(seconds + first + place, new, inside, FULL)
    tables.store(weights + first + place, tl.where(frozen, bits, _rounded(w, DTYPE)), inside, FULL)


@triton.jit
def _each_tile(
    TILE: tl.constexpr, table, owners, numbers, options, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """TILE, one of the two above, for all tiles of this program's chunk of a parameter."""
    row, first, left = tables.my_chunk(table, owners, _COLUMNS, CHUNK)
    weights = tables.to_weights(tl.load(row + _P), DTYPE, ALIGNED)
    grads = tables.to_weights(tl.load(row + _GRAD), DTYPE, ALIGNED)
    firsts = tables.to_pointer(tl.load(row + _FIRST), tl.int32, ALIGNED)
    seconds = tables.to_pointer(tl.load(row + _SECOND), tl.int32, ALIGNED)
    mask = tl.load(row + _MASK)
    tile: tl.constexpr = GROUPS * 8
    for _ in tl.range(0, (left // tile).to(tl.int32)):
        TILE(weights, grads, firsts, seconds, mask, first, tile, numbers, options, DTYPE, True, GROUPS)
        first += tile
    left = left % tile
    if left > 0:
        TILE(weights, grads, firsts, seconds, mask, first, left, numbers, options, DTYPE, False, GROUPS)


@triton.jit
def _f32(x):
    return tl.cast(x, tl.float32)


@triton.jit
def sgd_step(
    table, owners, lr, momentum, dampening_left, weight_decay, DTYPE: tl.constexpr, MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST_STEP: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a parameter."""
    numbers = (_f32(lr), _f32(momentum), _f32(dampening_left), _f32(weight_decay))
    # A tuple with a name would hold tensors: options are constants only as an argument.
    _each_tile(
        _sgd_tile, table, owners, numbers, (MOMENTUM, DECAY, NESTEROV, MAXIMIZE, FIRST_STEP), DTYPE, ALIGNED, CHUNK,
        GROUPS,
    )  # fmt: skip


@triton.jit
def adamw_step(
    table, owners, beta1, beta1_left, beta2, beta2_left, decay, step_size, inverse_correction2, eps,
    DTYPE: tl.constexpr, NEAR_ONE: tl.constexpr, MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """One program a chunk of a parameter."""
    numbers = (
        _f32(beta1), _f32(beta1_left), _f32(beta2), _f32(beta2_left), _f32(decay), _f32(step_size),
        _f32(inverse_correction2), _f32(eps),
    )  # fmt: skip
    _each_tile(_adamw_tile, table, owners, numbers, (NEAR_ONE, MAXIMIZE), DTYPE, ALIGNED, CHUNK, GROUPS)


# Two moments in float32 beside the weights: with four warps, a tile of 16-bit weights spilled on sm_90.
_ADAMW_WARPS = 2 * WARPS


# --- launchers --------------------------------------------------------------------------------------------------------


def _step(
    kernel, name: str, lists: dict[str, Sequence[Tensor]], masks: Sequence[Tensor], numbers, constants, warps: int
) -> None:
    """One launch for all parameters. Bits of a mask count in the order of the shape: others' strides cost a copy."""
    params = lists["params"]
    _check(name, lists, masks)
    flat = {what: [t.detach().contiguous() for t in tensors] for what, tensors in lists.items()}
    first, second = [*list(flat.values())[2:], None, None][:2]
    none = [0] * len(params)
    columns = zip(
        [p.numel() for p in params],
        map(tables.address, flat["params"]),
        map(tables.address, flat["grads"]),
        map(tables.address, first) if first is not None else none,
        map(tables.address, second) if second is not None else none,
        [mask.data_ptr() if mask.numel() else 0 for mask in masks],
        strict=True,
    )
    programs = tables.chunks(params)
    table, owners = tables.build(list(columns), programs, params[0].device)
    with on_device(params[0].device):
        if sum(programs):
            kernel[(sum(programs),)](
                table, owners, *map(float, numbers), DTYPE=DTYPES[params[0].dtype], **constants,
                ALIGNED=tables.aligned(*flat.values()), CHUNK=CHUNK, GROUPS=GROUPS, num_warps=warps,
                num_stages=tables.STAGES,
            )  # fmt: skip
    for what, tensors in lists.items():
        if what == "grads":
            continue
        for t, used in zip(tensors, flat[what], strict=True):
            if used.data_ptr() != t.data_ptr():
                t.detach().copy_(used)


def _check(name: str, lists: dict[str, Sequence[Tensor]], masks: Sequence[Tensor]) -> None:
    """TypeError, ValueError: lists that do not fit the parameters."""
    params = lists["params"]
    for what, tensors in (*lists.items(), ("masks", masks)):
        if len(tensors) != len(params):
            raise ValueError(f"{name}: {what}: expected {len(params)} tensors, got {len(tensors)}")
    for i, (p, mask) in enumerate(zip(params, masks, strict=True)):
        tables.check_floats(f"{name}: params[{i}]", p, params[0])
        for what, tensors in lists.items():
            t = tensors[i]
            wanted = p.dtype if what in ("params", "grads") else _STATE
            if t.dtype != wanted:
                raise TypeError(f"{name}: {what}[{i}]: expected {wanted}, got {t.dtype}")
            if t.shape != p.shape:
                raise ValueError(
                    f"{name}: {what}[{i}]: expected shape {list(p.shape)} of its parameter, got {list(t.shape)}"
                )
            if t.device != p.device:
                raise ValueError(f"{name}: {what}[{i}]: expected a tensor on {p.device}, got {t.device}")
        if mask.numel():
            tables.check_bits(f"{name}: masks[{i}]", mask, p)


def masked_sgd_(
    params, grads, momentum_buffers, masks, lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step
):
    """torch.ops.inq.masked_sgd_, reference.masked_sgd_, in one launch.

    Args:
        params: float32, bfloat16 or float16, of one dtype on one device; changed in place.
        grads: like them.
        momentum_buffers: float32 like them, changed in place; empty for momentum 0.
        masks: uint8 [ceil(numel/8)], 1 = frozen; an empty tensor: nothing is.
        lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step: torch.optim.SGD's.

    Raises:
        ValueError, TypeError: tensors that are not as above.
    """
    if not params:
        return
    lists = {"params": params, "grads": grads}
    if momentum:
        lists["momentum_buffers"] = momentum_buffers
    # Without momentum there is no first step and no look ahead: fewer kernels.
    constants = {
        "MOMENTUM": bool(momentum),
        "DECAY": bool(weight_decay),
        "NESTEROV": bool(momentum and nesterov),
        "MAXIMIZE": bool(maximize),
        "FIRST_STEP": bool(momentum and is_first_step),
    }
    _step(sgd_step, "masked_sgd_", lists, masks, (lr, momentum, 1 - dampening, weight_decay), constants, WARPS)


def masked_adamw_(params, grads, exp_avgs, exp_avg_sqs, masks, lr, beta1, beta2, weight_decay, eps, step, maximize):
    """torch.ops.inq.masked_adamw_, reference.masked_adamw_, in one launch.

    Args:
        params, grads, masks: as in ``masked_sgd_``.
        exp_avgs, exp_avg_sqs: float32 like the parameters; changed in place.
        lr, beta1, beta2, weight_decay, eps, maximize: torch.optim.AdamW's.
        step: the number of this step, from 1.

    Raises:
        ValueError, TypeError: tensors that are not as above, or a step before the first.
    """
    if step < 1:
        raise ValueError(f"masked_adamw_: step: expected at least 1, got {step}")
    if not params:
        return
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    # In float64, and rounded once.
    step_size = lr / (1 - beta1**step)
    inverse_correction2 = 1 / math.sqrt(1 - beta2**step)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, step_size, inverse_correction2, eps)
    constants = {"NEAR_ONE": 1 - beta1 >= 0.5, "MAXIMIZE": bool(maximize)}
    _step(adamw_step, "masked_adamw_", lists, masks, numbers, constants, _ADAMW_WARPS)


# --- compile-only builds ----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """What launches use, for builds without a GPU."""
    types = {"table": "*i64", "owners": "*i64"}
    flags = ("MOMENTUM", "DECAY", "NESTEROV", "MAXIMIZE", "FIRST_STEP")
    for kind, aligned in itertools.product(DTYPES.values(), (True, False)):
        sizes = {"DTYPE": kind, "ALIGNED": aligned, "CHUNK": CHUNK, "GROUPS": GROUPS}
        name = f"{kind}{' aligned' * aligned}"
        for values in itertools.product((False, True), repeat=len(flags)):
            given = dict(zip(flags, values, strict=True))
            if given["MOMENTUM"] or not (given["NESTEROV"] or given["FIRST_STEP"]):
                words = "".join(f" {flag.lower()}" for flag in flags if given[flag])
                yield configuration(
                    f"sgd_step {name}{words}", sgd_step, types, given | sizes, WARPS, tables.STAGES, "fp32"
                )
        for near_one, maximize in itertools.product((False, True), repeat=2):
            words = " near_one" * near_one + " maximize" * maximize
            given = {"NEAR_ONE": near_one, "MAXIMIZE": maximize}
            yield configuration(
                f"adamw_step {name}{words}", adamw_step, types, given | sizes, _ADAMW_WARPS, tables.STAGES, "fp32"
            )
