"""``inq bench static --library``: the machine code of the compiled CUDA library, read back from the file that ships.

Needs no GPU: cuobjdump takes the library apart. For each kernel and architecture: registers, shared memory, spills,
tensor-core instructions, how weights are loaded, and what their decoding costs. Budgets hold or the exit status is 1.

Decoding is counted by data flow, so that anybody can recount: from the registers of weights that each tensor-core
instruction of the main loop takes, backwards through the loop to the loads that they come from. What lies between is
the decoding, addresses and other work are not.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import cuda
from ..table import render
from . import report
from .static import instructions, kind, main_loop, opcode

SCHEMA = 2
LIBRARY = Path(cuda.__file__).resolve().parent / "_cuda.so"
TABLE = Path("bench", "results", "static-cuda")
# Instructions for two weights of a product's decoding: KERNELS.md counts 1.75 to 2.0, and 1.0 to e4m3.
BUDGET, BUDGET_E4M3 = 2.0, 1.0
# Dense levels are 2^-126 and up in bfloat16: a multiplication for each register beside the same 2.0 ("Dense into bf16
# takes one HMUL2 a register").
BUDGET_LIFTED = BUDGET + 1
# linear_dx turns each register around (MOVM), and turns float16's exponents into bfloat16's.
BUDGET_DX = {"f16": 6.5, "bf16": 4.25}
# What the decoding of others costs for two weights by the same count: KERNELS.md, "Instructions per 2 weights".
PEERS = {
    "Marlin, int4 to fp16": 2.25,
    "vLLM Marlin, Machete, tinygemm, u4 to bf16": 2.75,
    "Humming float4e3m0, to 16 bits": 4.75,
    "Humming float5e4m0, to 16 bits": 5.4,
    "Humming float4e3m0, to fp8": 1.75,
    "CUTLASS table, to fp8": 2.75,
}
# Threads of a block, and how many blocks of it the registers of an SM are to suffice for, by kernel; the first that
# matches. The kernels' __launch_bounds__ and docs/kernels.md say the same.
DESIGN = (
    (r"linear_kernel<.*, (8|16), false> >", 256, 2),
    (r"linear_kernel<", 128, 2),
    (r"hopper::linear_hopper_kernel<", 384, 1),
    (r"count_(first|rest)<", 512, 2),
    (r"count_second<|count_third|masked_step<.*Sgd>", 256, 3),
    (r"freeze<|masked_step<", 256, 2),
    (r"row_exponents<|(un)?(pre)?pack_kernel<|quantize_rows_kernel<", 256, 4),
    (r"decode_dense_kernel<", 128, 8),
    (r"finish_kernel|upload_kernel|clear", 256, 8),
)
REGISTERS = 1 << 16  # of an SM, on every architecture here; a warp gets them by 256
# Kernels without tensor cores that go through weights or codes: 16 bytes a lane where addresses allow it. Steps do so
# with float32; beside that state, 16-bit weights move by 8 bytes.
_VECTORS = re.compile(
    r"decode_dense_kernel|(un)?pack_kernel|unprepack_kernel|freeze|row_exponents|quantize_rows_kernel"
    r"|masked_step<\(DType\)0|masked_step<\(DType\)\d, true"
    r"|count_(first|second|rest)<\(DType\)\d, false"
)
_REGISTER = re.compile(r"\bR(\d+)\b")
_WRITE_NO_REGISTER = {"ST", "STG", "STS", "STL", "RED", "REDG", "BRA", "BAR", "EXIT", "LDGSTS", "SYNCS", "UTMALDG"} | {
    "ISETP", "FSETP", "HSETP2", "DSETP", "PLOP3", "R2P", "R2UR", "FCHK", "UBLKCP",
}  # fmt: skip
_LOADS = ("LDG", "LDS", "LDSM", "LD", "LDL", "LDC", "LDCU", "S2R")


def _registers(first: str, count: int) -> list[int]:
    """``R8`` and what follows it in an instruction of so many registers; none of RZ or what is no register."""
    match = re.fullmatch(r"-?!?~?\|?R(\d+)(?:\.\w+)*\|?", first)
    return [int(match[1]) + i for i in range(count)] if match else []


def _operands(text: str) -> list[str]:
    _, _, rest = text.partition(" ")
    return [each.strip() for each in re.split(r",(?![^\[]*\])", rest)] if rest else []


def defined(text: str) -> list[int]:
    """The registers that an instruction writes."""
    name, operands = opcode(text), _operands(text)
    parts = name.split(".")
    if not operands or parts[0] in _WRITE_NO_REGISTER:
        return []
    # Predicates may come first: LOP3.LUT P0, R1, …
    first = next((each for each in operands[:3] if not re.fullmatch(r"!?U?P(T|\d+)", each)), "")
    if parts[0].endswith("GMMA"):
        return []
    if parts[0].endswith("MMA"):
        return _registers(first, 4)
    width = 4 if "128" in parts else 2 if "64" in parts or "WIDE" in parts else 1
    if parts[0] == "LDSM":
        width = int(parts[-1]) if parts[-1].isdigit() else 1
    return _registers(first, width)


def used(text: str) -> list[int]:
    """The registers that an instruction reads, accumulators and addresses included."""
    operands = _operands(text)
    first = next((i for i, each in enumerate(operands[:3]) if not re.fullmatch(r"!?U?P(T|\d+)", each)), 0)
    found = []
    for each in operands[first + 1 :]:
        for match in _REGISTER.finditer(each):
            found.append(int(match[1]))
            if ".64" in each:
                found.append(int(match[1]) + 1)
    return found


def weights_of(text: str) -> list[int]:
    """The registers of weights, the left operand, of a tensor-core instruction; none of another instruction, or of one
    whose left operand is in shared memory."""
    if kind(text) != "tensor":
        return []
    operands = _operands(text)
    return _registers(operands[1], 4) if len(operands) > 1 else []


def decoding(body: Sequence[str]) -> dict:
    """What lies between the loads of weights and the products of one loop.

    Returns:
        ``instructions``: how many, each counted once; ``by_name``; ``weights``: how many a thread decodes; ``loads``:
        the instructions that weights come from, by name.
    """
    writers: dict[int, list[int]] = {}
    for at, text in enumerate(body):
        for register in defined(text):
            writers.setdefault(register, []).append(at)

    def writer(register: int, before: int) -> int | None:
        """The last to write it, in this turn of the loop or in the one before; None if it is the same in all turns."""
        places = writers.get(register)
        return None if not places else max((p for p in places if p < before), default=max(places))

    slices: set[int] = set()
    loads: set[int] = set()
    products: set[tuple] = set()
    weights = 0
    for at, text in enumerate(body):
        taken = weights_of(text)
        if not taken:
            continue
        key = tuple(writer(register, at) for register in taken)
        # The same weights against other tokens are decoded once.
        if opcode(text).split(".")[0] == "HMMA" and (key, tuple(taken)) in products:
            continue
        products.add((key, tuple(taken)))
        weights += 16 if opcode(text).startswith("Q") else 8
        waiting = [place for place in key if place is not None]
        while waiting:
            place = waiting.pop()
            if place in slices or place in loads:
                continue
            if opcode(body[place]).split(".")[0] in _LOADS:
                loads.add(place)
                continue
            slices.add(place)
            waiting += [p for register in used(body[place]) if (p := writer(register, place)) is not None]
    names = Counter(opcode(body[place]) for place in slices)
    return {
        "instructions": len(slices),
        "by_name": dict(sorted(names.items())),
        "weights": weights,
        "loads": dict(sorted(Counter(opcode(body[place]) for place in loads).items())),
    }


# --- the library ------------------------------------------------------------------------------------------------------


def cuobjdump() -> str:
    """CUDA's, or that of Triton's wheel. RuntimeError: neither is there."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import knobs
    except ImportError:
        raise RuntimeError("static: expected cuobjdump, from CUDA or from Triton's wheel, found neither") from None
    return knobs.nvidia.cuobjdump.path


def kernels(library: Path) -> Iterator[dict]:
    """For each kernel and architecture: its mangled name, ``sm``, SASS text and resources."""
    tool = cuobjdump()
    usage: dict[tuple[str, str], dict[str, int]] = {}
    sass: dict[tuple[str, str], list[str]] = {}
    for option in ("-res-usage", "-sass"):
        done = subprocess.run([tool, option, str(library)], capture_output=True, text=True, check=True)
        arch = name = ""
        for line in done.stdout.splitlines():
            if match := re.match(r"\s*arch = (sm_\w+)", line):
                arch, name = match[1], ""
            elif match := re.match(r"\s*(?:Function : |Function )(\w+):?\s*$", line):
                name = match[1]
            elif option == "-res-usage":
                if found := re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line):
                    usage[arch, name] = {key: int(value) for key, value in found}
            elif name:
                sass.setdefault((arch, name), []).append(line)
    for (arch, name), lines in sass.items():
        yield {"name": name, "sm": arch.removeprefix("sm_"), "sass": "\n".join(lines), "usage": usage.get((arch, name))}


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Readable names: templates' arguments, without parameters."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {
        name: re.sub(r"^void |inq::cuda::|\(anonymous namespace\)::|\([^()]*\)$", "", text)
        for name, text in zip(names, done.stdout.splitlines(), strict=True)
    }


def describe(kernel: dict) -> dict:
    """A row of the table."""
    code = instructions(kernel["sass"])
    texts = [text for _, text in code]
    has_tensor = any(kind(text) == "tensor" for text in texts)
    wanted = (lambda t: kind(t) == "tensor") if has_tensor else (lambda t: kind(t) == "global")
    body = main_loop(code, wanted)
    row = {"name": kernel["name"], "sm": kernel["sm"], "registers": kernel["usage"]["REG"]}
    row |= {"stack": kernel["usage"]["STACK"], "local": sum(kind(text) == "local" for text in texts)}
    tensor = Counter(opcode(text).split(".")[0] for text in texts if kind(text) == "tensor")
    copies = Counter(opcode(t) for t in texts if re.match(r"LDGSTS|UBLKCP|UTMALDG|CCTL", t))
    row |= {"tensor": dict(sorted(tensor.items())), "copies": dict(sorted(copies.items()))}
    row["loads"] = dict(sorted(Counter(opcode(text) for text in texts if text.startswith("LDG.")).items()))
    row["decoding"] = decoding(body) if has_tensor else None
    return row


def blocks_of_an_sm(row: dict) -> tuple[int, int] | None:
    """(how many blocks the registers suffice for, how many they are to); None for a kernel without a design."""
    for pattern, threads, blocks in DESIGN:
        if re.match(pattern, row["name"]):
            of_a_warp = -(-32 * row["registers"] // 256) * 256
            return REGISTERS // (threads // 32 * of_a_warp), blocks
    return None


def per_two(row: dict) -> float | None:
    """Instructions of decoding for two weights."""
    found = row["decoding"]
    return 2 * found["instructions"] / found["weights"] if found and found["weights"] else None


def budget(row: dict) -> float:
    """Instructions that the decoding of two weights may take."""
    name = row["name"]
    if "QGMMA" in row["tensor"]:
        return BUDGET_E4M3
    # linear.cuh: Plan<Codec, tokens, is the gradient>; host.h: Number 1 is bf16, Levels 1 and 3 are dense.
    if re.search(r"Plan<.*, true>", name):
        return BUDGET_DX["bf16" if "(Number)1" in name else "f16"]
    return BUDGET_LIFTED if re.search(r"\(Number\)1, \(Levels\)[13]", name) else BUDGET


def problems(row: dict) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: {row['stack']} bytes of stack, {row['local']} instructions")
    hopper = "hopper" in row["name"] and "linear" in row["name"]
    if hopper and not any(name in row["tensor"] for name in ("HGMMA", "QGMMA")):
        found.append(f"tensor cores: expected HGMMA or QGMMA, got {row['tensor'] or 'none'}")
    cost = per_two(row)
    if row["decoding"] is not None and cost is None:
        found.append("decoding: expected weights in registers of the products, found none in the main loop")
    limit = budget(row)
    if cost is not None and cost > limit:
        found.append(f"decoding: expected at most {limit} instructions for two weights, got {cost:.2f}")
    fits = blocks_of_an_sm(row)
    if fits is None:
        found.append("registers: expected a line in DESIGN, found none")
    elif fits[0] < fits[1]:
        found.append(
            f"registers: expected room for {fits[1]} blocks on an SM, {row['registers']} leave it for {fits[0]}"
        )
    return found + _narrow(row)


def _narrow(row: dict) -> list[str]:
    """Weights that do not move by 128 bits, or by TMA's bulk copies."""
    name, copies, found = row["name"], row["copies"], []
    for load in row["decoding"]["loads"] if row["decoding"] else ():
        # Layout H has a fifth word beside each 16 bytes.
        if "128" not in load and not (load == "LDS" and "codec::H" in name):
            found.append(f"weights: expected loads of 128 bits, got {load}")
    if name.startswith("linear_kernel<"):
        # Four blocks of weights a stage, and tokens; the one narrow copy is of tokens whose rows are not aligned.
        wide = sum(count for copy, count in copies.items() if copy.startswith("LDGSTS") and "128" in copy)
        narrow = sum(count for copy, count in copies.items() if copy.startswith("LDGSTS") and "128" not in copy)
        if wide < 5 or narrow > 1:
            found.append(f"weights: expected 5 copies of 128 bits and one of tokens beside them, got {copies}")
    if "linear_hopper" in name and not {"UBLKCP", "UTMALDG"} <= {copy.split(".")[0] for copy in copies}:
        found.append(f"weights: expected bulk copies (UBLKCP) and x by TMA (UTMALDG), got {copies or 'none'}")
    if _VECTORS.match(name) and not any("128" in load for load in row["loads"]):
        found.append(f"weights: expected loads of 128 bits, got {row['loads'] or 'none'}")
    return found


def stale(rows: Sequence[dict], committed: Sequence[dict]) -> list[str]:
    """Where a committed table says something else than the library: it is to be made again."""

    def key(row: dict) -> tuple[str, str]:
        return row["name"], row["sm"]

    old, new = ({key(row): row for row in each} for each in (committed, rows))
    found = [f"{name} on sm_{sm}: not in the committed table" for name, sm in sorted(new.keys() - old.keys())]
    found += [f"{name} on sm_{sm}: in the committed table alone" for name, sm in sorted(old.keys() - new.keys())]
    for both in sorted(old.keys() & new.keys()):
        for what in ("registers", "stack", "local", "tensor", "copies", "loads", "decoding"):
            if old[both][what] != new[both][what]:
                found.append(
                    f"{both[0]} on sm_{both[1]}: {what}: the committed table has {old[both][what]}, got "
                    f"{new[both][what]}"
                )
    return found


def markdown(rows: Sequence[dict]) -> str:
    """The results as a table for people, with what others pay."""
    lines = [
        "# Machine code of the CUDA library",
        "",
        "By `inq bench static --library`, from the file that ships; no GPU. Decoding: instructions of the main loop "
        "between the loads of weights and the products, for two weights. Blocks of an SM: what registers leave room "
        "for. Nothing here is a measurement of time.",
        "",
        "| kernel | sm | registers | blocks / SM | spills | decoding / 2 weights | weights from | copies | "
        "tensor cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def words(counts: dict | None) -> str:
        return ", ".join(f"{count} {name}" for name, count in (counts or {}).items())

    for row in rows:
        cost, decoded, fits = per_two(row), row["decoding"] or {}, blocks_of_an_sm(row)
        cells = [row["name"].replace("|", "\\|"), row["sm"], row["registers"], fits[0] if fits else "", row["local"]]
        cells += ["" if cost is None else f"{cost:.2f}", words(decoded.get("loads", row["loads"]))]
        lines.append("| " + " | ".join(map(str, [*cells, words(row["copies"]), words(row["tensor"])])) + " |")
    lines += ["", "Others, by KERNELS.md's count, for two weights:", ""]
    lines += [f"- {name}: {count}" for name, count in PEERS.items()]
    return "\n".join(lines) + "\n"


def run(out: Path | None, library: Path = LIBRARY) -> int:
    """``inq bench static --library``: files under ``out``, problems on stderr and as exit status 1.

    Elsewhere than at its own place the table is compared with the one there.
    """
    if not library.exists():
        print(f"inq bench: static: expected a CUDA library, {library.name} is not built here", file=sys.stderr)
        return 1
    found = sorted(map(describe, kernels(library)), key=lambda row: (row["name"], row["sm"]))
    if not found:
        print(f"inq bench: static: expected kernels in {library.name}, found none", file=sys.stderr)
        return 1
    names = demangled(sorted({row["name"] for row in found}))
    rows = [row | {"name": names[row["name"]]} for row in found]
    out = out or TABLE
    out.mkdir(parents=True, exist_ok=True)
    report.write(out / "static.json", {"schema": SCHEMA, "rows": rows})
    (out / "static.md").write_text(markdown(rows))
    cells, wrong = [], []
    for row in rows:
        wrong += [f"{row['name']} on sm_{row['sm']}: {each}" for each in problems(row)]
        cost = per_two(row)
        if cost is not None:
            cells.append((row["name"], row["sm"], row["registers"], f"{cost:.2f}", " ".join(row["tensor"])))
    committed = TABLE / "static.json"
    if out.resolve() != TABLE.resolve() and committed.exists():
        wrong += stale(rows, json.loads(committed.read_text())["rows"])
    print(render(("kernel", "sm", "registers", "decoding/2 weights", "tensor cores"), cells))
    print(f"{out / 'static.json'}: {len(rows)} kernels, {len(wrong)} problems")
    for each in wrong:
        print(f"inq bench: {each}", file=sys.stderr)
    return 1 if wrong else 0
