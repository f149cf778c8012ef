"""INQ around a plain torch loop, on one device or several, with checkpoints: the same weights, bit for bit.

    python examples/train.py
    torchrun --standalone --nproc-per-node 2 examples/train.py --wrap ddp
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train.py --wrap fsdp2 --checkpoint run

With --checkpoint a run that is started again goes on from the last checkpoint; torchrun does that itself when a
process dies. (The variable: docs/distributed.md.)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import PARTS, accuracy, data, network, pack, parts, weight_hash
from torch import nn

import inq_kernels as inq


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model as its devices train it. Before the optimizer is made: fully_shard makes new parameters."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    return model


def train(args: argparse.Namespace) -> None:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, labels, test_images, test_labels = data()
    model = wrapped(network(), args.wrap)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    portions = inq.PAPER_PORTIONS[args.bits]

    run = inq.INQ(model, optimizer, inq.Format(args.bits), portions, args.partition, lr_schedulers=scheduler)
    step = 0
    if args.checkpoint and args.checkpoint.exists():
        step = inq.load_sharded(args.checkpoint, model, optimizer, run)["step"]

    def train_until(end: int) -> None:
        nonlocal step
        while step < end:
            model.train()
            optimizer.zero_grad()
            # Each rank takes its parts of the batch. Gradients are averaged over ranks: here, over this rank's own.
            own = parts(step, len(images))[rank::size]
            for part in own:
                (F.cross_entropy(model(images[part]), labels[part]) / len(own)).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if args.checkpoint and step % args.save_every == 0:
                inq.save_sharded(args.checkpoint, model, optimizer, run, {"step": step})

    # Nothing is frozen before the loop: this is float training. A finished network would be loaded instead.
    train_until(args.steps)
    for portion in run:
        train_until(args.steps * (portions.index(portion) + 2))

    # All of the weights, whole, in a plain network: that is what is packed. (docs/distributed.md: for large models.)
    state = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in run.model.state_dict().items()}
    if rank == 0:
        plain = network()
        plain.load_state_dict(state)
        size = pack(plain, run)
        print(f"accuracy {accuracy(plain, test_images, test_labels):.1f} %, {size} bytes packed")
        print(f"hash {weight_hash({n: state[n] for n, _ in network().named_parameters()})}")
        if args.out:
            inq.save(plain, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=("none", "ddp", "fsdp2"), default="none")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5), default=4)
    parser.add_argument("--partition", choices=("magnitude", "random"), default="magnitude")
    parser.add_argument("--steps", type=int, default=100, help="after each portion")
    parser.add_argument("--checkpoint", type=Path, help="a directory to save to, and to go on from")
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--out", type=Path, help="where to save the packed network")
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if PARTS % ranks:
        parser.error(f"expected a number of processes that divides {PARTS}, got {ranks}")
    if args.wrap != "none":
        # "nccl" with torch.cuda.set_device(local rank) where there are GPUs.
        dist.init_process_group("gloo")
    try:
        train(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
