"""What tests/golden/v2.safetensors holds, an entropy-coded file, in plain Python; run as a script, this wrote it. It is
never written again: version 2 must be read for ever.
"""

from pathlib import Path

import torch

PATH = Path(__file__).with_name("v2.safetensors")

# (bits, levels) → how many powers of two.
MAGNITUDES = {
    (2, "paper"): 1, (3, "paper"): 2, (4, "paper"): 4, (5, "paper"): 8,
    (2, "dense"): 1, (3, "dense"): 3, (4, "dense"): 7, (5, "dense"): 15,
}  # fmt: skip
# name → bits, levels, shape and how many of 4096 weights are zero: rows with padding, and zeros taken out 0 to 3 times.
WEIGHTS = {
    **{f"{levels[0]}{bits}.weight": (bits, levels, (12, 99), 600) for bits, levels in MAGNITUDES},
    "conv.weight": (5, "paper", (8, 4, 3, 3), 100),
    "sparse.weight": (4, "paper", (40, 203), 3100),
    "sparser.weight": (5, "dense", (33, 99), 3950),
    "sparsest.weight": (3, "dense", (64, 201), 4060),
    "zero.weight": (2, "paper", (16, 100), 4096),
}


def exponents(rows):
    """n1 of each row."""
    return [row % 5 - 2 for row in range(rows)]


def values(bits, levels, shape, zeros):
    """Values that follow from their numbers: small ones are seldom, as under a bell."""
    rows, m = [], MAGNITUDES[bits, levels]
    numel = torch.Size(shape[1:]).numel()
    for row, n1 in enumerate(exponents(shape[0])):
        for column in range(numel):
            x = (row * numel + column + 1) * 2654435761 % 2**32
            x = (x ^ x >> 15) * 2246822519 % 2**32
            x ^= x >> 13
            octave = min(format(x >> 16, "b")[::-1].find("1") % 16, m - 1)
            rows.append(0.0 if (x & 4095) < zeros else (-1) ** (x >> 12 & 1) * 2.0 ** (n1 - octave))
    return torch.tensor(rows).view(shape)


def expected():
    """name → (values, n1 of each row, bits, levels) of packed weights, or → the tensor."""
    entries = {
        name: (values(bits, levels, shape, zeros), exponents(shape[0]), bits, levels)
        for name, (bits, levels, shape, zeros) in WEIGHTS.items()
    }
    return entries | {"conv.bias": torch.tensor([0.5, -1.25])}


def main():
    import inq_kernels as inq

    if PATH.exists():
        raise SystemExit(f"{PATH} is there: a golden file is never written again")
    entries = {}
    for name, value in expected().items():
        if isinstance(value, tuple):
            w, n1, bits, levels = value
            n1 = torch.tensor(n1, dtype=torch.int8).view(-1, 1)
            value = inq.pack(w, inq.Format(bits, levels, granularity="channel"), n1)
        entries[name] = value
    inq.save(entries, PATH, compress=True)


if __name__ == "__main__":
    main()
