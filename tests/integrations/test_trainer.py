"""The examples with Hugging Face's Accelerate and transformers' Trainer, as they are, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TWO = (
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
)
ARGUMENTS = ("--steps", "4", "--bits", "5")


def run(*words, script, arguments=ARGUMENTS, folder=None):
    command = (sys.executable, *words, str(EXAMPLES / script), *arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return re.search(r"^hash ([0-9a-f]{64})$", result.stdout, re.MULTILINE)[1]


def test_accelerate_and_ddp_end_in_the_hash_of_the_plain_loop():
    """In one process and on two ranks. That all weights are on the grid, the examples check."""
    expected = run(script="train.py")
    assert run(*TWO, script="train.py", arguments=(*ARGUMENTS, "--wrap", "ddp")) == expected
    assert run(script="train_accelerate.py") == expected
    assert run(*TWO, script="train_accelerate.py") == expected


def test_trainer_and_its_resume(tmp_path):
    """A whole schedule, one that goes on from a checkpoint in its middle to the same end, and one on two ranks."""
    arguments = (*ARGUMENTS, "--save-every", "6", "--dir", "trainer")
    first = run(script="train_trainer.py", arguments=arguments, folder=tmp_path)
    saved = sorted(p.name for p in (tmp_path / "trainer").iterdir())
    assert {"checkpoint-6", "checkpoint-12", "checkpoint-18"} <= set(saved)
    files = {p.suffix for p in (tmp_path / "trainer" / "checkpoint-12").iterdir()}
    assert ".pt" not in files
    assert ".pth" not in files
    again = (*arguments, "--resume", "trainer/checkpoint-12")
    assert run(script="train_trainer.py", arguments=again, folder=tmp_path) == first
    (tmp_path / "two").mkdir()
    run(*TWO, script="train_trainer.py", arguments=arguments, folder=tmp_path / "two")
