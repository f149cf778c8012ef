"""``inq demo``: a real network, from float32 to lossless low-bit files, with a table and a report."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
