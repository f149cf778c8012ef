"""Small models in files for the tests of exports and imports: like a Llama of transformers, in two shards."""

import json

import torch
from safetensors.torch import save_file
from support import generator

from inq_kernels import transcode

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
H = 64
LINEAR = [
    "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
]  # fmt: skip


def write_llama(path, dtype=torch.bfloat16, tied=True, columns=2 * H, conv=False):
    """A directory as ``save_pretrained`` leaves it; one row of a weight is zero."""
    g = generator()

    def random(*shape):
        return (torch.randn(shape, generator=g) / 8).to(dtype)

    first, second = {"model.embed_tokens.weight": random(50, H)}, {}
    for layer, shard in enumerate((first, second)):
        prefix = f"model.layers.{layer}"
        shard[f"{prefix}.input_layernorm.weight"] = random(H)
        shard[f"{prefix}.self_attn.q_proj.weight"] = random(H, H)
        shard[f"{prefix}.self_attn.q_proj.bias"] = random(H)
        shard[f"{prefix}.mlp.down_proj.weight"] = random(H, columns)
        shard[f"{prefix}.mlp.down_proj.weight"][3] = 0
    if not tied:
        second["lm_head.weight"] = random(50, H)
    if conv:
        second["vision.patch.weight"] = random(8, 3, 4, 4)
    path.mkdir()
    weight_map = {}
    for name, tensors in zip(SHARDS, (first, second), strict=True):
        save_file(tensors, path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"model_type": "llama", "tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(settings))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


def write_packed(tmp_path, fmt, dtype=torch.bfloat16, skip=("lm_head",), **model):
    """The same, packed by ``inq quantize``, and its entries as ``inq.load`` returns them."""
    write_llama(tmp_path / "float", dtype, **model)
    skip = [name for name in skip if name != "lm_head" or not model.get("tied", True)]
    transcode.quantize(tmp_path / "float", tmp_path / "packed", fmt, skip=skip)
    return tmp_path / "packed"


def settings(directory):
    return json.loads((directory / "config.json").read_text())


def change_settings(directory, change):
    content = settings(directory)
    change(content)
    (directory / "config.json").write_text(json.dumps(content))
