"""Every snippet of docs/serve.md runs, in order, in one session."""

import re
from pathlib import Path

import tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serve.md"


def test_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("model")
    scope = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    assert (tmp_path / "model-inq4" / "model.safetensors").exists()
    assert scope["report"].modules
