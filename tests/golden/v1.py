"""What tests/golden/v1.safetensors holds, in plain Python; run as a script, this wrote it. It is never written again:
version 1 must be read for ever, so a change of the format needs a new version, with a golden file of its own.
"""

import itertools
from pathlib import Path

import torch

PATH = Path(__file__).with_name("v1.safetensors")

# (bits, levels) → how many powers of two.
MAGNITUDES = {
    (2, "paper"): 1, (3, "paper"): 2, (4, "paper"): 4, (5, "paper"): 8,
    (2, "dense"): 1, (3, "dense"): 3, (4, "dense"): 7, (5, "dense"): 15,
}  # fmt: skip
SCALE = [[0.75], [-3.0], [1.0e-3], [2.5]]
# The code of each value, smallest magnitude first, positive then negative, written down from the definition.
CODES = {
    (2, "paper"): [0b01, 0b11],
    (3, "paper"): [0b010, 0b110, 0b011, 0b111],
    (3, "dense"): [0b001, 0b101, 0b010, 0b110, 0b011, 0b111],
    (4, "paper"): [0b0100, 0b1100, 0b0101, 0b1101, 0b0110, 0b1110, 0b0111, 0b1111],
}


def exponents(bits, levels):
    """n1 of the four rows: one for all (paper) or one a row (dense)."""
    return [3 - bits] * 4 if levels == "paper" else [row - bits for row in range(4)]


def values(bits, levels, shape=(4, 9)):
    """All values that a row may have, over and over in flat order."""
    m, numel = MAGNITUDES[bits, levels], shape[1] if len(shape) == 2 else shape[1] * shape[2] * shape[3]
    rows = []
    for row, n1 in enumerate(exponents(bits, levels)[: shape[0]]):
        every = [0.0] + [sign * 2.0**k for k in range(n1 + 1 - m, n1 + 1) for sign in (1, -1)]
        rows.append(list(itertools.islice(itertools.cycle(every), row * numel, (row + 1) * numel)))
    return torch.tensor(rows).view(shape)


def expected():
    """name → (values, n1 of each row, row scales or None, bits, levels) of packed weights, or → the tensor."""
    entries = {}
    for bits, levels in MAGNITUDES:
        name = f"{levels[0]}{bits}.weight"
        scale = SCALE if (bits, levels) == (4, "dense") else None
        entries[name] = (values(bits, levels), exponents(bits, levels), scale, bits, levels)
    entries["conv.weight"] = (values(5, "paper", (2, 2, 2, 3)), exponents(5, "paper")[:2], None, 5, "paper")
    entries["conv.bias"] = torch.tensor([0.5, -1.25])
    entries["bn.n"] = torch.tensor(12345)
    entries["norm.weight"] = torch.tensor([1.0, 2.5, -0.125], dtype=torch.bfloat16)
    return entries


def main():
    import inq_kernels as inq

    if PATH.exists():
        raise SystemExit(f"{PATH} is there: a golden file is never written again")
    entries = {}
    for name, value in expected().items():
        entries[name] = value
        if isinstance(value, tuple):
            w, n1, scale, bits, levels = value
            fmt = inq.Format(bits, levels, "tensor" if levels == "paper" else "channel")
            packed = inq.pack(w, fmt, torch.tensor(n1, dtype=torch.int8).view(-1, 1))
            scale = None if scale is None else torch.tensor(scale)
            entries[name] = inq.PackedWeight(packed.weight, packed.weight_exp, scale, fmt, packed.shape)
    inq.save(entries, PATH)


if __name__ == "__main__":
    main()
