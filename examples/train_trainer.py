"""INQ in transformers' Trainer, by a callback that begins the portions.

    python examples/train_trainer.py
    python examples/train_trainer.py --resume trainer/checkpoint-250
    torchrun --standalone --nproc-per-node 2 examples/train_trainer.py

The Trainer's own checkpoints hold the optimizer as a pickle. Here it saves the model only, and the callback puts
inq.save_training's file beside it, which has all of it: model, optimizer, INQ and its schedule.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import BATCH, accuracy, data, network, pack, weight_hash
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import inq_kernels as inq

FILE = "inq.safetensors"


class Portions(TrainerCallback):
    """Begins a portion of ``run`` every ``steps`` optimizer steps, after as many in float; saves and loads it all."""

    def __init__(self, run: inq.INQ, steps: int, resume: Path | None = None):
        self.run, self.steps, self.resume, self.portions = run, steps, resume, iter(run)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.resume is not None:
            inq.load_training(self.resume / FILE, self.run.model, self.run.optimizer, self.run)
            if self.run.portion:
                next(self.portions)  # the portion in progress

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step and state.global_step % self.steps == 0:
            next(self.portions)

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            inq.save_training(path, self.run.model, self.run.optimizer, self.run)


class Classifier(nn.Module):
    """The network as the Trainer calls it: with labels, it returns the loss."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(images)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Digits(Dataset):
    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5), default=4)
    parser.add_argument("--steps", type=int, default=100, help="after each portion")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--dir", default="trainer", help="where checkpoints go")
    parser.add_argument("--resume", type=Path, help="a checkpoint in that directory")
    args = parser.parse_args()
    images, labels, test_images, test_labels = data()
    model, portions = Classifier(), inq.PAPER_PORTIONS[args.bits]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    run = inq.INQ(model, optimizer, inq.Format(args.bits), portions, lr_schedulers=scheduler)
    settings = TrainingArguments(
        output_dir=args.dir,
        max_steps=args.steps * (len(portions) + 1),
        per_device_train_batch_size=BATCH,
        save_steps=args.save_every,
        save_only_model=True,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=Digits(images, labels),
        optimizers=(optimizer, scheduler),
        callbacks=[Portions(run, args.steps, args.resume)],
    )
    trainer.train(resume_from_checkpoint=str(args.resume) if args.resume else None)
    if trainer.is_world_process_zero():
        digest = weight_hash(dict(model.named_parameters()))
        size = pack(model, run)
        print(f"accuracy {accuracy(model.network, test_images, test_labels):.1f} %, {size} bytes packed")
        print(f"hash {digest}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
