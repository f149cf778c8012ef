"""Runs a script whose rank 1 is killed with SIGKILL at a step of its first life, under torchrun:
``torchrun … tests/kill_rank.py STEP NOTE SCRIPT ARGUMENTS…``. NOTE is a file that is written just before."""

import os
import runpy
import signal
import sys
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook


def main(step: int, note: str, script: str, arguments: list[str]) -> None:
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == step:
            Path(note).write_text(os.environ["RANK"])
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        register_optimizer_step_post_hook(count)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
