"""What the tests of Triton's kernels share: a device, cases that cover every pair of choices, and guarded memory."""

import contextlib
import itertools
import random

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MS = (0, 1, 2, 7, 16, 33, 130)
SIZES = (1, 31, 32, 33, 100, 257)
_GUARD = 256  # bytes before and behind each buffer
_POISON = 0xA5


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


def times(addresses, t):
    """How often each byte of ``t``, which is contiguous, is among the addresses."""
    at = np.concatenate([*addresses, np.empty(0, np.uint64)]) - np.uint64(t.data_ptr())
    size = t.numel() * t.element_size()
    return np.bincount(at[at < size].astype(np.int64), minlength=size)


@contextlib.contextmanager
def guarded(monkeypatch, changed=()):
    """Every torch.empty inside lies between guard bytes and is poisoned. At the end: the guards are whole and, where
    kernels are interpreted, kernels wrote each byte of each buffer exactly once, no byte of the tensors ``changed``
    twice, and no byte of anything else.

    Yields the list of (tensor, bytes) that were made.
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

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        with traffic() if DEVICE == "cpu" else contextlib.nullcontext(([], [])) as (_, addresses):
            yield made
    for whole, count in made:
        assert (whole[:_GUARD] == _POISON).all(), "written before a buffer"
        assert (whole[_GUARD + count :] == _POISON).all(), "written behind a buffer"
    if DEVICE == "cpu":
        written = np.concatenate(addresses) if addresses else np.empty(0, np.uint64)
        assert len(np.unique(written)) == len(written), "a byte is written twice"
        expected = sum(count for _, count in made)
        inside = sum(
            int(((written >= whole.data_ptr() + _GUARD) & (written < whole.data_ptr() + _GUARD + count)).sum())
            for whole, count in made
        )
        elsewhere = len(written) - inside - sum(int(times([written], t).sum()) for t in changed)
        assert elsewhere == 0, f"{elsewhere} bytes of something else are written"
        assert inside == expected, f"{expected - inside} bytes are not written"
