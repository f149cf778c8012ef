"""What stock.py runs in the environment without this package: make DIR:DTYPE:TIED… | load EXPORT DENSE …"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

if importlib.util.find_spec("inq_kernels") is not None:
    sys.exit("inq_kernels is here: not a stock environment")
torch.set_num_threads(1)


def make(folder: str, dtype: str, tied: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=bool(int(tied)), dtype=dtype,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder, max_shard_size="60KB")


def tensors(folder: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def load(export: str, dense: str) -> None:
    expected = tensors(dense)
    model = AutoModelForCausalLM.from_pretrained(export)
    reference = AutoModelForCausalLM.from_pretrained(dense)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits, wanted = model(tokens).logits, reference(tokens).logits
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in expected:
            if not same_bits(module.weight.detach(), expected[f"{name}.weight"]):
                sys.exit(f"{export}: {name}.weight: other bits ({module.weight.dtype})")
            compared += 1
    if compared < 14:
        sys.exit(f"{export}: only {compared} weights compared")
    if not same_bits(logits, wanted):
        sys.exit(f"{export}: other logits, by {float((logits - wanted).abs().max())}")
    print(f"{export}: {compared} weights and the logits bit-equal")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "make":
        for model in rest:
            make(*model.split(":"))
    else:
        for pair in zip(rest[::2], rest[1::2], strict=True):
            load(*pair)
