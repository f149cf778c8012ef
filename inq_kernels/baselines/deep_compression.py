"""Deep Compression: Han, Mao, Dally, ICLR 2016 (arXiv 1510.00149); its pruning is Han, Pool, Tran, Dally, NIPS 2015.

1. ``prune_``: the smallest weights of each layer become 0, the others are retrained under that mask;
   ``finish_pruning_``.
2. ``share_``: the nonzero weights of a layer become the centroids of k-means, which begins with centroids at equal
   distances between the least and the greatest (the paper's linear initialisation) and sees the weights alone. Then the
   centroids are trained: the gradient of one is the sum of its weights' (section 3.3); ``finish_sharing_``.
3. ``sizes``: codes and relative indices (``relative``), each at so many bits or Huffman coded (``huffman``).

A codebook has 2^bits entries, of which entry 0 is the value 0, for fillers, as in the released AlexNet
(songhan/Deep-Compression-AlexNet, decode.py): 2^bits − 1 centroids are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .. import hooks
from ..nn import as_patterns, check_patterns, first_match
from . import huffman, relative
from .meter import LayerSize, entropy_bits, fill

# Lloyd's iterations; it mostly stops by itself long before.
_MAX_ITERATIONS = 300


def conv_and_linear(model: nn.Module, conv: float, linear: float) -> dict[str, float]:
    """One number for convolutions and one for Linear modules, by name, as the paper gives them: bits 8 and 5, say."""
    return {name: linear if isinstance(m, nn.Linear) else conv for name, m in hooks.quantizable(model).items()}


# --- pruning ----------------------------------------------------------------------------------------------------------


def prune_(model: nn.Module, keep: float | Mapping[str, float], skip: str | Iterable[str] = ()) -> None:
    """Prune each layer to its largest weights, in place, by torch.nn.utils.prune: an optimizer made before goes on with
    the same parameters, and the pruned weights stay 0 whatever it does.

    Args:
        model: its convolutions and Linear modules are pruned.
        keep: the fraction of weights that stay, in (0, 1], or fractions by name pattern of modules (fnmatch).
        skip: name patterns of modules to leave alone.

    Raises:
        ValueError: an argument is not as above, or a weight is one of several modules' or has NaN or Inf. Nothing is
            changed then.
    """
    weights = _choose_weights("deep_compression.prune_", model, skip)
    fractions = _by_name("deep_compression.prune_: keep", keep, weights)
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ValueError(
                f"deep_compression.prune_: keep: expected fractions in (0, 1], got {fraction} for {name!r}"
            )
    for name, weight in weights.items():
        pruned = weight.numel() - max(1, round(fractions[name] * weight.numel()))
        prune.l1_unstructured(model.get_submodule(name), "weight", pruned)


def finish_pruning_(model: nn.Module) -> None:
    """After retraining: plain weights again, 0 where they were pruned."""
    for module in model.modules():
        # prune.is_pruned is true of a module whose bias alone is pruned, too.
        if isinstance(module, hooks.QUANTIZED_TYPES) and "weight_mask" in module._buffers:
            prune.remove(module, "weight")


# --- trained codebooks ------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """A parametrization (torch.nn.utils.parametrize) of a weight by its centroids: W = [0, centroids][codes].

    ``codes`` has the weight's shape, 0 for a weight that is zero. Autograd's gradient of the indexing is the paper's:
    the sum over the weights of a centroid.
    """

    def __init__(self, codes: Tensor, centroids: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)
        self._first = centroids

    def forward(self, centroids: Tensor) -> Tensor:
        return torch.cat([centroids.new_zeros(1), centroids])[self.codes]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The centroids that ``weight`` begins with."""
        return self._first.to(weight.dtype)


def kmeans(values: Tensor, k: int) -> Tensor:
    """``k`` centroids of ``values`` [n], float64, increasing: Lloyd's algorithm from centroids at equal distances
    between the least and the greatest value. A centroid that no value is nearest to stays where it is."""
    values = values.double()
    low, high = values.min(), values.max()
    centroids = low + (high - low) * torch.arange(k, dtype=torch.float64, device=values.device) / max(k - 1, 1)
    for _ in range(_MAX_ITERATIONS):
        nearest = assign(values, centroids)
        counts = torch.bincount(nearest, minlength=k)
        new = torch.where(counts > 0, torch.bincount(nearest, values, k) / counts.clamp(min=1), centroids)
        if torch.equal(new, centroids):
            break
        centroids = new
    return centroids


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """The index of the centroid nearest to each value; the lower one in a tie. Centroids increase."""
    return torch.bucketize(values.double(), (centroids[1:] + centroids[:-1]) / 2)


def share_(model: nn.Module, bits: int | Mapping[str, int], skip: str | Iterable[str] = ()) -> None:
    """Replace each weight by codes and a codebook, in place. The centroids are parameters then: make a new optimizer.

    Args:
        model: its convolutions and Linear modules; weights that are 0 stay 0.
        bits: 2^bits codebook entries, or bits by name pattern of modules (fnmatch).
        skip: name patterns of modules to leave alone.

    Raises:
        ValueError: an argument is not as above, or a weight is one of several modules' or has NaN or Inf. Nothing is
            changed then.
    """
    weights = _choose_weights("deep_compression.share_", model, skip)
    of_layer = _by_name("deep_compression.share_: bits", bits, weights)
    for name, b in of_layer.items():
        _check_bits("deep_compression.share_: bits", b)
        if not weights[name].any():
            raise ValueError(f"deep_compression.share_: weight of layer {name!r}: expected nonzero weights, got none")
    for name, weight in weights.items():
        weight = weight.detach()
        nonzero = weight != 0
        centroids = kmeans(weight[nonzero], (1 << of_layer[name]) - 1)
        codes = torch.zeros_like(weight, dtype=torch.int64)
        codes[nonzero] = assign(weight[nonzero], centroids) + 1
        codebook = Codebook(codes, centroids)
        parametrize.register_parametrization(model.get_submodule(name), "weight", codebook, unsafe=True)


def finish_sharing_(model: nn.Module) -> None:
    """After training the centroids: plain weights again, with the codebooks' values."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], Codebook):
            parametrize.remove_parametrizations(module, "weight")


# --- sizes ------------------------------------------------------------------------------------------------------------


def sizes(
    model: nn.Module,
    bits: int | Mapping[str, int],
    index_bits: int | Mapping[str, int] = 4,
    *,
    coded: bool = True,
    skip: str | Iterable[str] = (),
) -> list[LayerSize]:
    """The size of each weight as Deep Compression stores it, for ``meter.measure``.

    Args:
        model: finished.
        bits: as ``share_`` had it.
        index_bits: of a gap between nonzero weights, or by name pattern of modules. The paper has 8 for convolutions
            and 5 for Linear modules; its released AlexNet 4.
        coded: codes and gaps Huffman coded (the paper's P+Q+H), or at ``bits`` and ``index_bits`` each (P+Q).
        skip: as ``share_`` had it.
    """
    weights = hooks.choose_weights("deep_compression.sizes", model, as_patterns(skip))
    of_codes = _by_name("deep_compression.sizes: bits", bits, weights)
    of_gaps = _by_name("deep_compression.sizes: index_bits", index_bits, weights)
    return [
        layer_size(name, weight.detach(), of_codes[name], of_gaps[name], coded=coded)
        for name, weight in weights.items()
    ]


def layer_size(name: str, weight: Tensor, bits: int, index_bits: int, *, coded: bool = True) -> LayerSize:
    """``sizes`` of one weight, whose nonzero values are at most 2^bits − 1 different ones."""
    for what, value in (("bits", bits), ("index_bits", index_bits)):
        _check_bits(f"deep_compression.layer_size: {what}", value)
    values, inverse = torch.unique(weight[weight != 0], return_inverse=True)
    if len(values) >= 1 << bits:
        raise ValueError(
            f"deep_compression.layer_size: layer {name!r}: expected at most {(1 << bits) - 1} different nonzero values "
            f"at {bits} bits, got {len(values)}: call share_ first"
        )
    codes = torch.zeros(weight.numel(), dtype=torch.int64, device=weight.device)
    codes[weight.reshape(-1) != 0] = inverse + 1
    return LayerSize(
        *(name, tuple(weight.shape), int((codes != 0).sum()), entropy_bits(codes)),
        **sparse_parts(codes, bits, index_bits, coded=coded),
        # Only what is in use, and zero.
        codebooks=32 * (len(values) + 1),
    )


def sparse_parts(codes: Tensor, bits: int, index_bits: int, *, coded: bool = True) -> dict[str, int]:
    """The parts of ``LayerSize`` that any ``codes`` of ``bits`` bits (0 for a weight that is zero) take as relative
    indices and codes, INQ's too: codes, indices, padding and tables."""
    entries = relative.encode(codes, index_bits)
    streams = {"codes": (entries.codes, bits), "indices": (entries.gaps, index_bits)}
    # How many entries there are.
    parts = {"padding": 0, "tables": 32}
    for what, (symbols, width) in streams.items():
        lengths = [width] * (1 << width)
        if coded:
            # Symbols above the greatest in use need no length.
            lengths = huffman.lengths(huffman.symbol_counts(symbols, 0))
            parts["tables"] += huffman.LENGTH_BITS * len(lengths)
        each = torch.tensor(lengths, device=symbols.device)[symbols]
        all_bits = int(each.sum())
        parts[what] = int(each[~entries.fillers].sum())
        parts["padding"] += all_bits - parts[what] + fill(all_bits)
    return parts


def _choose_weights(who: str, model: nn.Module, skip: str | Iterable[str]) -> dict[str, nn.Parameter]:
    """Weights whose module computes them from others from now on, so that no other may have the same parameter."""
    weights = hooks.choose_plain_weights(who, model, as_patterns(skip))
    holders: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    for name, weight in weights.items():
        if len(shared := holders[id(weight)]) > 1:
            raise ValueError(
                f"{who}: weight of layer {name!r}: expected a parameter of its own, got one of {shared}: "
                "give each its own, or skip the layer"
            )
    return weights


def _check_bits(where: str, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"{where}: expected an int from 1 to 16, got {bits!r}")


def _by_name(where: str, value: float | Mapping[str, float], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """A value for each layer: the same for all, or that of the first pattern which matches its name."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(weights, value)
    check_patterns(where, value, weights)
    chosen = {name: first_match(value, name) for name in weights}
    if missing := [name for name, pattern in chosen.items() if pattern is None]:
        raise ValueError(f"{where}: expected a pattern for every layer, got none that matches {missing[0]!r}")
    return {name: value[pattern] for name, pattern in chosen.items()}
