"""examples/imagenet.py with torchvision itself: an ImageFolder of a few images, all five networks an eighth as wide,
and the pretrained networks as torchvision builds them, from files made here in the place of its downloads."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from imagenet_shrunk import example
from imagenet_tiny import load
from test_imagenet import OPERATIONS, PAGE
from torch import nn
from torch.utils.data import DataLoader

import inq_kernels as inq

HERE = Path(__file__).resolve().parent
CLASSES = 3
MODELS = ("alexnet", "vgg16", "googlenet", "resnet18", "resnet50")
SHORT = ["--weights", "none", "--batch", "4", "--iterations", "2", "--lr", "0.001", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of other sizes than the crop, and of more kinds than one."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label in range(CLASSES):
            folder = root / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(4):
                height, width = 80 + 10 * number, 100 - 5 * label
                pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
                pixels[..., label] = 255
                image = Image.fromarray(pixels.numpy())
                image.save(folder / f"{number}.JPEG") if number else image.convert("L").save(folder / "0.png")
    return root


def run(data, out, *more, module=None):
    (module or example()).main([str(data), *SHORT, "--out", str(out), *more])
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_every_network(data, tmp_path, model):
    """The whole way, on an eighth of its width; and the packed file gives the errors that were written down."""
    module = example()
    results = run(data, tmp_path, "--model", model, module=module)
    assert results["portions"] == list(module.RECIPES[model].portions)
    assert results["paper"]["after"] == list(module.RECIPES[model].after)
    plain = module.network(model, "none", CLASSES)
    layers = [name for name, part in plain.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    packed = inq.load(tmp_path / "packed.safetensors", plain).eval()
    # All of them: the first and the last layer too.
    assert all(isinstance(packed.get_submodule(name), (inq.Conv2d, inq.Linear)) for name in layers)
    loader = DataLoader(module.pictures(data / "val", False), 4)
    assert module.errors(packed, loader, torch.device("cpu")) == results["errors"]["after"]
    digest = hashlib.sha256((tmp_path / "packed.safetensors").read_bytes()).hexdigest()
    assert digest == results["sha256"]


def test_kill_9_and_going_on(data, tmp_path):
    """A process with workers that is killed in its fifth step ends, started again, in the bits of one that was not."""
    more = ("--model", "resnet18", "--save-every", "1", "--amp", "bfloat16", "--workers", "1")
    whole = run(data, tmp_path / "whole", *more)
    words = [str(data), *SHORT, *more, "--out", str(tmp_path / "again")]
    script = (
        "import os, signal, sys\n"
        f"sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "import torch, imagenet_shrunk\n"
        "from torch.optim.optimizer import register_optimizer_step_post_hook\n"
        "torch.set_num_threads(1)\n"
        "steps = []\n"
        "def count(*_):\n"
        "    steps.append(1)\n"
        "    if len(steps) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "register_optimizer_step_post_hook(count)\n"
        f"imagenet_shrunk.example().main({words!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert "iteration 4," in done.stdout
    assert "iteration 5," not in done.stdout
    assert run(data, tmp_path / "again", *more) == whole


def test_torchrun(data, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = (str(HERE / "imagenet_shrunk.py"), str(data), *SHORT, "--model", "googlenet", "--out", str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run((*torchrun, *words), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["processes"] == 2
    assert inq.load(tmp_path / "packed.safetensors")


@pytest.mark.parametrize("model", ["googlenet", "resnet18"])
def test_pretrained_weights(model, tmp_path, monkeypatch):
    """What torchvision itself builds from the same file, without an auxiliary head."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights(model)["IMAGENET1K_V1"]
    torch.manual_seed(0)
    heads = {"aux_logits": True, "init_weights": False} if model == "googlenet" else {}
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.get_model(model, weights=None, **heads).state_dict(), file)
    expected = torchvision.models.get_model(model, weights=weights).eval()
    got = load().network(model, "IMAGENET1K_V1", 1000).eval()
    assert [name for name, _ in got.named_parameters()] == [name for name, _ in expected.named_parameters()]
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(got(x), expected(x))


@pytest.mark.parametrize("model", MODELS)
def test_what_the_page_says_of_torchvisions_weights(model):
    """Their errors, and the multiplications that its estimates are in proportion to."""
    about = torchvision.models.get_model_weights(model)["IMAGENET1K_V1"].meta
    assert about["_ops"] == OPERATIONS[model]
    top = about["_metrics"]["ImageNet-1K"]
    name = {"alexnet": "AlexNet", "vgg16": "VGG-16", "googlenet": "GoogLeNet"}.get(model) or f"ResNet-{model[6:]}"
    expected = f"{name} {100 - top['acc@1']:.2f}/{100 - top['acc@5']:.2f}"
    assert expected in " ".join(PAGE.read_text().split())


def test_pictures(data):
    """A centre crop to test with, which is torchvision's own for these weights, and random ones to train on."""
    example = load()
    test, train = example.pictures(data / "val", False), example.pictures(data / "train", True)
    assert len(test) == len(train) == 4 * CLASSES
    assert [label for _, label in test] == [label for label in range(CLASSES) for _ in range(4)]
    for model in MODELS:
        ways = torchvision.models.get_model_weights(model)["IMAGENET1K_V1"].transforms()
        # The same but for rounding: of 8-bit pixels there, here too.
        torch.testing.assert_close(test[1][0], ways(test.loader(test.samples[1][0])), rtol=1e-5, atol=1e-5)
    again = example.Augmented(train)
    assert again[1, 5][0].shape == (3, 224, 224)
    assert torch.equal(again[1, 5][0], again[1, 5][0])
    assert not torch.equal(again[1, 5][0], again[1, 6][0])


# --- mistakes ---------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])  # what PIL says of it has no name


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("spoil", [cut, lambda path: path.write_text("<html>")], ids=["cut", "not an image"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_cannot_be_read(data, tmp_path, part, spoil, workers):
    shutil.copytree(data, tmp_path / "data")
    image = tmp_path / "data" / part / "n00000001" / "2.JPEG"
    spoil(image)
    more = ("--model", "alexnet", "--workers", workers, "--iterations", "3")
    with pytest.raises(SystemExit, match=f"^imagenet.py: error: {image}: expected an image, got .*Error: .*$"):
        run(tmp_path / "data", tmp_path / "out", *more)


def test_a_class_with_other_files_alone(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for image in (tmp_path / "data" / "val" / "n00000001").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(
        SystemExit, match="^imagenet.py: error: .*data/val: .*no valid file for the classes n00000001.*$"
    ):
        run(tmp_path / "data", tmp_path / "out", "--model", "alexnet")


def test_weights_that_are_not_what_they_should_be(tmp_path, monkeypatch):
    """As an interrupted copy leaves them; and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"]
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    module = load()
    torch.save({"a": torch.zeros(1000)}, file)
    cut(file)
    with pytest.raises(
        module.Mistake, match=f"^resnet18: expected torchvision's weights, {weights.url}, got .*Error: "
    ):
        module.network("resnet18", "IMAGENET1K_V1", 1000)
    file.unlink()

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(module.Mistake, match=f"^resnet18: expected .* {weights.url}, got URLError: .*no network"):
        module.network("resnet18", "IMAGENET1K_V1", 1000)
