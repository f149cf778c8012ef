"""The paper's ImageNet experiments, its tables 1 to 3, from torchvision's pretrained weights and a folder of images.

    python examples/imagenet.py DATA --model resnet18 --amp bfloat16
    torchrun --standalone --nproc-per-node 8 examples/imagenet.py DATA --model alexnet --amp bfloat16
    python examples/imagenet.py DATA --model resnet18 --partition random    # table 2
    python examples/imagenet.py DATA --model resnet18 --bits 2              # table 3

DATA has the folders train and val, and those a folder of images for each class. All convolutions and linear layers are
quantized, the first and the last included. The errors before and after are printed beside the paper's, and written to
OUT/results.json; OUT/packed.safetensors is the network. The same command, started again after any interruption, goes on
from OUT/training.safetensors, to the same bits where the device computes the same twice. docs/imagenet.md has what it
costs, and what is not the paper's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import inq_kernels as inq


@dataclass(frozen=True)
class Recipe:
    """A model's settings in the paper, and its errors there (top-1, top-5, in percent) before and after, at 5 bits."""

    portions: tuple[float, ...]
    batch: int
    weight_decay: float
    before: tuple[float, float]
    after: tuple[float, float]


RECIPES = {
    "alexnet": Recipe((0.3, 0.6, 0.8, 1.0), 256, 5e-4, (42.76, 19.77), (42.61, 19.54)),
    "vgg16": Recipe((0.5, 0.75, 0.875, 1.0), 32, 5e-4, (31.46, 11.35), (29.18, 9.70)),
    "googlenet": Recipe((0.2, 0.4, 0.6, 0.8, 1.0), 80, 2e-4, (31.11, 10.97), (30.98, 10.72)),
    "resnet18": Recipe((0.5, 0.75, 0.875, 1.0), 80, 5e-4, (31.73, 11.31), (31.02, 10.90)),
    "resnet50": Recipe((0.5, 0.75, 0.875, 1.0), 32, 5e-4, (26.78, 8.76), (25.19, 7.55)),
}
MOMENTUM = 0.9
# Table 2 and table 3, ResNet-18: by bits and partition, what is not in table 1.
MORE = {
    (5, "random"): (32.11, 11.73),
    (4, "pruning-inspired"): (31.11, 10.99),
    (3, "pruning-inspired"): (31.92, 11.64),
    (2, "pruning-inspired"): (33.98, 12.87),
}
PARTITIONS = {"pruning-inspired": "magnitude", "random": "random"}

# Not in the paper: the authors' solver file, in which each portion has 63,000 iterations at batch 256 and the learning
# rate falls to a fifth every 15,000. Other batches see as many images, at a rate in proportion to the batch.
SOLVER_BATCH, SOLVER_LR, SOLVER_ITERATIONS, SOLVER_DECAY = 256, 0.003, 63_000, 15_000
GAMMA = 0.2

# The first of torchvision's, trained as in the paper's time.
WEIGHTS = "IMAGENET1K_V1"
CLASSES = 1000
RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Mistake(Exception):
    """The user's: printed in one line."""


def portions_of(model: str, bits: int) -> tuple[float, ...]:
    """The paper's, which quantizes ResNet-18 alone to fewer than 5 bits: other models take its portions there."""
    return RECIPES[model].portions if bits == 5 else inq.PAPER_PORTIONS[bits]


def paper_errors(model: str, bits: int, partition: str) -> tuple[float, float] | None:
    """Top-1 and top-5 after INQ in the paper, if it has them."""
    if (bits, partition) == (5, "pruning-inspired"):
        return RECIPES[model].after
    return MORE.get((bits, partition)) if model == "resnet18" else None


# --- what torchvision gives -------------------------------------------------------------------------------------------


def network(name: str, weights: str, classes: int) -> nn.Module:
    """A model of torchvision's. GoogLeNet without its auxiliary heads, of which there are no pretrained weights."""
    from torchvision import models

    heads = {"aux_logits": False, "init_weights": weights == "none"} if name == "googlenet" else {}
    if weights == "none":
        return models.get_model(name, weights=None, num_classes=classes, **heads)
    chosen = models.get_model_weights(name)[weights]
    model = models.get_model(name, weights=None, num_classes=classes, **heads)
    try:
        # A pickle, so nothing but tensors is read from it.
        state = chosen.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a download and torch's reading of damaged bytes raise
        got = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise Mistake(f"{name}: expected torchvision's weights, {chosen.url}, got {got}") from error
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2."))})
    if name == "googlenet":
        # Its weights are of images with another normalisation.
        model.transform_input = True
    return model


def picture(path: str) -> object:
    """torchvision's. Mistake, with the path, which not all of PIL's errors have, if it cannot be read."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:
        raise Mistake(f"{path}: expected an image, got {type(error).__name__}: {error}") from error


def pictures(folder: Path, train: bool) -> Dataset:
    """The images and labels of a folder: a random crop and mirror to train on, or the centre crop."""
    try:
        from torchvision import datasets, transforms
    except ModuleNotFoundError as error:
        raise Mistake(f"expected torchvision (pip install 'inq_kernels[imagenet]'), got {error}") from error
    if train:
        ways = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
    else:
        ways = [transforms.Resize(RESIZE), transforms.CenterCrop(CROP)]
    ways += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    try:
        return datasets.ImageFolder(str(folder), transforms.Compose(ways), loader=picture)
    except FileNotFoundError as error:
        # A class has files, and none of them is an image by its name.
        raise Mistake(f"{folder}: {error}") from error


# --- the data ---------------------------------------------------------------------------------------------------------


def class_count(data: Path, weights: str) -> int:
    """How many classes there are. Mistake unless train and val have the same, with something in each."""
    found = []
    for part in ("train", "val"):
        folder = data / part
        if not folder.is_dir():
            raise Mistake(f"{folder}: expected a folder with a folder of images for each class, got none")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not names:
            raise Mistake(f"{folder}: expected a folder of images for each class, got no folder in it")
        if empty := [name for name in names if not any((folder / name).iterdir())]:
            raise Mistake(f"{folder / empty[0]}: expected images, got an empty folder ({len(empty)} of {len(names)})")
        found.append(names)
    if odd := sorted(set(found[0]) ^ set(found[1])):
        raise Mistake(f"{data}: expected the same classes in train and val, got {odd[0]!r} in one ({len(odd)} such)")
    if weights != "none" and len(found[0]) != CLASSES:
        raise Mistake(f"{data}: expected the {CLASSES} classes of the pretrained weights, got {len(found[0])}")
    return len(found[0])


def seed_of(*what: object) -> int:
    """32 bits for torch's generators. What is random depends on these alone, so any process can go on anywhere."""
    return zlib.crc32(repr(what).encode())


class Batches:
    """A batch sampler: for each iteration from ``start`` to ``end`` this process's part, as ``Augmented`` takes it."""

    def __init__(self, examples: int, batch: int, start: int, end: int, seed: int, rank: int, size: int):
        self.examples, self.batch, self.start, self.end = examples, batch, start, end
        self.seed, self.rank, self.size = seed, rank, size

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """(index, seed of its crop). The images that do not fill a batch are left out of their epoch."""
        epoch, order, each = -1, torch.empty(0), self.examples // self.batch
        for step in range(self.start, self.end):
            if step // each != epoch:
                epoch = step // each
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order = torch.randperm(self.examples, generator=generator)
            first = step % each * self.batch
            mine = range(self.rank, self.batch, self.size)
            yield [(int(order[first + i]), seed_of(self.seed, "crop", step, i)) for i in mine]


class Augmented(Dataset):
    """Images whose random crop depends on the seed that comes with an index."""

    def __init__(self, images: Dataset):
        self.images = images

    def __getitem__(self, item: tuple[int, int]) -> tuple:
        index, seed = item
        torch.default_generator.manual_seed(seed)
        return self.images[index]


@torch.no_grad()
def errors(model: nn.Module, loader: DataLoader, device: torch.device) -> list[float]:
    """Top-1 and top-5 error in percent over the parts of all processes, in the parameters' precision."""
    model.eval()
    if dist.is_initialized():
        # Each process has batch statistics of its own, and rank 0's are saved.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for images, labels in loader:
        logits = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        right = logits.topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]
        counts += torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(labels), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    one, five, all_ = counts.tolist()
    return [100 - 100 * one / all_, 100 - 100 * five / all_]


# --- a run ------------------------------------------------------------------------------------------------------------


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: inq.INQ, settings: dict) -> dict:
    """What ``inq.save_training`` was given. Mistake if it belongs to a run with other settings."""
    try:
        extra = inq.load_training(path, model, optimizer, run)
    except ValueError as error:
        raise Mistake(f"to go on: {path}: {error}") from error
    saved = extra.get("settings", {})
    for name, value in settings.items():
        if saved.get(name) != value:
            raise Mistake(f"to go on: {path}: {name}: expected {value!r}, as this run is, got {saved.get(name)!r}")
    return extra


def check_finite(step: int, loss: float, model: nn.Module, lr: float) -> None:
    """Mistake if the training has diverged. Saved, it would take the place of what can still go on."""
    odd = [repr(name) for name, values in model.named_parameters() if not values.isfinite().all()]
    if odd or not math.isfinite(loss):
        got = f"others in {odd[0]} and {len(odd) - 1} more" if odd else f"a loss of {loss}"
        raise Mistake(f"iteration {step}: expected a finite loss and weights, got {got} (--lr {lr})")


def train(args: argparse.Namespace) -> None:
    """Evaluate, quantize and retrain portion by portion, evaluate, pack."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    portions, fmt = portions_of(args.model, args.bits), inq.Format(args.bits, exponent=args.exponent)
    images, test_images = pictures(args.data / "train", True), pictures(args.data / "val", False)
    if len(images) < args.batch:
        raise Mistake(f"{args.data / 'train'}: expected at least a batch of {args.batch} images, got {len(images)}")
    names = ("model", "weights", "bits", "exponent", "partition", "batch", "iterations", "lr", "momentum",
             "weight_decay", "amp", "seed", "classes")  # fmt: skip
    settings = {name: getattr(args, name) for name in names} | {"images": len(images), "processes": size}

    torch.manual_seed(args.seed)
    model = network(args.model, args.weights, args.classes).to(device, memory_format=torch.channels_last)
    trained = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = inq.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, decay_every(args.iterations), GAMMA)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")
    run = inq.INQ(model, optimizer, fmt, portions, PARTITIONS[args.partition], lr_schedulers=scheduler, seed=args.seed)

    loading = {"num_workers": args.workers, "pin_memory": args.device == "cuda"}
    mine = Subset(test_images, range(rank, len(test_images), size))
    test = DataLoader(mine, max(1, args.batch // size), **loading)
    checkpoint = args.out / "training.safetensors"
    extra = resume(checkpoint, model, optimizer, run, settings) if checkpoint.exists() else {}
    step = extra.get("step", 0)
    if dist.is_initialized():
        most = torch.tensor([step, -step], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if most[0] != -most[1]:
            raise Mistake(f"{checkpoint}: expected the same file for all processes, got others or none for some")
    if "scaler" in extra:
        scaler.load_state_dict(extra["scaler"])
    before = extra.get("before") or errors(model, test, device)

    end = args.iterations * len(portions)
    sampler = Batches(len(images), args.batch, step, end, args.seed, rank, size)
    batches = iter(DataLoader(Augmented(images), batch_sampler=sampler, **loading))
    for portion in run:
        end = args.iterations * (portions.index(portion) + 1)
        trained.train()
        while step < end:
            x, labels = next(batches)
            torch.manual_seed(seed_of(args.seed, "dropout", step, rank))
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "none"):
                logits = trained(x.to(device, non_blocking=True, memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            step += 1
            if rank == 0 and (step % args.save_every == 0 or step == end):
                check_finite(step, float(loss.detach()), model, args.lr)
                print(f"{portion:.1%} frozen, iteration {step}, loss {float(loss.detach()):.3f}", flush=True)
                extra = {"step": step, "before": before, "scaler": scaler.state_dict(), "settings": settings}
                inq.save_training(checkpoint, model, optimizer, run, extra)

    after = errors(model, test, device)
    if rank == 0:
        finish(args, settings, model.cpu(), run, before, after)


def finish(args: argparse.Namespace, settings: dict, model: nn.Module, run: inq.INQ, before: list, after: list) -> None:
    """Pack, which is exact, and write everything down."""
    report = inq.convert(model, run.formats)
    if rounded := [m.name for m in report.modules if m.packed and m.sqnr_db != math.inf]:
        raise RuntimeError(f"expected weights on the grid, got others in {rounded}")
    packed = args.out / "packed.safetensors"
    inq.save(model, packed)
    recipe, there = RECIPES[args.model], paper_errors(args.model, args.bits, args.partition)
    results = {
        "settings": settings,
        "format": str(inq.Format(args.bits, exponent=args.exponent)),
        "portions": list(run.portions),
        "errors": {"before": before, "after": after},
        "paper": {"before": list(recipe.before), "after": there and list(there)},
        "bytes": {"float": report.bytes_before, "packed": report.bytes_after},
        "sha256": hashlib.sha256(packed.read_bytes()).hexdigest(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "inq_kernels": inq.__version__},
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{args.model}, {args.bits} bits, {args.partition}: top-1 and top-5 error, %; the paper's")
    for name, values, other in (("before", before, recipe.before), ("after", after, there)):
        beside = " ".join(f"{value:6.2f}" for value in other) if other else "  none"
        print(f"{name:6}  {values[0]:6.2f} {values[1]:6.2f}  {beside}")
    print(f"{report.bytes_before} bytes, {report.bytes_after} packed\nhash {results['sha256']}")


# --- the command ------------------------------------------------------------------------------------------------------


def decay_every(iterations: int) -> int:
    """After how many iterations of a portion the learning rate falls: where the solver's does."""
    return max(1, iterations * SOLVER_DECAY // SOLVER_ITERATIONS)


def positive(text: str) -> int:
    """For argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1, got {text}")
    return value


def not_negative(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """For argparse."""

    def number(text: str) -> int | float:
        if not 0 <= (value := kind(text)) < math.inf:
            what = "an integer" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"expected {what} ≥ 0, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse's word for what is no number at all
    return number


def arguments(argv: list[str] | None, processes: int) -> argparse.Namespace:
    """The options, with the paper's settings for what is not given. Mistake where they do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder of train and val")
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5), default=5)
    parser.add_argument("--partition", choices=PARTITIONS, default="pruning-inspired")
    parser.add_argument("--exponent", choices=("max", "mse"), default="max", help="max: the paper's (default)")
    parser.add_argument("--weights", choices=(WEIGHTS, "none"), default=WEIGHTS, help="none: not trained, to try it")
    parser.add_argument("--batch", type=positive, help="of all processes together (default: the paper's)")
    parser.add_argument("--iterations", type=positive, help="a portion (default: the solver's 16.1 million images)")
    parser.add_argument("--lr", type=not_negative(float), help=f"(default: {SOLVER_LR} × batch / {SOLVER_BATCH})")
    parser.add_argument("--momentum", type=not_negative(float), default=MOMENTUM)
    parser.add_argument("--weight-decay", type=not_negative(float), help="(default: the paper's)")
    parser.add_argument("--amp", choices=AMP, default="none", help="the dtype of mixed precision")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=not_negative(int), default=8,
                        help="processes that read images, for each of torchrun's")  # fmt: skip
    parser.add_argument("--save-every", type=positive, default=1000, metavar="ITERATIONS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="(default: imagenet/MODEL-BITS-PARTITION)")
    args = parser.parse_args(argv)
    recipe = RECIPES[args.model]
    args.batch = args.batch or recipe.batch
    args.iterations = args.iterations or round(SOLVER_ITERATIONS * SOLVER_BATCH / args.batch)
    args.lr = SOLVER_LR * args.batch / SOLVER_BATCH if args.lr is None else args.lr
    args.weight_decay = recipe.weight_decay if args.weight_decay is None else args.weight_decay
    args.out = args.out or Path("imagenet", f"{args.model}-{args.bits}-{args.partition}")
    args.classes = class_count(args.data, args.weights)
    if args.batch % processes:
        raise Mistake(f"--batch: expected a multiple of the {processes} processes, got {args.batch}")
    needed = int(os.environ.get("LOCAL_RANK", "0")) + 1
    if args.device == "cuda" and (found := torch.cuda.device_count()) < needed:
        raise Mistake(f"--device cuda: expected at least {needed} GPUs that torch can use, got {found}")
    return args


def make_folder(path: Path) -> None:
    """Mistake if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--out: expected a folder, or a place for one, got {error}") from error


def main(argv: list[str] | None = None) -> None:
    """The command; under torchrun, one of its processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        args = arguments(argv, processes)
        make_folder(args.out)
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        train(args)
        # Not after a mistake: the other processes would fail, and torchrun end this one before its line is out.
        if dist.is_initialized():
            dist.destroy_process_group()
    except Mistake as mistake:
        # From a process that reads images it comes as the text of a traceback, which ends with the line.
        sys.exit(f"imagenet.py: error: {str(mistake).rpartition('Mistake: ')[2].strip()}")


if __name__ == "__main__":
    main()
