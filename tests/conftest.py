"""One thread: on a shared machine, two threads that wait for each other take ten times longer for small tensors."""

import torch

torch.set_num_threads(1)
