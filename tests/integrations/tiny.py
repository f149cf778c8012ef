"""A small Llama for the tests, and what they compare."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import inq_kernels as inq

logging.disable_progress_bar()
IDS = torch.arange(24).view(2, 12) % 96


def config(**changes):
    settings = dict(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes)).eval()


def packed(model):
    """name → module, of the packed ones."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (inq.Linear, inq.Conv2d))}


def same_state(a, b):
    """Whether two models have the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different, different
    return True


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits
