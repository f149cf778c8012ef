"""What the tests of Triton's kernels share: a device, cases that cover every pair of choices, and guarded memory."""

import contextlib
import itertools
import random

import numpy as np
import support
import torch
from support import assert_as_good_as_dense, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MS = (0, 1, 2, 7, 16, 33, 130)
SIZES = (1, 31, 32, 33, 100, 257)
# Random shapes: on a GPU nearly each one is compiled, seconds of a processor, so fewer there.
EXAMPLES = 25 if DEVICE == "cpu" else 6
_GUARD = 256  # bytes before and behind each buffer
_POISON = 0xA5
# For what is read: a float of any type made of these is NaN, an exponent −1.
_NAN = 0xFF
# How launchers make operands of arguments that kernels cannot read as they are.
_COPYING = ("contiguous", "reshape", "new_zeros", "float")


def pairwise(seed=0, **axes):
    """Dicts with a value of each axis, so few that every pair of values of two axes occurs, and hardly more."""
    rng = random.Random(seed)
    names = list(axes)
    # Values by their number: they need not be hashable.
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    cases = []
    while missing:
        wanted = min(missing, key=repr)
        tries = []
        for _ in range(30):
            case = {name: rng.randrange(len(axes[name])) for name in names}
            case[wanted[0]], case[wanted[2]] = wanted[1], wanted[3]
            covered = {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)} & missing
            tries.append((len(covered), len(tries), case, covered))
        _, _, case, covered = max(tries, key=lambda t: t[:2])
        missing -= covered
        cases.append({name: axes[name][i] for name, i in case.items()})
    return cases


def kinds(shape, dtype, seed=0):
    """support.kinds on the device."""
    return {name: w.to(DEVICE) for name, w in support.kinds(shape, dtype, seed).items()}


def random_masks(numel, which, seed=0):
    """support.random_masks on the device."""
    mask, keep = support.random_masks(numel, which, seed)
    return mask.to(DEVICE), None if keep is None else keep.to(DEVICE)


@contextlib.contextmanager
def traffic():
    """Which bytes interpreted kernels load and store (atomics apart): yields two lists of arrays of addresses."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads, stores = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def addresses(pointers, mask, dtype):
        at = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        return (at[:, None] + np.arange(dtype.itemsize, dtype=np.uint64)).reshape(-1)

    def recorded_load(self, pointers, mask, *rest):
        result = load(self, pointers, mask, *rest)
        loads.append(addresses(pointers, mask, result.data.dtype))
        return result

    def recorded_store(self, pointers, value, mask, *rest):
        stores.append(addresses(pointers, mask, value.data.dtype))
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = recorded_load, recorded_store
    try:
        yield loads, stores
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


@contextlib.contextmanager
def no_waiting():
    """Whatever waits for the device is an error, where there is one."""
    if DEVICE == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def times(addresses, t):
    """How often each byte of ``t``, which is contiguous, is among the addresses."""
    at = np.concatenate([*addresses, np.empty(0, np.uint64)]) - np.uint64(t.data_ptr())
    size = t.numel() * t.element_size()
    return np.bincount(at[at < size].astype(np.int64), minlength=size)


def check_error(y, exact, dense, unit, size, operand=0.0):
    """As good as torch's product. Of few outputs torch's error may be 0 by luck: there a bound on float32 sums, from
    the sum of the products' ``size``; ``operand`` is the relative error of an operand that could not be exact."""
    if y.numel() > 64:
        assert_as_good_as_dense(y, exact, dense, unit)
    else:
        finfo = torch.finfo(y.dtype)
        rounding = exact.abs() * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
        assert ((y.double() - exact).abs() <= size * (2.0**-22 + operand) + rounding).all()


def assert_same(y, expected, fused=False):
    """Bit for bit, but for the sign of zero. ``fused``: a row scale and a bias, which a compiler for GPUs joins to one
    multiply-add, rounded once."""
    if fused and DEVICE == "cuda" and y.numel():
        eps = max(torch.finfo(y.dtype).eps, 2.0**-22)
        torch.testing.assert_close(y, expected, rtol=2 * eps, atol=float(expected.abs().nan_to_num().amax()) * 2.0**-22)
    else:
        assert same_bits(y + 0.0, expected + 0.0)


def fenced(t):
    """A copy on the device, with the same strides, in memory whose other bytes are NaN: behind, before and between its
    elements, so that whoever reads beside it computes NaN."""
    if t is None:
        return None
    # Elements from the first to the last one in memory.
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    whole = torch.full((span * t.element_size() + 2 * _GUARD,), _NAN, dtype=torch.uint8, device=DEVICE)
    inside = whole[_GUARD : whole.numel() - _GUARD].view(t.dtype).as_strided(t.shape, t.stride())
    if 0 in t.stride():
        # Expanded: one element of each such dimension is all there is.
        one = tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())
        inside[one].copy_(t[one])
        return inside
    return inside.copy_(t)


def _places(t):
    """The address of each byte of each element, sorted."""
    at = torch.zeros((), dtype=torch.int64)
    for n, s in zip(t.shape, t.stride(), strict=True):
        at = at[..., None] + torch.arange(n) * s
    places = at.reshape(-1, 1).numpy() * t.element_size() + t.data_ptr() + np.arange(t.element_size())
    return np.unique(places).astype(np.uint64)


@contextlib.contextmanager
def guarded(monkeypatch, changed=(), reads=None):
    """Every torch.empty inside lies between guard bytes and is poisoned. At the end: the guards are whole and, where
    kernels are interpreted, kernels wrote each byte of each buffer exactly once, no byte of the tensors ``changed``
    twice, and no byte of anything else; with ``reads`` (tensors), they loaded elements of these, of the buffers and of
    copies that torch made alone.

    Yields the list of (memory, bytes) that were made.
    """
    made = []
    empty = torch.empty

    def poisoned(*size, dtype=None, device=None, **more):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        like = empty(size, dtype=dtype, device=device, **more)
        count = like.numel() * like.element_size()
        whole = empty(count + 2 * _GUARD, dtype=torch.uint8, device=device).fill_(_POISON)
        made.append((whole, count))
        return whole[_GUARD : _GUARD + count].view(like.dtype).as_strided(like.shape, like.stride())

    copies = []

    def recorded(method):
        def call(*args, **more):
            copies.append(method(*args, **more))
            return copies[-1]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        for name in _COPYING if reads is not None else ():
            patch.setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name)))
        with traffic() if DEVICE == "cpu" else contextlib.nullcontext(([], [])) as (loads, stores):
            yield made
    for whole, count in made:
        assert (whole[:_GUARD] == _POISON).all(), "written before a buffer"
        assert (whole[_GUARD + count :] == _POISON).all(), "written behind a buffer"
    if DEVICE == "cpu":
        written = np.concatenate(stores) if stores else np.empty(0, np.uint64)
        assert len(np.unique(written)) == len(written), "a byte is written twice"
        expected = sum(count for _, count in made)
        starts = [(whole.data_ptr() + _GUARD, count) for whole, count in made]
        inside = sum(int(((written >= at) & (written < at + count)).sum()) for at, count in starts)
        elsewhere = len(written) - inside - sum(int(times([written], t).sum()) for t in changed)
        assert elsewhere == 0, f"{elsewhere} bytes of something else are written"
        assert inside == expected, f"{expected - inside} bytes are not written"
        if reads is not None and loads:
            allowed = [_places(t) for t in (*reads, *copies) if t is not None]
            allowed += [np.arange(at, at + count, dtype=np.uint64) for at, count in starts]
            found = np.isin(np.unique(np.concatenate(loads)), np.concatenate(allowed))
            assert found.all(), f"{int((~found).sum())} places are read that belong to no argument"
