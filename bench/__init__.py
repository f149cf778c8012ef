"""``inq bench``: how fast each operator is here, beside other ways to do the same, after a check that it is right."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
