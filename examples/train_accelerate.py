"""INQ in a loop of Hugging Face's Accelerate: the same weights as examples/train.py, bit for bit.

python examples/train_accelerate.py
torchrun --standalone --nproc-per-node 2 examples/train_accelerate.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from digits import BATCH, PARTS, accuracy, all_parts, data, network, pack, weight_hash
from torch.utils.data import DataLoader, TensorDataset

import inq_kernels as inq


class Parts:
    """A batch sampler of the parts of every step's batch. Accelerate gives the ranks one each, in turns."""

    batch_size, drop_last = BATCH // PARTS, False

    def __init__(self, steps: int, examples: int):
        self.steps, self.examples = steps, examples

    def __len__(self) -> int:
        return PARTS * self.steps

    def __iter__(self) -> Iterator[list[int]]:
        return all_parts(self.steps, self.examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5), default=4)
    parser.add_argument("--steps", type=int, default=100, help="after each portion")
    args = parser.parse_args()
    accumulate = PARTS // int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    images, labels, test_images, test_labels = data()
    network_, portions = network(), inq.PAPER_PORTIONS[args.bits]
    sgd = torch.optim.SGD(network_.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, args.steps)
    # Before prepare: INQ takes the optimizer itself, not Accelerate's wrapper of it.
    run = inq.INQ(network_, sgd, inq.Format(args.bits), portions, lr_schedulers=scheduler)
    steps = args.steps * (len(portions) + 1)
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=Parts(steps, len(images)))
    model, optimizer, loader = accelerator.prepare(network_, sgd, loader)
    batches = iter(loader)

    def train() -> None:
        model.train()
        for _ in range(args.steps * accumulate):
            x, target = next(batches)
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), target))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()

    train()  # float: nothing is frozen before the loop
    for _ in run:
        train()

    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(model)
        digest = weight_hash(dict(plain.named_parameters()))
        size = pack(plain, run)
        print(f"accuracy {accuracy(plain, test_images, test_labels):.1f} %, {size} bytes packed")
        print(f"hash {digest}")
    accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
