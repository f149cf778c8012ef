"""The repository keeps its own rules: ruff is clean, imports go one way and are cheap, public names are documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import inq_kernels as inq

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "inq_kernels"

# DESIGN.md section 5: a module imports only what stands to its left.
LAYERS = [
    *("table", "format", "reference", "slices", "fragments", "layouts", "library", "cpu", "cuda", "triton_ops"),
    *(
        "backends",
        "ops",
        "nn",
        "calibrate",
        "distributed",
        "optim",
        "hooks",
        "inq",
        "projection",
        "dns",
        "files",
        "compression",
        "file_format",
        "checkpoint",
        "transcode",
        "training",
        "sharded_files",
        "sharded",
        "baselines",
        "integrations",
        "demo",
        "bench",
        "cli",
    ),
]
# Sub-packages that have a folder of their own at the root (pyproject.toml maps them).
MAPPED = {"bench": ROOT / "bench", "triton_ops": ROOT / "triton_ops"}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_clean(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def imported(path, level):
    """The modules of this package that a file imports, which is ``level`` folders deep."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_every_module_has_its_layer():
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert (modules - {"__init__"}) | set(MAPPED) == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_go_one_way(module):
    # The version is no module, and stands for the package whose name the files carry.
    allowed = {*LAYERS[: LAYERS.index(module)], "__version__"}
    file = PACKAGE / f"{module}.py"
    paths = [file] if file.exists() else list(MAPPED.get(module, PACKAGE / module).glob("*.py"))
    assert paths
    for path in paths:
        names = imported(path, level=1 if path.parent == PACKAGE else 2)
        assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_format_and_table_need_the_standard_library_only():
    for name in ("format", "table"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_a_cold_import_needs_only_torch_and_safetensors_and_asks_for_no_gpu():
    """With Triton and every extra blocked."""
    script = """
import sys
for name in ("triton", "numpy", "rich", "matplotlib", "sklearn", "transformers", "peft", "vllm"):
    sys.modules[name] = None
import warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch
torch.cuda.init = torch.cuda._lazy_init = None
import inq_kernels, inq_kernels.cli
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", inq.__all__)
def test_public_names_are_documented(name):
    value = getattr(inq, name)
    if not callable(value):
        return
    assert inspect.getdoc(value), name
    if inspect.isclass(value):
        members = [m for k, m in vars(value).items() if not k.startswith("_") and inspect.isfunction(m)]
        undocumented = [m.__name__ for m in members if not inspect.getdoc(m)]
        # Overrides of torch's own methods are documented there.
        assert set(undocumented) <= {"forward", "extra_repr"}


def test_only_pinned_versions_reach_make_and_ci():
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
