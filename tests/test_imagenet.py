"""examples/imagenet.py but for what torchvision gives it, which is tests/integrations/test_torchvision.py: the paper's
settings, the schedule, the order of the data, errors, and whole runs of a tiny network that are stopped and go on."""

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from imagenet_tiny import PER_CLASS, Pictures, folder, load, network, tiny
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import inq_kernels as inq

ROOT = Path(__file__).resolve().parent.parent
PAGE, TINY = ROOT / "docs" / "imagenet.md", ROOT / "tests" / "imagenet_tiny.py"
SHORT = [
    "--model",
    "resnet18",
    "--weights",
    "none",
    "--batch",
    "8",
    "--iterations",
    "7",
    "--lr",
    "0.05",
    "--workers",
    "0",
]


@pytest.fixture(autouse=True)
def random_states():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def run(data, out, *more, example=None):
    """A run in this process: its results."""
    (example or tiny()).main([str(data), *SHORT, "--out", str(out), "--device", "cpu", *more])
    return json.loads((out / "results.json").read_text())


# --- the paper's numbers ----------------------------------------------------------------------------------------------

# Section 3 and appendix of the paper: model, bits, portions, batch, weight decay, momentum.
SETTINGS = """
alexnet 5 | .3 .6 .8 1 | 256 | 5e-4 | .9
vgg16 5 | .5 .75 .875 1 | 32 | 5e-4 | .9
googlenet 5 | .2 .4 .6 .8 1 | 80 | 2e-4 | .9
resnet18 5 | .5 .75 .875 1 | 80 | 5e-4 | .9
resnet50 5 | .5 .75 .875 1 | 32 | 5e-4 | .9
resnet18 4 | .3 .5 .8 .9 .95 1 | 80 | 5e-4 | .9
resnet18 3 | .2 .4 .6 .7 .8 .9 .95 1 | 80 | 5e-4 | .9
resnet18 2 | .2 .4 .6 .7 .8 .85 .9 .95 .975 1 | 80 | 5e-4 | .9
""".strip().splitlines()
# Tables 1, 2 and 3: model, bits, partition, top-1/top-5 error of the reference and of INQ.
ERRORS = """
alexnet 5 pruning-inspired 42.76/19.77 42.61/19.54
vgg16 5 pruning-inspired 31.46/11.35 29.18/9.70
googlenet 5 pruning-inspired 31.11/10.97 30.98/10.72
resnet18 5 pruning-inspired 31.73/11.31 31.02/10.90
resnet50 5 pruning-inspired 26.78/8.76 25.19/7.55
resnet18 5 random 31.73/11.31 32.11/11.73
resnet18 4 pruning-inspired 31.73/11.31 31.11/10.99
resnet18 3 pruning-inspired 31.73/11.31 31.92/11.64
resnet18 2 pruning-inspired 31.73/11.31 33.98/12.87
""".strip().splitlines()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("thousand"), 1000)


@pytest.mark.parametrize("line", SETTINGS)
def test_the_papers_settings_are_the_defaults(line, thousand):
    (model, bits), portions, batch, decay, momentum = (part.split() for part in line.split("|"))
    example = load()
    args = example.arguments([str(thousand), "--model", model, "--bits", bits], 1)
    assert example.portions_of(model, int(bits)) == tuple(map(float, portions))
    assert (args.batch, args.weight_decay, args.momentum) == (int(*batch), float(*decay), float(*momentum))
    # As many images as the solver's 63,000 iterations at batch 256, the learning rate in proportion to the batch.
    assert args.iterations * args.batch == 63_000 * 256
    assert args.lr == pytest.approx(0.003 * args.batch / 256)
    assert example.decay_every(args.iterations) * args.batch == 15_000 * 256
    assert (args.exponent, args.partition, args.weights) == ("max", "pruning-inspired", "IMAGENET1K_V1")


@pytest.mark.parametrize("line", ERRORS)
def test_the_papers_errors(line):
    example = load()
    model, bits, partition, before, after = line.split()
    assert example.RECIPES[model].before == tuple(map(float, before.split("/")))
    assert example.paper_errors(model, int(bits), partition) == tuple(map(float, after.split("/")))


def test_what_the_paper_has_not():
    example = load()
    assert example.paper_errors("vgg16", 4, "pruning-inspired") is None
    assert example.paper_errors("vgg16", 5, "random") is None
    assert example.paper_errors("resnet18", 4, "random") is None
    assert example.portions_of("vgg16", 4) == inq.PAPER_PORTIONS[4]


# --- the page ---------------------------------------------------------------------------------------------------------

# Of one crop, in 10^9 multiplications: torchvision's own numbers for its weights.
OPERATIONS = {"alexnet": 0.714, "vgg16": 15.47, "googlenet": 1.498, "resnet18": 1.814, "resnet50": 4.089}
# Images a second: ResNet-50 on one A100, and one core that reads them; images in ImageNet's training set.
A100, CORE, IMAGENET = 2470, 200, 1_281_167


def cost(model, bits):
    """A line of the page's table."""
    portions = len(load().portions_of(model, bits))
    images = portions * 63_000 * 256
    gpu = images * OPERATIONS[model] / OPERATIONS["resnet50"] / A100 / 3600
    return (
        f"| {model} | {bits} | {portions} | {images / 1e6:.0f} | {images / IMAGENET:.0f} "
        f"| {gpu:.1f} | {images / CORE / 3600:.0f} |"
    )


def test_the_page_says_what_it_costs():
    text = PAGE.read_text()
    table = re.search(r"<!-- cost: .*? -->\n(.*?)<!-- end of cost -->", text, re.DOTALL)[1].strip().splitlines()
    assert table[2:] == [cost(*line.split()[:1], int(line.split()[1])) for line in sorted_runs()]
    hours = [[float(cell) for cell in line.split("|")[6:8]] for line in table[2:]]
    hours.append(hours[3])  # ResNet-18 at 5 bits once more, with the random partition
    assert "nine runs" in text
    assert [round(sum(column), digits) for column, digits in zip(zip(*hours, strict=True), (0, -2), strict=True)] == [
        65, 1100,
    ]  # fmt: skip
    assert "65 A100-hours and 1,100 core-hours" in text


def sorted_runs():
    """SETTINGS, by model as in table 1 and by bits."""
    models = list(load().RECIPES)
    return sorted(SETTINGS, key=lambda line: (models.index(line.split()[0]), -int(line.split()[1])))


@pytest.mark.parametrize("line", re.findall(r"^.*examples/imagenet.py .*$", PAGE.read_text(), re.MULTILINE))
def test_commands_of_the_page(line, thousand):
    words = shlex.split(line)
    data, *options = words[words.index("examples/imagenet.py") + 1 :]
    assert data == "DATA"
    load().arguments([str(thousand), *options], 8 if words[0] == "torchrun" else 1)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_processes_share_each_batch_and_any_can_go_on_anywhere():
    example = load()

    def batches(start, rank, size, end=12):
        return list(example.Batches(18, 4, start, end, 0, rank, size))

    whole = batches(0, 0, 1)
    assert all(len(batch) == 4 for batch in whole)
    halves = [batches(0, rank, 2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert batches(5, 0, 1) == whole[5:]
    assert len(example.Batches(18, 4, 5, 12, 0, 0, 1)) == 7
    # Four batches an epoch, of images that differ; another order in the next one, and other crops.
    epochs = [[i for batch in whole[e : e + 4] for i, _ in batch] for e in (0, 4, 8)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert epochs[0] != epochs[1]
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    assert list(example.Batches(18, 4, 0, 12, 1, 0, 1)) != whole


class Fixed(nn.Module):
    """Logits that are the images."""

    def forward(self, images):
        return images.flatten(1)


def test_top_1_and_top_5_errors():
    logits = torch.arange(10.0).expand(8, 10).reshape(8, 10, 1, 1)
    labels = [9, 9, 9, 8, 7, 5, 4, 0]  # three right; three more among the five largest
    loader = DataLoader(list(zip(logits, labels, strict=True)), 3)
    assert load().errors(Fixed(), loader, torch.device("cpu")) == [62.5, 25.0]


def in_file(data, out):
    """A run's packed network, and its errors."""
    packed = inq.load(out / "packed.safetensors", network("resnet18", "none", 6))
    return packed, load().errors(packed, DataLoader(Pictures(data / "val", False), 32), torch.device("cpu"))


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("data"))


def stopped_at(step):
    """Raises after so many optimizer steps."""
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt

    return register_optimizer_step_post_hook(count)


@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_a_run_that_is_interrupted_ends_in_the_same_bits(data, tmp_path, amp):
    more = ("--amp", amp, "--save-every", "3", "--partition", "random")
    whole = run(data, tmp_path / "whole", *more)
    handle = stopped_at(17)  # saved after 3, …, 7, …, 14, 15: in the third portion
    try:
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "again", *more)
    finally:
        handle.remove()
    assert not (tmp_path / "again" / "results.json").exists()
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        assert run(data, tmp_path / "again", *more) == whole
    finally:
        handle.remove()
    assert len(steps) == 4 * 7 - 15, "it did not go on from the checkpoint"
    # Started once more there is nothing left to train, and everything is written again.
    assert run(data, tmp_path / "again", *more) == whole


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first optimizer steps are left out
def test_float16s_scale_comes_back(data, tmp_path, monkeypatch):
    """It begins so large that steps overflow, and would again if a run that goes on began with it."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24))
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        whole = run(data, tmp_path / "whole", "--amp", "float16")
    finally:
        handle.remove()
    assert 10 < len(steps) < 4 * 7
    handle = stopped_at(10)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "again", "--amp", "float16")
    finally:
        handle.remove()
    assert run(data, tmp_path / "again", "--amp", "float16") == whole


def test_what_a_run_gives(data, tmp_path, capsys):
    rates = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        results = run(data, tmp_path / "out", "--iterations", "21", "--bits", "4")
    finally:
        handle.remove()
    # A fifth every 5 of 21 iterations, as the solver's every 15,000 of 63,000; anew in each of six portions.
    portion = [0.05 * 0.2 ** (step // 5) for step in range(21)]
    assert rates == pytest.approx(portion * 6)
    assert results["portions"] == [0.3, 0.5, 0.8, 0.9, 0.95, 1.0]
    assert results["format"] == str(inq.Format.paper(4))
    assert results["paper"] == {"before": [31.73, 11.31], "after": [31.11, 10.99]}
    before, after = results["errors"]["before"], results["errors"]["after"]
    assert before[0] > 50 > 20 > after[0] >= after[1]

    # The errors are those of the packed file, in which every convolution and linear layer is.
    packed, measured = in_file(data, tmp_path / "out")
    assert measured == after
    layers = [module for module in packed if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert [type(layer) for layer in layers] == [inq.Conv2d, inq.Conv2d, inq.Linear]
    size = results["bytes"]
    assert size["packed"] < size["float"] / 3
    output = capsys.readouterr().out
    assert f"hash {results['sha256']}" in output
    assert re.search(rf"^after +{after[0]:.2f} +{after[1]:.2f} +31.11 +10.99$", output, re.MULTILINE)


def test_two_processes_of_which_one_is_killed_and_then_another_number(data, tmp_path):
    """Both started again, as torchrun does, they end in the bits of two that were not stopped."""
    more = ("--device", "cpu", "--save-every", "3", "--workers", "1")
    words = (sys.executable, str(TINY), str(tmp_path), str(data), *SHORT, *more)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training.safetensors: expected the same file for all processes, got others or none for some" in done.stderr
    whole, killed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert killed == whole
    assert whole["settings"]["processes"] == 2
    # Each process has batch statistics of its own; measured are the ones that are saved.
    assert in_file(data, tmp_path / "whole")[1] == whole["errors"]["after"]
    with pytest.raises(SystemExit, match="processes: expected 1, as this run is, got 2"):
        run(data, tmp_path / "whole")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def remove(path):
    for inner in path.iterdir():
        remove(inner) if inner.is_dir() else inner.unlink()
    path.rmdir()


MISTAKES = {
    "no folder": (lambda d: remove(d), (), "data/train: expected a folder .*, got none"),
    "no val": (lambda d: remove(d / "val"), (), "data/val: expected a folder .*, got none"),
    "no classes": (
        lambda d: [remove(f) for f in (d / "train").iterdir()], (), "data/train: expected .*, got no folder in it",
    ),
    "an empty class": (
        lambda d: (d / "train" / "n2" / "0.jpeg").unlink(), (),
        r"data/train/n2: expected images, got an empty folder \(1 of 6\)",
    ),
    "other classes": (
        lambda d: (d / "val" / "n5").rename(d / "val" / "n7"), (),
        r"expected the same classes in train and val, got 'n5' in one \(2 such\)",
    ),
    "too few for the weights": (
        lambda d: None, ("--weights", "IMAGENET1K_V1"), "expected the 1000 classes of the pretrained weights, got 6",
    ),
    "a batch that is too large": (
        lambda d: None, ("--batch", "97"), f"data/train: expected at least a batch of 97 images, got {6 * PER_CLASS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    spoil, more, message = MISTAKES[name]
    data = folder(tmp_path / "data")
    spoil(data)
    with pytest.raises(SystemExit) as caught:
        run(data, tmp_path / "out", *more)
    assert re.search(f"^imagenet.py: error: .*{message}$", str(caught.value))
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits", "6"), "argument --bits: invalid choice: 6"),
        (("--bits", "five"), "argument --bits: invalid int value: 'five'"),
        (("--model", "resnet34"), "argument --model: invalid choice: 'resnet34'"),
        (("--partition", "smallest"), "argument --partition: invalid choice"),
        (("--iterations", "0"), "argument --iterations: expected an integer ≥ 1, got 0"),
        (("--workers", "-1"), "argument --workers: expected an integer ≥ 0, got -1"),
        (("--lr", "nan"), "argument --lr: expected a finite number ≥ 0, got nan"),
        (("--momentum", "-1"), "argument --momentum: expected a finite number ≥ 0, got -1"),
        (("--weight-decay", "inf"), "argument --weight-decay: expected a finite number ≥ 0, got inf"),
    ],
)
def test_a_bad_option(data, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(data, tmp_path, *more)
    assert message in capsys.readouterr().err


def test_a_batch_that_the_processes_cannot_share(data):
    example = load()
    with pytest.raises(example.Mistake, match="--batch: expected a multiple of the 3 processes, got 8"):
        example.arguments([str(data), *SHORT], 3)


def test_fewer_gpus_than_processes(data, monkeypatch):
    example = load()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(example.Mistake, match="--device cuda: expected at least 2 GPUs that torch can use, got 1"):
        example.arguments([str(data), *SHORT, "--device", "cuda"], 2)


def test_out_that_is_a_file(data, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match=r"^imagenet.py: error: --out: expected a folder, .*File exists: '.*out'$"):
        run(data, tmp_path / "out")


def test_a_training_that_diverges_is_not_saved(data, tmp_path):
    """It would go on for days, over the checkpoint from before, until the next portion refuses its weights."""
    steps = "--save-every", "1", "--lr", "1e30"
    handle = stopped_at(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, *steps)
    finally:
        handle.remove()
    saved = (tmp_path / "training.safetensors").read_bytes()
    message = r"^imagenet.py: error: iteration 2: expected a finite loss and weights, got .* \(--lr 1e\+30\)$"
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, *steps)
    assert (tmp_path / "training.safetensors").read_bytes() == saved


def test_a_mistake_of_a_process_that_reads_images_is_one_line(data, tmp_path):
    class Broken(Pictures):
        def __getitem__(self, index):
            raise example.Mistake("3.jpeg: expected an image")

    example = tiny()
    example.pictures = Broken
    with pytest.raises(SystemExit, match="^imagenet.py: error: 3.jpeg: expected an image$"):
        run(data, tmp_path, "--workers", "1", example=example)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lr", "0.1"), "lr: expected 0.1, as this run is, got 0.05"),
        (("--iterations", "8"), "iterations: expected 8, as this run is, got 7"),
        (("--seed", "1"), "inq.INQ.load_state_dict: seed: expected 1, .* got 0"),
        (("--bits", "4"), r"inq.INQ.load_state_dict: portions: expected \[0.3, .* got \[0.5, "),
        (("--exponent", "mse"), "inq.INQ.load_state_dict: layer '0': format: expected .*'mse'.* got .*'max'"),
    ],
)
def test_going_on_with_other_settings(data, tmp_path, more, message):
    handle = stopped_at(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, "--save-every", "1")
    finally:
        handle.remove()
    with pytest.raises(SystemExit, match=f"^imagenet.py: error: to go on: .*training.safetensors: {message}"):
        run(data, tmp_path, *more)


def test_a_damaged_checkpoint(data, tmp_path):
    (tmp_path / "training.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="^imagenet.py: error: to go on: .*training.safetensors: "):
        run(data, tmp_path)


def test_without_torchvision(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match=r"expected torchvision \(pip install 'inq_kernels\[imagenet\]'\), got"):
        run(data, tmp_path, example=load())
