"""The examples with Hugging Face's Accelerate and transformers' Trainer, as they are, in processes of their own."""

import re
import shlex
from pathlib import Path

import pytest
import snippets
from launch import python, torchrun

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = str(EXAMPLES / "train_trainer.py")
ARGUMENTS = ("--steps", "4", "--bits", "5")


def hash_of(run, *words, **settings):
    code, text = run(*words, **settings)
    assert code == 0, text
    return re.search(r"^hash ([0-9a-f]{64})$", text, re.MULTILINE)[1]


def test_the_commands_of_the_page(tmp_path):
    """docs/distributed.md's, with fewer steps: one hash for one process, DDP, FSDP2, Accelerate in one process and two,
    and FSDP2 with checkpoints. That all weights are on the grid, the examples check. The Trainer's are below."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    environment, hashes, trainer = {}, [], 0
    page = snippets.read(snippets.ROOT / "docs" / "distributed.md")
    for line in "".join(each.body for each in page if each.language == "sh").splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "export":
            name, _, environment[name] = words[0].partition("=")
            continue
        run = {"python": python, "torchrun": torchrun}[program]
        if words[0] == "examples/train_trainer.py":
            trainer += 1
        else:
            hashes.append(hash_of(run, *words, *ARGUMENTS, folder=tmp_path, **environment))
    assert (len(hashes), trainer) == (6, 2)
    assert set(hashes) == {hashes[0]}


def test_trainer_and_its_resume(tmp_path):
    """A whole schedule, one that goes on from a checkpoint in its middle to the same end, and one on two ranks."""
    arguments = (*ARGUMENTS, "--save-every", "6", "--dir", "trainer")
    first = hash_of(python, SCRIPT, *arguments, folder=tmp_path)
    saved = sorted(p.name for p in (tmp_path / "trainer").iterdir())
    assert {"checkpoint-6", "checkpoint-12", "checkpoint-18"} <= set(saved)
    files = {p.suffix for p in (tmp_path / "trainer" / "checkpoint-12").iterdir()}
    assert ".pt" not in files
    assert ".pth" not in files
    again = (*arguments, "--resume", "trainer/checkpoint-12")
    assert hash_of(python, SCRIPT, *again, folder=tmp_path) == first
    (tmp_path / "two").mkdir()
    hash_of(torchrun, SCRIPT, *arguments, folder=tmp_path / "two")
