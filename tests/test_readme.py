"""Every snippet of the README runs, and its table is that of a committed run of the demo."""

import json
import re
from pathlib import Path

import pytest
import readme_speed
import snippets
import torch
from readme_table import BLOCK, RESULTS, ROOT, text
from safetensors.torch import save_file
from torch import nn

import inq_kernels as inq

README = (ROOT / "README.md").read_text()


def blocks(language):
    return [
        snippet for snippet in snippets.read(ROOT / "README.md") if snippet.language == language and not snippet.needs
    ]


def build_model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)


def train(model, optimizer, scheduler):
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def names():
    """What the README's reader has: a model, a training loop, some data."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return {
        "torch": torch,
        "inq": inq,
        "model": model,
        "build_model": build_model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "train": train,
        "images": torch.zeros(2, 1, 8, 8),
        "net": Net().eval(),
        "fmt": inq.Format(4),
        "w": torch.randn(8, 12),
        "x": torch.randn(3, 12),
        "bias": torch.zeros(8),
    }


def test_python_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) >= 5
    for block in found:
        scope = names()
        snippets.run_python(block, scope)
        if "logits" in scope:
            assert isinstance(scope["model"][0], inq.Conv2d)
            assert scope["logits"].shape == (2, 10)
    assert (tmp_path / "model.safetensors").exists()
    assert "SQNR" in capsys.readouterr().out


def test_the_speed_tables_are_those_of_committed_runs():
    paths = [ROOT / found[1] for found in readme_speed.BLOCK.finditer(README)]
    assert paths
    assert readme_speed.written(README) == README
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture
    for path in paths:
        assert {p.suffix for p in path.parent.iterdir()} >= {".json", ".png", ".svg"}


def write_model(folder: Path) -> None:
    """A directory as transformers' ``save_pretrained`` leaves it."""
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(32, 16),
        "model.layers.0.mlp.up_proj.weight": torch.randn(24, 16),
        "model.norm.weight": torch.ones(16),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 16}))


def test_shell_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model_dir")
    ran = [words[1] for snippet in blocks("sh") for words in snippets.run_sh(snippet)]
    assert {"quantize", "save", "inspect", "verify", "export", "import", "doctor"} <= set(ran)


def test_the_table_is_that_of_the_committed_results():
    assert BLOCK.search(README)[0] == text(json.loads(RESULTS.read_text()))


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_the_table_of_formats(bits):
    paper, dense = inq.Format(bits), inq.Format(bits, "dense")
    row = next(line for line in README.splitlines() if line.startswith(f"| {bits} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [int(re.search(r"±(\d+)", cell)[1]) for cell in cells[1:3]] == [paper.magnitudes, dense.magnitudes]
    megabytes = (4096 * paper.row_bytes(4096) + 4096) / 1e6
    assert cells[3] == f"{megabytes:.1f} MB"
