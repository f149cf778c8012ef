"""One process of vLLM's loader: see test_vllm.py. Writes what it has of the layers named, and a product of each."""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import get_model
from vllm.plugins import load_general_plugins

from inq_kernels import backends
from inq_kernels.integrations.vllm import register
from inq_kernels.layouts import STORAGE, layout_of
from inq_kernels.ops import PackedWeight, prepack

torch.set_num_threads(1)
source, out, *names = sys.argv[1:]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
load_general_plugins()
register()  # again, as vLLM may
arguments = EngineArgs(
    model=source, tensor_parallel_size=world, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
    max_model_len=64,
)  # fmt: skip
config = arguments.create_engine_config()
# torch 2.13 raises here without an accelerator; vLLM's own CPU builds come with a later one.
torch.accelerator.empty_cache = lambda: None
try:
    with set_current_vllm_config(config):
        init_distributed_environment(world, rank, "env://", rank, "gloo")
        initialize_model_parallel(world)
        model = get_model(vllm_config=config)
        result = {}
        if config.model_config.hf_config.tie_word_embeddings:
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert isinstance(model.lm_head.quant_method, UnquantizedEmbeddingMethod)
            assert not hasattr(model.lm_head, "weight_exp")
        for name in names:
            layer = model.get_submodule(name)
            method = layer.quant_method
            # Laid out for the kernels, once, after loading.
            preferred = backends.preferred_layout("cpu", torch.float32, method.format)
            assert layout_of(layer.weight) == preferred != STORAGE, (name, layout_of(layer.weight))
            packed = PackedWeight(
                layer.weight,
                layer.weight_exp,
                layer.weight_scale,
                method.format,
                layer.inq_shape,
                layout_of(layer.weight),
            )
            stored = prepack(packed, STORAGE)
            for part in ("weight", "weight_exp", "weight_scale"):
                if getattr(stored, part) is not None:
                    result[f"{name}.{part}"] = getattr(stored, part).detach().clone()
            x = torch.randn(3, layer.inq_shape[1], generator=torch.Generator().manual_seed(rank))
            result |= {f"{name}.x": x, f"{name}.y": method.apply(layer, x)}
    save_file({key: value.contiguous() for key, value in result.items()}, f"{out}/{rank}.safetensors")
finally:
    if dist.is_initialized():
        dist.destroy_process_group()
