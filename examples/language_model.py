"""A byte-level transformer language model on Python's own standard library, in float32 and after INQ.

    python examples/language_model.py           # about half an hour of two cores; --quick takes seconds

Trains a small network in float32 on the .py files of the running Python, then, from its weights: INQ at 5, 4, 3 and 2
bits, float32 for as many further steps, plain rounding, and ``inq.calibrate``. Every quantized network is measured as
packed, by the bits that it needs for a byte of files that it was not trained on. Each stage's numbers are saved as soon
as it is done: the same command goes on after an interruption. The table is printed and, with where it comes from,
written to DIR/results.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inq_kernels as inq

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
# One exponent for each output row: a byte a row, and less error at 2 and 3 bits than one a layer.
GRANULARITY = "channel"
# The accumulated portions; the network is retrained for ``Recipe.phase_steps`` after each.
PORTIONS = {
    5: (0.5, 0.75, 0.9, 1.0),
    4: (0.5, 0.75, 0.9, 1.0),
    3: (0.3, 0.5, 0.7, 0.85, 0.95, 1.0),
    2: (0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.98, 1.0),
}


@dataclass(frozen=True)
class Recipe:
    """Sizes, and how long everything is trained. Chosen for the time it takes, not on the validation files."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 1000
    lr: float = 2e-3
    phase_steps: int = 150
    retrain_lr: float = 1e-3
    weight_decay: float = 0.01
    validation_windows: int = 1024
    calibration_batches: int = 4


# Enough to see that everything works, too short for the numbers to mean anything.
QUICK = Recipe(width=32, layers=2, heads=2, context=64, batch=8, steps=60, phase_steps=4, validation_windows=64)


# --- the data ---------------------------------------------------------------------------------------------------------


@functools.cache
def corpus() -> tuple[Tensor, Tensor, dict]:
    """uint8 bytes to train on and to validate with, and what they are: every tenth file, by a hash of its name, is for
    validation. Tests are left out, since some distributions of Python do."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                files[path.relative_to(root).as_posix()] = path
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in sorted(files):
        validation = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
        parts[validation].append(files[name].read_bytes())
    if not all(parts):
        raise RuntimeError("language model: data: expected .py files of the standard library, found too few")
    texts = [b"".join(part) for part in parts]
    facts = {
        "python": platform.python_version(),
        "train": {"files": len(parts[0]), "bytes": len(texts[0]), "sha256": hashlib.sha256(texts[0]).hexdigest()},
        "validation": {"files": len(parts[1]), "bytes": len(texts[1]), "sha256": hashlib.sha256(texts[1]).hexdigest()},
    }
    train, validation = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return train, validation, facts


def batch(data: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """int64 [batch, context + 1]: windows from anywhere in ``data``."""
    starts = torch.randint(len(data) - recipe.context, (recipe.batch, 1), generator=generator)
    return data[starts + torch.arange(recipe.context + 1)].long()


# --- the network ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention, then two linear layers with a GELU between, each added to what came in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Bytes [B, T] to logits [B, T, 256] of the next byte. Its Linear weights are quantized, embeddings are not."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.byte = nn.Embedding(256, recipe.width)
        self.position = nn.Embedding(recipe.context, recipe.width)
        self.blocks = nn.Sequential(*(Block(recipe.width, recipe.heads) for _ in range(recipe.layers)))
        self.norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, 256, bias=False)
        for embedding in (self.byte, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * recipe.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each byte but the first, in nats."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, recipe: Recipe) -> float:
    """Over evenly spaced windows of the validation files; a byte sees what is before it in its window."""
    data = corpus()[1]
    starts = torch.linspace(0, len(data) - recipe.context - 1, recipe.validation_windows).long()
    windows = data[starts[:, None] + torch.arange(recipe.context + 1)].long()
    model.eval()
    total = sum(float(loss(model, part).double()) * len(part) for part in windows.split(32))
    model.train()
    return total / len(windows) / math.log(2)


class Trainer:
    """AdamW (``inq.optim``'s, which holds frozen weights within its step) on windows of the training files."""

    def __init__(self, model: nn.Module, recipe: Recipe, lr: float, seed: int):
        self.model, self.recipe = model, recipe
        self.optimizer = inq.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=recipe.weight_decay)
        # Its own: all stages that retrain see the same windows.
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def train(self, steps: int, scheduler: torch.optim.lr_scheduler.LRScheduler) -> float:
        """The mean loss of the last tenth of the steps, in bits a byte."""
        last: list[float] = []
        for step in range(steps):
            self.optimizer.zero_grad()
            value = loss(self.model, batch(corpus()[0], self.recipe, self.generator))
            value.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            scheduler.step()
            self.steps += 1
            if step >= steps - max(steps // 10, 1):
                last.append(float(value.detach()) / math.log(2))
        return sum(last) / len(last)


# --- the stages -------------------------------------------------------------------------------------------------------


def trained(recipe: Recipe, seed: int) -> LanguageModel:
    """The float32 network of a seed: warmed up, then a cosine down to a tenth of the rate."""
    torch.manual_seed(seed)
    model = LanguageModel(recipe)
    trainer = Trainer(model, recipe, recipe.lr, seed)
    warm = max(recipe.steps // 15, 1)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(recipe.steps - warm, 1))

    trainer.train(recipe.steps, torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, rate))
    return model


def base(recipe: Recipe, out: Path) -> list[dict]:
    """The float32 network that everything starts from."""
    model = trained(recipe, SEED)
    partial = out / "base.safetensors.partial"
    save_file(model.state_dict(), partial)
    os.replace(partial, out / "base.safetensors")
    return [{"row": "float32", "steps": recipe.steps, **_measured(model, recipe)}]


def _start(recipe: Recipe, out: Path) -> LanguageModel:
    model = LanguageModel(recipe)
    model.load_state_dict(load_file(out / "base.safetensors"))
    return model


def _measured(model: nn.Module, recipe: Recipe, report: inq.ConvertReport | None = None) -> dict:
    """Of a packed model with its ``report``, or of one in float32: what all rows have."""
    if report is None:
        size = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    else:
        biases = {m.name: model.get_submodule(m.name).bias for m in report.modules if m.packed}
        packed = sum(m.bytes_after for m in report.modules if m.packed)
        size = packed - sum(bias.nbytes for bias in biases.values() if bias is not None)
    return {"bits_per_byte": bits_per_byte(model, recipe), "weight_bytes": size}


def _phases(model: nn.Module, recipe: Recipe) -> tuple[Trainer, torch.optim.lr_scheduler.LRScheduler]:
    """How INQ, and float32 beside it, go on: a cosine from ``retrain_lr`` to a tenth of it, again in each phase."""
    trainer = Trainer(model, recipe, recipe.retrain_lr, SEED + 1)
    end = recipe.retrain_lr / 10
    return trainer, torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, recipe.phase_steps, end)


def longer(recipe: Recipe, out: Path) -> list[dict]:
    """float32, trained on as INQ is, and measured where each bit-width ends."""
    model = _start(recipe, out)
    trainer, scheduler = _phases(model, recipe)
    start, rate = copy.deepcopy(scheduler.state_dict()), recipe.retrain_lr
    ends = {len(portions) for portions in PORTIONS.values()}
    rows = []
    for phase in range(1, max(ends) + 1):
        scheduler.load_state_dict(copy.deepcopy(start))
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        trainer.train(recipe.phase_steps, scheduler)
        if phase in ends:
            rows.append({"row": f"float32+{trainer.steps}", "steps": trainer.steps, **_measured(model, recipe)})
    return rows


def incremental(recipe: Recipe, out: Path, bits: int) -> list[dict]:
    """INQ, then packed without any further rounding."""
    model = _start(recipe, out)
    trainer, scheduler = _phases(model, recipe)
    fmt = inq.Format(bits, granularity=GRANULARITY)
    run = inq.INQ(model, trainer.optimizer, fmt, PORTIONS[bits], lr_schedulers=scheduler)
    curve = [{"portion": portion, "train": trainer.train(recipe.phase_steps, scheduler)} for portion in run]
    run.close()
    report = inq.convert(model, run.formats)
    inexact = [m.name for m in report.modules if m.packed and m.sqnr_db != math.inf]
    if inexact:
        raise RuntimeError(f"language model, {bits} bits: expected weights on the grid after INQ, not in {inexact}")
    row = {"row": f"inq-{bits}", "bits": bits, "format": str(fmt), "portions": PORTIONS[bits], "curve": curve}
    return [{**row, "steps": trainer.steps, **_measured(model, recipe, report)}]


def one_shot(recipe: Recipe, out: Path) -> list[dict]:
    """Without retraining: plain rounding, and ``inq.calibrate`` on windows of the training files."""
    generator = torch.Generator().manual_seed(SEED + 2)
    batches = [batch(corpus()[0], recipe, generator)[:, :-1] for _ in range(recipe.calibration_batches)]
    rows = []
    for bits in PORTIONS:
        fmt = inq.Format(bits, granularity=GRANULARITY)
        for method in ("plain", "calibrated", "calibrated-scales"):
            model = _start(recipe, out)
            if method == "plain":
                report = inq.convert(model, fmt)
            else:
                report = inq.calibrate(model, batches, fmt, row_scales=method.endswith("scales"))
            row = {"row": f"{method}-{bits}", "bits": bits, "format": str(fmt), "steps": 0}
            rows.append({**row, **_measured(model, recipe, report)})
    return rows


# The longest first, so that processes finish together; "base" comes before all others.
STAGES = {
    "base": base,
    "longer": longer,
    **{f"inq-{bits}": functools.partial(incremental, bits=bits) for bits in (2, 3, 4, 5)},
    "one-shot": one_shot,
}


def run_stage(name: str, recipe: Recipe, out: Path, key: dict) -> dict:
    """Run one stage, or take over its saved numbers if they are of the same ``key``."""
    path = out / "stages" / f"{name}.json"
    with suppress(OSError, json.JSONDecodeError):
        saved = json.loads(path.read_text())
        if saved["key"] == key:
            return saved | {"again": True}
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = STAGES[name](recipe, out)
    stage = {"key": key, "rows": rows, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    write_json(path, stage)
    return json.loads(path.read_text()) | {"again": False}


def write_json(path: Path, value: object) -> None:
    """Replace a file by another in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


# --- where the numbers come from --------------------------------------------------------------------------------------


def software() -> dict:
    """Versions, and the commit of this checkout, "-dirty" if tracked files were changed since."""
    commit = None
    if (ROOT / ".git").exists():
        words = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        with suppress(OSError):  # no git
            done = subprocess.run([*words, "--exclude=*"], capture_output=True, text=True, check=False)
            commit = done.stdout.strip() or None
    return {
        "inq_kernels": inq.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine() -> dict:
    """What the numbers may depend on; no name of the machine, no path."""
    cpu = platform.processor() or None
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the table --------------------------------------------------------------------------------------------------------

TITLES = {
    "inq": "INQ",
    "plain": "plain rounding",
    "calibrated": "`inq.calibrate`",
    "calibrated-scales": "`inq.calibrate`, row scales",
}


def change(row: dict, reference: dict) -> float:
    """Percent more bits a byte than ``reference``; negative is better."""
    return 100 * (row["bits_per_byte"] / reference["bits_per_byte"] - 1)


def table(results: dict) -> str:
    """Markdown: one line for each network."""
    rows = {row["row"]: row for row in results["rows"]}
    start = rows["float32"]
    lines = [
        "| network | steps after float32 | bits per byte | against float32 | against float32 trained as long "
        "| linear weights |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        method, _, bits = name.rpartition("-")
        further = 0 if name == "float32" else row["steps"]
        if method:
            title = f"{bits} bits, {TITLES[method]}"
        else:
            title = "float32" if name == "float32" else f"float32, {further} further steps"
        beside = rows.get(f"float32+{further}") if method == "inq" else None
        cells = [
            title,
            str(further),
            f"{row['bits_per_byte']:.4f}",
            "" if row is start else f"{change(row, start):+.2f} %",
            f"{change(row, beside):+.2f} %" if beside else "",
            f"{row['weight_bytes'] / 1024:.0f} KiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="INQ on a byte-level language model of Python's standard library.")
    parser.add_argument("--out", type=Path, default=Path("language_model"), metavar="DIR", help="output folder")
    parser.add_argument("--quick", action="store_true", help="shows that it works, not how well")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at a time, one thread each (default: 2)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet, print the table, write results.json."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    wall = time.perf_counter()
    recipe = QUICK if args.quick else Recipe()
    (args.out / "stages").mkdir(parents=True, exist_ok=True)
    facts = {"software": software(), "recipe": dataclasses.asdict(recipe), "data": corpus()[2], "seed": SEED}
    key = {"commit": facts["software"]["commit"], "torch": torch.__version__} | {
        name: facts[name] for name in ("recipe", "data", "seed")
    }

    def done(name: str, stage: dict) -> dict:
        what = "taken over" if stage["again"] else f"{stage['wall_s']:.0f} s"
        print(f"{name}: {what}", file=sys.stderr, flush=True)
        return stage

    stages = {"base": done("base", run_stage("base", recipe, args.out, key))}
    names = [name for name in STAGES if name != "base"]
    if args.processes == 1:
        stages |= {name: done(name, run_stage(name, recipe, args.out, key)) for name in names}
    else:
        # Not fork: torch's threads do not survive it.
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run_stage, name, recipe, args.out, key): name for name in names}
            for future in as_completed(futures):
                stages[futures[future]] = done(futures[future], future.result())

    # This process, its children, which have ended, and the stages that earlier ones ran.
    times = os.times()
    earlier = [stage for stage in stages.values() if stage["again"]]
    used = times.user + times.system + times.children_user + times.children_system
    order = ["base", "longer", "inq-5", "inq-4", "inq-3", "inq-2", "one-shot"]
    results = {
        "quick": args.quick,
        "command": " ".join(["python examples/language_model.py", *argv]),
        "machine": machine() | {"processes": args.processes, "threads": 1},
        **facts,
        "granularity": GRANULARITY,
        "rows": [row for name in order for row in stages[name]["rows"]],
        "cpu_s": round(used + sum(stage["cpu_s"] for stage in earlier), 1),
        "wall_s": round(time.perf_counter() - wall + sum(stage["wall_s"] for stage in earlier), 1),
        "stages": {
            name: {part: round(stages[name][part], 1) for part in ("cpu_s", "wall_s")}
            | {"taken_over": stages[name]["again"]}
            for name in order
        },
    }
    write_json(args.out / "results.json", results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
