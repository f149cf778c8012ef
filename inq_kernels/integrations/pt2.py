"""A packed model as one .pt2 file: torch.export with a dynamic batch, then AOTInductor, for servers without Python.

``torch.ops.inq.*`` choose a backend in Python, which a C++ server has not. They are replaced by the operators that the
compiled CPU library defines, ``inq_cpu::*``: the server loads that library (``library_path``) before the .pt2.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import cpu, files
from ..layouts import CPU16, layout_of
from ..nn import _PackedModule, prepack

# What C++ has without this package's library, which is the third.
_NAMESPACES = ("aten", "prims", "inq_cpu")
_LEAVES = "inq_cpu"
_LOWERED = ("linear", "linear_fp8", "conv2d", "unpack", "prepack", "unprepack")


def library_path() -> Path:
    """The compiled CPU library, which registers ``inq_cpu::*`` when it is loaded: torch.ops.load_library(path) in
    Python, dlopen in C++. It needs torch alone.

    Raises:
        RuntimeError: there is none.
    """
    if reason := cpu.unavailable():
        raise RuntimeError(f"a .pt2 needs the compiled CPU library: {reason}")
    return cpu._FOLDER / "_cpu.so"


def export_program(
    model: nn.Module,
    args: Sequence[object],
    *,
    dynamic_shapes: object = None,
    namespaces: Iterable[str] = (),
) -> ExportedProgram:
    """``model`` as a graph of aten operators and leaf operators ``inq_cpu::*``, by torch.export. ``model`` is kept.

    Args:
        model: with packed modules, on the CPU, in evaluation mode. They are laid out for the kernels (``inq.prepack``)
            as at a first call.
        args: example inputs, float32 or bfloat16 where packed modules compute with them. Dimension 0 of each tensor is
            the batch, of two or more, and may be any size later.
        dynamic_shapes: as torch.export.export takes it, instead of that.
        namespaces: of further operators that the graph may hold, which the server has to have, e.g. "torchvision".

    Raises:
        TypeError, ValueError: the model or the inputs are not as above. RuntimeError: the compiled CPU library is not
            there, or some operator of the graph has no implementation in C++.
        What torch.export raises for a model that it cannot trace.
    """
    library_path()
    _check_model(model)
    if dynamic_shapes is None:
        dynamic_shapes = _batches(args)
    prepack(model)
    with torch.no_grad():
        program = torch.export.export(model, tuple(args), dynamic_shapes=dynamic_shapes)
        program = program.run_decompositions(_lowering())
    _check_operators(program, {*_NAMESPACES, *namespaces})
    return program


def save_pt2(
    model: nn.Module,
    args: Sequence[object],
    path: str | os.PathLike,
    *,
    dynamic_shapes: object = None,
    namespaces: Iterable[str] = (),
) -> dict[str, int]:
    """Compile ``model`` by AOTInductor into one .pt2 file, whole or not at all. Needs a C++ compiler; takes a minute.

    The file holds machine code for this machine's instruction set and the packed weights in the kernels' layout: load
    only files that you trust. ``torch._inductor.aoti_load_package`` or torch::inductor::AOTIModelPackageLoader load it,
    after the library at ``library_path()``.

    Args:
        path: a name ending in .pt2; its directory must exist.
        model, args, dynamic_shapes, namespaces: as in ``export_program``.

    Returns:
        How often each leaf operator ``inq_cpu::*`` is called.

    Raises:
        ValueError: ``path`` ends in something else. OSError: it cannot be written. RuntimeError: there is no compiler.
            And what ``export_program`` raises. Then nothing is written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: expected a name ending in .pt2, got {path.suffix!r}")
    compiler = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        raise RuntimeError(f"{path}: AOTInductor needs a C++ compiler, got none ({compiler})")
    program = export_program(model, args, dynamic_shapes=dynamic_shapes, namespaces=namespaces)

    def fill(file: Path) -> None:
        from torch._inductor import aoti_compile_and_package

        aoti_compile_and_package(program, package_path=os.fspath(file))

    files.write_file_by(path, fill)
    return leaf_operators(program)


def leaf_operators(program: ExportedProgram) -> dict[str, int]:
    """How often a graph calls each operator of the compiled CPU library, by name ("inq_cpu::linear")."""
    return dict(Counter(name for name in _operators(program) if name.startswith(f"{_LEAVES}::")))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, _PackedModule)}
    if not packed:
        raise ValueError("model: expected packed modules, got none: call inq.convert or inq.load first")
    if training := [name for name, module in model.named_modules() if module.training]:
        raise ValueError(f"model: expected evaluation mode, got {training[0] or 'the model'!r} in training: .eval()")
    for name, module in packed.items():
        if module.weight.device.type != "cpu":
            raise ValueError(f"model: {name!r}: expected a module on the CPU, got {module.weight.device}")
        if module.backend not in (None, "cpu"):
            raise ValueError(f"model: {name!r}: expected backend 'cpu' or None, got {module.backend!r}")


def _batches(args: Sequence[object]) -> tuple[object, ...]:
    """Dimension 0 of every tensor is one and the same batch."""
    batch = Dim("batch")
    sizes = [(index, arg.shape[0] if arg.dim() else None) for index, arg in enumerate(args) if isinstance(arg, Tensor)]
    if not sizes:
        raise ValueError("args: expected at least one tensor, got none")
    for index, size in sizes:
        if size is None or size < 2:
            raise ValueError(
                f"args: [{index}]: expected a batch of two or more in dimension 0 (torch.export takes one for a "
                f"constant), got shape {list(args[index].shape)}"
            )
    if len({size for _, size in sizes}) > 1:
        raise ValueError(f"args: expected one batch for all tensors, got {[size for _, size in sizes]}")
    return tuple({0: batch} if isinstance(arg, Tensor) else None for arg in args)


def _lowering() -> dict[torch._ops.OpOverload, Callable]:
    """Each operator that chooses a backend, and what the CPU's calls instead."""
    return {getattr(torch.ops.inq, name).default: _lowered(name) for name in _LOWERED}


def _lowered(op: str) -> Callable:
    names = [argument.name for argument in getattr(torch.ops.inq, op).default._schema.arguments]
    product = "x" in names

    def call(*args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if product and given["x"].dtype not in cpu.DTYPES:
            raise ValueError(f"inq.{op}: x: expected float32 or bfloat16 in a .pt2 for the CPU, got {given['x'].dtype}")
        if product and layout_of(given["weight"]) != CPU16:
            raise ValueError(f"inq.{op}: weight: expected layout {CPU16!r}, got {given['layout']!r}")
        return getattr(cpu, op)(*(given.get(name) for name in names))

    return call


def _operators(program: ExportedProgram) -> Iterator[str]:
    """The qualified name of the operator of every call, in all graphs of ``program``."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                    yield node.target.name().split(".")[0]


def _check_operators(program: ExportedProgram, allowed: set[str]) -> None:
    found = Counter(_operators(program))
    if strange := sorted(name for name in found if name.split("::")[0] not in allowed):
        raise RuntimeError(
            f"expected operators of {', '.join(sorted(allowed))} alone, got {', '.join(strange)}, "
            "which a server without Python may not have (namespaces= allows more)"
        )


def load_factory(name: str) -> Callable[[], nn.Module]:
    """The function MODULE:FUNCTION of the user's own code, from the current directory or an installed package.

    Raises:
        ValueError: the name is not of that form, or there is no such module or function.
    """
    module_name, _, function = name.partition(":")
    if not (module_name and function.isidentifier()):
        raise ValueError(f"--model: expected MODULE:FUNCTION, got {name!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--model: expected a module {module_name!r} here or installed, got none: {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found := getattr(module, function, None)):
        raise ValueError(f"--model: expected a function {function!r} in {module_name!r}, got {type(found).__name__}")
    return found


def example_input(text: str) -> Tensor:
    """A tensor for ``[DTYPE:]SIZE×SIZE…`` (x between the sizes): float32 unless named; random, or zeros for integers.

    Raises:
        ValueError: ``text`` is not of that form.
    """
    dtype_name, _, sizes = text.rpartition(":")
    dtype = _INPUT_DTYPES.get(dtype_name or "float32")
    parts = sizes.split("x")
    if dtype is None or not all(part.isdecimal() and 0 < int(part) < 1 << 31 for part in parts):
        raise ValueError(
            f"--input: expected [DTYPE:]BATCHxSIZE… with a dtype of {', '.join(_INPUT_DTYPES)}, got {text!r}"
        )
    shape = [int(part) for part in parts]
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


_INPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32}
