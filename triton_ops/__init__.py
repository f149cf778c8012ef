"""Triton kernels, one file for each family of operators; ``codec.py`` has what decodes weights.

Reached from ``inq_kernels.backends`` alone, which imports it when the backend is first needed: nothing here is imported
by ``import inq_kernels``, and nothing here imports Triton before it is. Each public function has the name and the
arguments of an operator in ``inq_kernels.library.SCHEMAS``; tensors are on a CUDA device, or anywhere under Triton's
interpreter (``TRITON_INTERPRET=1`` in the environment before the first import), which runs kernels on the CPU.
"""
