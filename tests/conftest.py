"""One thread: on a shared machine, two threads that wait for each other take ten times longer for small tensors.

Triton's kernels are interpreted on the CPU where there is no GPU. Triton reads the variable when kernels are defined.
"""

import importlib.util
import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton is for Linux; CI checks that it has it.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_triton_*.py"]
