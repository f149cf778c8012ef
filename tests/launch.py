"""Programs for tests, in processes of their own that never take longer than they may. ``torchrun``'s find each other by
number: no name is looked up."""

import os
import socket
import subprocess
import sys
from pathlib import Path

WATCHED = Path(__file__).with_name("watched")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def python(*words, seconds=240, folder=None, **environment):
    """(exit status, what was printed) of ``python … words``. After ``seconds`` it, and each process that it started,
    prints its stacks and ends with status 1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "INQ_TEST_SECONDS": str(seconds)}
    paths = (str(WATCHED), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def torchrun(*words, processes=2, **settings):
    """The same of ``torchrun … words``: its further options, the script, the script's arguments."""
    address = ("--master-addr", "127.0.0.1", "--master-port", _free_port())
    return python("-m", "torch.distributed.run", "--nproc-per-node", processes, *address, *words, **settings)
