"""vLLM: the plugin that serves models packed by ``inq quantize`` or ``save_pretrained``.

Installed with this package: vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``),
and ``LLM(model=DIR)`` finds the method in the model's config.json. Packed are its linear layers and an output layer
of its own; fused layers (QKV, gate and up) are one product, since each row has its exponent. Packed experts of a
mixture are refused.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method "inq" known to vLLM. May be called any number of times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "inq" not in QUANTIZATION_METHODS:
        from . import vllm_method  # noqa: F401 - registers
