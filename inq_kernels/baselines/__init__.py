"""What the paper compares INQ with, each from its formula, and one meter of bytes for all: docs/comparisons.md.

- ``ternary.TWN`` and ``binary.BWN``: ternary and binary weights, trained by the straight-through estimator;
- ``uniform.Uniform``: uniform symmetric integers, the same way or by rounding alone;
- ``deep_compression``: magnitude pruning, trained codebooks, relative indices (``relative``) and Huffman (``huffman``);
- ``meter``: the size of a model by any of these or by INQ, part by part.

Dynamic network surgery, the paper's other partner, is ``inq.DNS``.
"""
