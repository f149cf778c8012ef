"""No pickle in any load path: nothing in the package can open one, and nothing does while everything is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    p for folder in ("inq_kernels", "bench", "triton_ops", "examples") for p in (ROOT / folder).rglob("*.py")
)

# Modules whose loading functions run what a file says.
MODULES = {
    "pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle",
    "torch.package", "torch.jit.serialization", "torch.hub",
}  # fmt: skip
# The same by their dotted names. DefaultLoadPlanner and FileSystemReader are torch.distributed.checkpoint's, which
# unpickle; the readers and planners of safetensors do not. The *_object* collectives unpickle what other ranks send.
NAMES = {
    "torch.load", "torch.jit.load", "torch.export.load", "torch.hub.load", "torch.package.PackageImporter",
    "torch.serialization", "torch.UntypedStorage.from_file", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load",
    "copyreg.pickle", "dcp.FileSystemReader", "torch.distributed.checkpoint.FileSystemReader",
}  # fmt: skip
ANYWHERE = {
    "DefaultLoadPlanner", "FileSystemReader", "FsspecReader", "DynamicMetaLoadPlanner", "Unpickler", "load_from_uri",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}

# What may be there all the same: (file, what) and why it is no load path.
ALLOWED: dict[tuple[str, str], str] = {}


def dotted(node):
    """``a.b.c`` of an attribute or a name; None for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def findings(text):
    """(line, what) for everything in a source that could open a pickle or run what a file says."""
    tree = ast.parse(text)
    # What names stand for: import torch.distributed.checkpoint as dcp; from torch import load.
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES or alias.name.split(".")[0] in MODULES:
                    yield node.lineno, f"import {alias.name}"
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if (
                    node.module in MODULES | {"torch.serialization"}
                    or full in MODULES | NAMES
                    or alias.name in ANYWHERE
                ):
                    yield node.lineno, f"from {node.module} import {alias.name}"
                aliases[alias.asname or alias.name] = full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name is not None:
                first, _, rest = name.partition(".")
                name = f"{aliases.get(first, first)}.{rest}"
            if name in NAMES or name in MODULES or node.attr in ANYWHERE:
                yield node.lineno, name or node.attr
        elif isinstance(node, ast.Name) and (node.id in ANYWHERE or aliases.get(node.id) in NAMES):
            yield node.lineno, node.id
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in BUILTINS:
                yield node.lineno, called
            if called in ("getattr", "importlib.import_module", "import_module"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and argument.value in MODULES | ANYWHERE:
                        yield node.lineno, f"{called}({argument.value!r})"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg == "weights_only" and value is not True:
                    yield node.lineno, "weights_only"
                if keyword.arg == "allow_pickle" and value is not False:
                    yield node.lineno, "allow_pickle"
                if keyword.arg == "trust_remote_code":
                    yield node.lineno, "trust_remote_code"


def test_no_source_can_open_a_pickle():
    assert len(SOURCES) > 30
    found, allowed = [], set()
    for path in SOURCES:
        file = str(path.relative_to(ROOT))
        for line, what in findings(path.read_text()):
            if (file, what) in ALLOWED:
                allowed.add((file, what))
            else:
                found.append(f"{file}:{line}: {what}")
    assert not found, "\n".join(found)
    assert allowed == set(ALLOWED)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import _pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "from torch.serialization import load",
        "import torch\ntorch.export.load('x')",
        "from torch import export\nexport.load('x')",
        "from torch import jit as j\nj.load('x')",
        "f(x, weights_only=False)",
        "f(x, weights_only=flag)",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(s, storage_reader=dcp.FileSystemReader('x'))",
        "from torch.distributed.checkpoint import FileSystemReader",
        "from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner as P",
        "import torch.distributed as dist\ndist.broadcast_object_list([1])",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('pickle')",
        "eval(text)",
        "import marshal",
        "import shelve",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
    ],
)
def test_the_search_finds(text):
    assert list(findings(text))


@pytest.mark.parametrize(
    "text",
    [
        "from safetensors.torch import load",
        "model.load_state_dict(state)",
        "import json\njson.load(file)",
        "inq.load('x')",
        "f(x, weights_only=True)",
        "torch.compile(model)",
        "re.compile('x')",
    ],
)
def test_the_search_lets_pass(text):
    assert not list(findings(text))


# --- while everything is loaded ---------------------------------------------------------------------------------------


def test_nothing_unpickles_while_everything_is_loaded(tmp_path):
    """In a process of its own: an audit hook stays for good."""
    script = Path(__file__).with_name("no_pickle.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].endswith("load paths, no pickle")
