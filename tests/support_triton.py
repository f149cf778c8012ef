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
def guarded(monkeypatch):
    """Every torch.empty inside lies between guard bytes and is poisoned. At the end: the guards are whole and, where
    kernels are interpreted, kernels wrote each byte of each buffer exactly once, and no byte of anything else.

    Yields the list of (tensor, bytes) that were made.
    """
    made, addresses = [], []
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
        if DEVICE == "cpu":
            from triton.runtime.interpreter import InterpreterBuilder

            store = InterpreterBuilder.create_masked_store

            def recorded(self, pointers, value, mask, *rest):
                at = pointers.data[mask.data.astype(bool)].astype(np.uint64)
                size = value.data.dtype.itemsize
                addresses.append((at[:, None] + np.arange(size, dtype=np.uint64)).reshape(-1))
                return store(self, pointers, value, mask, *rest)

            patch.setattr(InterpreterBuilder, "create_masked_store", recorded)
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
        assert inside == len(written), "something else is written"
        assert inside == expected, f"{expected - inside} bytes are not written"
