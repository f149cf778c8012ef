"""One of two processes: see test_tensor_parallel.py."""

import sys

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import inq_kernels as inq
from inq_kernels.integrations.transformers import InqConfig, save_pretrained

torch.set_num_threads(1)
what, source, *targets = sys.argv[1:]
split = DistributedConfig(tp_size=2)
try:
    if what == "pack":
        AutoModelForCausalLM.from_pretrained(source, distributed_config=split, quantization_config=InqConfig(4))
    model = AutoModelForCausalLM.from_pretrained(source, distributed_config=split)
    if what == "save":
        # One names the directory, the other waits for nobody.
        kind = inq.PeerError if dist.get_rank() else inq.CheckpointError
        with pytest.raises(kind, match="expected"):
            save_pretrained(model, targets[0])
        sys.exit()
    layer = model.model.layers[0].mlp
    # Each process has a half: of the rows, of the columns.
    assert layer.up_proj.packed.shape == (80, 64), layer.up_proj.packed.shape
    assert layer.down_proj.packed.shape == (64, 80), layer.down_proj.packed.shape
    assert all(isinstance(m, inq.Linear) for m in (layer.up_proj, layer.down_proj, model.lm_head))
    logits = tiny.logits(model)
    trained = model(tiny.IDS).logits.detach()
    tokens = model.generate(tiny.IDS, max_new_tokens=4, do_sample=False)
    save_pretrained(model, targets[0])
    with pytest.raises(ValueError, match="split over several"):
        model.dequantize()
    if dist.get_rank() == 0:
        save_file({"logits": logits, "trained": trained, "tokens": tokens}, targets[1])
finally:
    if dist.is_initialized():
        dist.destroy_process_group()
