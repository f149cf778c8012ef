"""What stock.py runs in the environment without this package: make DIR:DTYPE:TIED… | load EXPORT DENSE …"""

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

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
    """Unpacked at loading, which every dtype can; and as transformers does unasked, MXFP4 in bfloat16."""
    expected = tensors(dense)
    reference = AutoModelForCausalLM.from_pretrained(dense)
    mxfp4 = (Path(export) / "config.json").read_text().count("mxfp4-pack-quantized") > 0
    ways = {"dequantize=True": {"quantization_config": CompressedTensorsConfig(dequantize=True)}}
    if reference.dtype == torch.bfloat16 or not mxfp4:
        ways["as it is"] = {}
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        wanted = reference(tokens).logits
    for way, options in ways.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            model = AutoModelForCausalLM.from_pretrained(export, **options)
        with torch.no_grad():
            logits = model(tokens).logits
        compared = 0
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and f"{name}.weight" in expected:
                # Only now: as it is, the first call unpacks.
                if not same_bits(weight_of(module), expected[f"{name}.weight"]):
                    sys.exit(f"{export}: {way}: {name}.weight: other bits ({module.weight.dtype})")
                compared += 1
        if compared < 14:
            sys.exit(f"{export}: {way}: only {compared} weights compared")
        if not same_bits(logits, wanted):
            sys.exit(f"{export}: {way}: other logits, by {float((logits - wanted).abs().max())}")
        print(f"{Path(export).parent.name} {Path(export).name} {way}: {compared} weights and the logits bit-equal")


def weight_of(module: torch.nn.Linear) -> torch.Tensor:
    weight = module.weight.detach()
    return weight if weight.dtype.itemsize > 1 else weight.to(module.weight_scale.dtype) * module.weight_scale


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "make":
        for model in rest:
            make(*model.split(":"))
    else:
        for pair in zip(rest[::2], rest[1::2], strict=True):
            load(*pair)
