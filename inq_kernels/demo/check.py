"""A new process loads what ``inq demo`` saved and compares: ``python -m inq_kernels.demo.check OUT``.

For every packed network, on all test images:

- its logits equal those before saving, bit for bit;
- its decoded weights are the values that INQ left in the float network;
- for each layer, on the same input, and for the logits at the end, the numeric contract: the error against float64 is
  at most twice that of the fake-quantized float32 network, plus one rounding.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checkpoint, ops
from .train import PACKED, digits_net, logits

# Half a unit in the last place of float32, relative.
_ROUNDING = 2.0**-24


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal float32 tensors, bit for bit: 0 and −0 differ."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def contract_error(where: str, got: Tensor, dense: Tensor, exact: Tensor) -> str | None:
    """What is wrong if ``got`` is further from ``exact`` (float64) than the contract allows, else None."""
    error = float((got.double() - exact).abs().max())
    limit = 2 * float((dense.double() - exact).abs().max()) + _ROUNDING * float(exact.abs().max())
    # Not ``error > limit``: that would let NaN pass.
    return None if error <= limit else f"{where}: error against float64: expected at most {limit:.3g}, got {error:.3g}"


def check_model(model_file: Path, expected_file: Path, images: Tensor) -> list[str]:
    """All that is wrong with one saved network; an empty list if it is what was saved."""
    expected = load_file(expected_file)
    fake = digits_net()
    packed = checkpoint.load(model_file, copy.deepcopy(fake))
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PACKED)}
    names = {name.removeprefix("fake.") for name in expected if name.startswith("fake.")}
    if layers.keys() != names:
        return [f"layers: expected packed modules {sorted(names)}, got {sorted(layers)}"]

    wrong = []
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in layers.items():
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    output = logits(packed, images)
    if not same_bits(output, expected["logits"]):
        different = int((output != expected["logits"]).sum()) if output.shape == expected["logits"].shape else "all"
        wrong.append(f"logits: expected those before saving, bit for bit, got {different} others of {output.numel()}")

    # The fake-quantized float32 network: the weights that INQ left, and all else as in the file.
    state = {name: value for name, value in packed.state_dict().items() if name in fake.state_dict()}
    state |= {f"{name}.weight": expected[f"fake.{name}"] for name in layers}
    fake.load_state_dict(state)
    exact = copy.deepcopy(fake).double().eval()
    for name, module in layers.items():
        # + 0.0: a zero code is +0, INQ may have left −0.
        if not same_bits(ops.unpack(module.packed), expected[f"fake.{name}"] + 0.0):
            wrong.append(f"{name}: expected the weights that INQ left, bit for bit, got others")
        x, y = seen[name]
        dense = fake.get_submodule(name)
        if message := _product_error(name, dense, exact.get_submodule(name), x, y):
            wrong.append(message)
    error = contract_error("logits", output, expected["float_logits"], logits(exact, images.double()))
    return wrong if error is None else [*wrong, error]


@torch.no_grad()
def _product_error(name: str, dense: nn.Module, exact: nn.Module, x: Tensor, y: Tensor) -> str | None:
    return contract_error(name, y, dense(x), exact(x.double()))


def main(out: Path) -> int:
    """Check every network under ``out``; a JSON summary on stdout, what is wrong on stderr.

    Returns:
        0, or 1 if anything is wrong, files that are missing or damaged included.
    """
    # One thread, as the training processes: the product's bits must not depend on it, but the dense one's may.
    torch.set_num_threads(1)
    wrong = []
    expected = sorted((out / "expected").glob("*-seed*.safetensors"))
    try:
        images = load_file(out / "expected" / "images.safetensors")["test_images"]
        for file in expected:
            wrong += [f"{file.name}: {message}" for message in check_model(out / "models" / file.name, file, images)]
    except Exception as error:  # whatever it is, the check has not passed
        wrong.append(f"{type(error).__name__}: {error}")
    if not expected:
        wrong.append(f"{out / 'expected'}: expected saved networks, got none")
    for message in wrong:
        print(f"inq demo: {message}", file=sys.stderr)
    print(json.dumps({"networks": len(expected), "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
