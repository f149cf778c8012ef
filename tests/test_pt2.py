"""A packed model as a .pt2: leaf operators alone, any batch, run by a process with the compiled library alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import compiles, same_bits
from test_cli import fails, succeeds
from torch import nn

import inq_kernels as inq
from inq_kernels import backends
from inq_kernels.integrations import pt2

SERVER = Path(__file__).with_name("pt2_server.py")
pytestmark = [
    compiles,
    # torch.export asks pytrees in a way that torch.utils deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.skipif(backends.availability()["cpu"] is not None, reason="a .pt2 needs the compiled CPU library"),
]

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(),
        nn.Linear(72, 33), nn.ReLU(), nn.Linear(33, 10, bias=False),
    )
"""
X = (3, 8, 8)


def build():
    scope = {}
    exec(NET, scope)
    return scope["build"]()


@pytest.fixture
def model():
    model = build().eval()
    formats = {"0": inq.Format(5), "2": inq.Format(3, "dense"), "4": inq.Format(4, granularity="channel")}
    inq.convert(model, {**formats, "6": inq.Format(2)})
    return model


LEAVES = {"inq_cpu::conv2d": 2, "inq_cpu::linear": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_graph_has_leaf_operators_alone_and_any_batch(model, dtype):
    model = model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = pt2.export_program(model, [torch.randn(2, *X, dtype=dtype)])
    assert pt2.leaf_operators(program) == LEAVES
    assert {name.split("::")[0] for name in pt2._operators(program)} == {"aten", "inq_cpu"}
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    for batch in (1, 2, 7):
        x = torch.randn(batch, *X, dtype=dtype)
        with torch.no_grad():
            assert same_bits(program.module()(x), model(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(5, 16), nn.Linear(16, 4)

    def forward(self, index, x, flag):
        return self.fc(self.table(index) + x) if flag else x


def test_several_inputs_share_the_batch():
    model = TwoInputs().eval()
    with pytest.warns(UserWarning, match="only 46% of the parameter bytes"):
        inq.convert(model, inq.Format(4), only="fc")
    index, x = torch.tensor([1, 2, 3]), torch.randn(3, 16)
    program = pt2.export_program(model, (index, x, True))
    assert pt2.leaf_operators(program) == {"inq_cpu::linear": 1}
    again = torch.tensor([4, 0]), torch.randn(2, 16), True
    with torch.no_grad():
        assert same_bits(program.module()(*again), model(*again))


def test_row_scales_and_dynamic_shapes_of_one_s_own():
    fc = inq.Linear.from_float(nn.Linear(16, 6), inq.Format(4))
    model = nn.Sequential(inq.fold_batchnorm(fc, nn.BatchNorm1d(6).eval())).eval()
    shapes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("columns")},)
    program = pt2.export_program(model, [torch.randn(2, 3, 16)], dynamic_shapes=shapes)
    x = torch.randn(4, 5, 16)
    with torch.no_grad():
        assert same_bits(program.module()(x), model(x))


def test_a_process_with_the_compiled_library_alone_runs_it(tmp_path, model, monkeypatch, capsys):
    """By the command; one compilation. Products are the same kernels, so what they give is the same, bit for bit."""
    monkeypatch.chdir(tmp_path)
    inq.save(model, tmp_path / "model.safetensors")
    (tmp_path / "some_net.py").write_text(NET)
    out = succeeds(
        capsys,
        "export",
        "--to",
        "pt2",
        "model.safetensors",
        "net.pt2",
        "--model",
        "some_net:build",
        "--input",
        "2x3x8x8",
    )
    assert "net.pt2: compiled for any batch; inq_cpu::conv2d 2 times, inq_cpu::linear 2 times" in out
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "net.pt2", "some_net.py"]
    inputs = {str(batch): torch.randn(batch, *X) for batch in (1, 2, 7)}
    save_file(inputs, tmp_path / "x.safetensors")
    files = [pt2.library_path(), tmp_path / "net.pt2", tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    result = subprocess.run(
        [sys.executable, "-I", SERVER, *files], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    outputs = load_file(tmp_path / "y.safetensors")
    for batch, x in inputs.items():
        with torch.no_grad():
            assert same_bits(outputs[batch], model(x))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_models_and_inputs_that_cannot_be_exported(model):
    x = torch.randn(2, *X)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        pt2.export_program("model", [x])
    with pytest.raises(ValueError, match="model: expected packed modules, got none"):
        pt2.export_program(build().eval(), [x])
    with pytest.raises(ValueError, match=r"args: \[0\]: expected a batch of two or more"):
        pt2.export_program(model, [x[:1]])
    with pytest.raises(ValueError, match="args: expected one batch for all tensors, got \\[2, 3\\]"):
        pt2.export_program(model, [x, torch.randn(3, 1)])
    with pytest.raises(ValueError, match="args: expected at least one tensor"):
        pt2.export_program(model, [1])
    with pytest.raises(ValueError, match="x: expected float32 or bfloat16 in a .pt2 for the CPU, got torch.float64"):
        pt2.export_program(model.double(), [x.double()])
    model = model.float()
    model[4].backend = "reference"
    with pytest.raises(ValueError, match="model: '4': expected backend 'cpu' or None, got 'reference'"):
        pt2.export_program(model, [x])
    model[4].backend = "cpu"
    model[1].train()
    with pytest.raises(ValueError, match=r"expected evaluation mode, got '1' in training: .eval\(\)"):
        pt2.export_program(model, [x])


def test_operators_that_a_server_lacks_are_refused():
    with torch.library._scoped_library("pt2_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = inq.Linear.from_float(nn.Linear(16, 6), inq.Format(4))

            def forward(self, x):
                return torch.ops.pt2_test.twice(self.fc(x))

        model = Odd().eval()
        with pytest.raises(RuntimeError, match="alone, got pt2_test::twice, which a server without Python"):
            pt2.export_program(model, [torch.randn(2, 16)])
        program = pt2.export_program(model, [torch.randn(2, 16)], namespaces=["pt2_test"])
        assert pt2.leaf_operators(program) == {"inq_cpu::linear": 1}


def test_nothing_is_written_after_an_error(tmp_path, model, monkeypatch):
    x = torch.randn(2, *X)
    with pytest.raises(ValueError, match="expected a name ending in .pt2, got '.pt'"):
        pt2.save_pt2(model, [x], tmp_path / "net.pt")
    monkeypatch.setattr(pt2.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"AOTInductor needs a C\+\+ compiler, got none"):
        pt2.save_pt2(model, [x], tmp_path / "net.pt2")
    monkeypatch.undo()
    (tmp_path / "net.pt2").write_text("old")

    def compile_and_fail(program, package_path):
        Path(package_path).write_text("half")
        raise OSError(28, "No space left on device", package_path)

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_and_fail)
    with pytest.raises(OSError, match="No space left"):
        pt2.save_pt2(model, [x], tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "old"


def test_the_command_s_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inq.save(inq.nn.nn.Sequential(inq.Linear(4, 2, fmt=inq.Format(4))), "m.safetensors")
    command = ["export", "--to", "pt2", "m.safetensors", "m.pt2"]
    for more, message in (
        ([], "expected --model MODULE:FUNCTION and --input"),
        (["--model", "a", "--input", "2x4"], "--model: expected MODULE:FUNCTION, got 'a'"),
        (
            ["--model", "no_such_module:f", "--input", "2x4"],
            "--model: expected a module 'no_such_module' here or install",
        ),
        (["--model", "json:f", "--input", "2x4"], "--model: expected a function 'f' in 'json', got NoneType"),
        (["--model", "json:loads", "--input", "2x-4"], "--input: expected [DTYPE:]BATCHxSIZE"),
        (["--model", "json:loads", "--input", "half:2x4"], "--input: expected [DTYPE:]BATCHxSIZE"),
    ):
        assert message in fails(capsys, *command, *more)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_example_inputs():
    assert pt2.example_input("2x3").shape == (2, 3)
    assert pt2.example_input("bfloat16:4").dtype == torch.bfloat16
    assert pt2.example_input("int64:2x5").tolist() == [[0] * 5] * 2
