"""The example of plain torch, and docs/distributed.md: one process, and FSDP2 of which a rank is killed and that
torchrun starts again, end in one hash. (DDP, Accelerate and transformers' Trainer: tests/integrations.)"""

import re
import shlex
from pathlib import Path

import pytest
from launch import python, torchrun

import inq_kernels as inq

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "train.py"
PAGE = ROOT / "docs" / "distributed.md"
ARGUMENTS = ["--steps", "4", "--bits", "5", "--partition", "random"]


def run(program, *words, **environment):
    code, text = program(*words, **environment)
    assert code == 0, text
    return text


def found(output):
    return re.search(r"^hash ([0-9a-f]{64})$", output, re.MULTILINE)[1]


def test_one_hash_and_kill_9(tmp_path):
    alone = found(run(python, EXAMPLE, *ARGUMENTS, "--out", str(tmp_path / "packed.safetensors")))
    assert inq.load(tmp_path / "packed.safetensors")
    # Steps 1 to 4 in float, 5 to 20 in four portions; saved after 3, 6, …; killed in step 14.
    kill = (str(ROOT / "tests" / "kill_rank.py"), "14", str(tmp_path / "killed"), str(EXAMPLE))
    checkpoints = ("--checkpoint", str(tmp_path / "run"), "--save-every", "3")
    # The workers' second life needs a store of its own: docs/distributed.md.
    restart = ("--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    words = (*restart, *kill, *ARGUMENTS, "--wrap", "fsdp2", *checkpoints)
    assert found(run(torchrun, *words, **store)) == alone
    assert (tmp_path / "killed").read_text() == "1", "no rank was killed"


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("line", [line for block in snippets("sh") for line in block.splitlines()])
def test_commands_of_the_page(line):
    """They name files that are there, with arguments that those have."""
    words = shlex.split(line, comments=True)
    if words[0] == "export":
        return
    assert words[0] in ("python", "torchrun")
    script = next(word for word in words if word.endswith(".py"))
    known = (ROOT / script).read_text()
    for word in words[words.index(script) + 1 :]:
        assert not word.startswith("--") or f'"{word}"' in known, word
