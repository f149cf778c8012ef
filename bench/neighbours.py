"""Whether this process had its processor cores to itself while something was timed.

On a shared machine other processes, or other virtual machines, run on the same cores for a while. Timing in turn does
not make up for that: on an Intel Xeon with AMX a neighbour on both cores took a product of ours from 3.5 to 10 ms and
torch's from 9.6 to 16, and the ratio from 2.74 to 1.65. So a short work that nothing but the cores decides is timed
before and after each sample, and pairs of samples are set aside where it took longer than it can.
"""

from __future__ import annotations

import time

import torch

# A probe may take so many times the fastest one. Neighbours make it 1.3 at least; a cache that others used, 1.1.
LIMIT = 1.25
# torch gives a thread this many elements of an elementwise operation at least.
_GRAIN = 1 << 15


class Probe:
    """Times ``torch.erf`` of some numbers in the second-level caches, on all threads: some 25 µs.

    Attributes:
        fastest: seconds of the fastest so far, against which the others are held.
    """

    def __init__(self, calibrate_s: float = 0.0):
        self._x = torch.linspace(0, 3, _GRAIN * torch.get_num_threads())
        self._y = torch.empty_like(self._x)
        self.fastest = float("inf")
        end = time.perf_counter() + calibrate_s
        while time.perf_counter() < end:
            self.seconds()

    def seconds(self) -> float:
        """The faster of two: the first one may find other data in the caches, and threads asleep."""
        took = min(self._once(), self._once())
        self.fastest = min(self.fastest, took)
        return took

    def _once(self) -> float:
        begin = time.perf_counter()
        torch.erf(self._x, out=self._y)
        return time.perf_counter() - begin

    def quiet(self, seconds: float) -> bool:
        """Whether a probe that took so long had the cores to itself, as far as is known by now."""
        return seconds <= LIMIT * self.fastest
