"""``inq bench static``: Triton's kernels compiled for every kind of GPU, and what their machine code will cost.

Needs Triton and no GPU. Each kernel is compiled as a launch would, disassembled with the tools of Triton's wheel, and
counted: registers, spills, shared memory, and the instructions of its main loop for each weight that a thread decodes.
Budgets hold or the exit status is 1 (KERNELS.md).

All of them take half an hour of a processor. The table that is committed says of which sources it was made, so that
a test sees it grow old; ``--check`` compiles few of them, extremes of each kernel, and compares them with the table.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..table import render

SCHEMA = 2
_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent
# e4m3 exists from Ada on.
FIRST_E4M3 = 89
# Shared memory that a block may have: a kernel that needs more compiles, and cannot be launched.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Columns of Blackwell's tensor memory; Triton makes a trap of a kernel that needs more.
TENSOR_MEMORY = 512
# Constants of kernels that the table repeats.
FACTS = ("DOT", "SOURCE", "PRECISION", "CODES", "WIDTH", "BN", "BM", "BK", "SPLIT")

# Instructions by class, first match first. Addresses are integer instructions, and so are moves and the uniform
# datapath's: each takes an issue slot.
_CLASSES = (
    ("tensor", r"HMMA|IMMA|QMMA|OMMA|BMMA|HGMMA|IGMMA|QGMMA|BGMMA|UTC\w*MMA"),
    ("local", r"LDL|STL"),
    ("global", r"LDG|LDGSTS|STG|LD|ST|ATOM\w*|RED\w*|UBLK\w*|UTMA\w*"),
    ("shared", r"LDS\w*|STS\w*|STAS|LDTM|STTM|UTCCP"),
    ("convert", r"F2F\w*|F2I|I2F\w*|F2FP|FRND|I2FP"),
    (
        "integer",
        r"U?(IMAD\w*|IADD\w*|VIADD\w*|LOP3?|PLOP3|SHF|SHL|SHR|LEA|PRMT|ISETP|ICMP|IMNMX|VIMNMX\w*|IABS|SEL|BFE|BFI"
        r"|BMSK|SGXT|POPC|FLO|BREV|IDP\w*|MOV\w*|P2R|P2UR|R2P|I2I\w*|VABSDIFF\w*|LEPC|VHMNMX|CS2R|MOVM)"
        r"|R2UR\w*|S2R|S2UR|VOTE\w*|SHFL",
    ),
    ("float", r"F(ADD|MUL|FMA|SETP|SEL|MNMX|SET|CHK)\w*|H(ADD|MUL|FMA|SETP|SET|MNMX)2?\w*|MUFU|D(ADD|MUL|FMA|SETP)"),
)
_CLASS = [(name, re.compile(f"(?:{pattern})$")) for name, pattern in _CLASSES]
CLASSES = (*(name for name, _ in _CLASSES), "other")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_TARGET = re.compile(r"0x([0-9a-f]+)")


# --- machine code -----------------------------------------------------------------------------------------------------


def instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text without predicate) of each instruction of one kernel's disassembly."""
    found = []
    for line in sass.splitlines():
        if match := _LINE.match(line):
            found.append((int(match[1], 16), _PREDICATE.sub("", match[2])))
    return found


def opcode(text: str) -> str:
    """``IMAD.SHL.U32`` of ``IMAD.SHL.U32 R1, R2, 0x4, RZ``."""
    return text.split()[0]


def kind(text: str) -> str:
    """The class of an instruction: one of ``CLASSES``."""
    name = opcode(text).split(".")[0]
    return next((each for each, pattern in _CLASS if pattern.match(name)), "other")


def main_loop(code: Sequence[tuple[int, str]], wanted: Callable[[str], bool]) -> list[str]:
    """The innermost loop with most of the ``wanted`` instructions: from a backward branch's target to the branch.

    All instructions where no loop has any.
    """
    loops = []
    for at, text in code:
        if opcode(text).split(".")[0] == "BRA" and (match := _TARGET.search(text)):
            target = int(match[1], 16)
            # A branch to itself ends every kernel.
            if target < at:
                body = [t for a, t in code if target <= a <= at]
                loops.append((target, at, body, sum(map(wanted, body))))
    useful = [loop for loop in loops if loop[3]]
    inner = [
        one
        for one in useful
        if not any(other is not one and one[0] <= other[0] and other[1] <= one[1] for other in useful)
    ]
    return max(inner, key=lambda loop: loop[3])[2] if inner else [text for _, text in code]


def multiply_adds(text: str) -> int:
    """Multiply-adds of one warp by one instruction; 0 for others than products.

    Blackwell's tensor instructions say no shape, and one thread issues them for all: 0 too.
    """
    name = opcode(text)
    if match := re.match(r"[HIQB]GMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, match.groups())
        return m * n * k // 4  # of a group of four warps
    if match := re.match(r"(?:SP\.)?[HIQBO]MMA\.(\d+)", name):
        # 16816: m16n8k16; 1688: m16n8k8; 16832: m16n8k32; 1684: m16n8k4.
        return 16 * 8 * int(match[1][3:])
    return 32 if name.startswith("FFMA") else 0


def _wanted(constants: dict[str, Any], texts: Iterable[str]) -> Callable[[str], bool]:
    """What marks the main loop: tensor-core instructions, else products, else memory."""
    for each in (lambda t: kind(t) == "tensor", lambda t: opcode(t).startswith("FFMA"), lambda t: kind(t) == "global"):
        if ("DOT" in constants or each("LDG R0")) and any(map(each, texts)):
            return each
    return lambda text: kind(text) == "global"


def describe(sass: str, constants: dict[str, Any], warps: int) -> dict:
    """Counts of a kernel's main loop. ``per_weight``: by class, for each weight that a thread decodes there; None
    where a kernel decodes no weights."""
    code = instructions(sass)
    texts = [text for _, text in code]
    body = main_loop(code, _wanted(constants, texts))
    counts = Counter(kind(text) for text in body)
    tensor = Counter(opcode(text).split(".")[0] for text in body if kind(text) == "tensor")
    found = {
        "instructions": len(body),
        "tensor": dict(sorted(tensor.items())),
        "tensor_anywhere": sum(kind(text) == "tensor" for text in texts),
        "local": sum(kind(text) == "local" for text in texts),
        "unrolled": 1,
        "per_weight": None,
    }
    if {"BN", "BK", "CODES"} <= constants.keys():
        weights = constants["BN"] * constants["BK"] * constants["CODES"]
        if "BM" in constants:
            # What a loop's body multiplies says how many turns the compiler has made one.
            found["unrolled"] = max(round(sum(map(multiply_adds, body)) * warps / (weights * constants["BM"])), 1)
        each = weights * found["unrolled"] / (32 * warps)
        found["per_weight"] = {name: round(counts[name] / each, 4) for name in CLASSES if counts[name]}
    return found


# --- compiling --------------------------------------------------------------------------------------------------------


def attributes(signature: dict[str, str]) -> tuple[dict[str, str], dict]:
    """(signature, attrs) for Triton: pointers and types that end with ":16" are multiples of 16, as Triton's launcher
    finds for such arguments."""
    attrs, types = {}, {}
    for at, (name, given) in enumerate(signature.items()):
        types[name], _, multiple = given.partition(":")
        if multiple not in ("", "16"):
            raise ValueError(f"signature: {name}: expected a type, or one that ends with :16, got {given!r}")
        if multiple or given.startswith("*"):
            attrs[(at,)] = [["tt.divisibility", 16]]
    return types, attrs


def uses_e4m3(configuration) -> bool:
    """Whether a configuration has e4m3 numbers, which the first GPUs here lack."""
    return (
        any("fp8e4nv" in given for given in configuration.signature.values())
        or configuration.constexprs.get("DOT") == "e4m3"
        or configuration.constexprs.get("SOURCE") == "e4m3"
    )


def wanted(configurations: Iterable, sm: int) -> Iterator[Any]:
    """The configurations that a capability can have: e4m3 numbers exist from ``FIRST_E4M3`` on."""
    return (each for each in configurations if sm >= FIRST_E4M3 or not uses_e4m3(each))


def fingerprint(configuration) -> str:
    """Of all that a launch says of a kernel: types, constants and warps. Of no code: that is ``sources``'."""
    # Tests ask under the interpreter.
    constants = {name: str(value) for name, value in configuration.constexprs.items() if name != "INTERPRETED"}
    said = [configuration.signature, constants, configuration.num_warps, configuration.num_stages]
    said += [configuration.registers]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def sources() -> dict[str, str]:
    """A fingerprint of each file with kernels, and of what their constants come from, without comments."""
    files = [path for path in sorted((ROOT / "triton_ops").glob("*.py")) if "@triton.jit" in path.read_text()]
    return {path.name: hashlib.sha256(_code(path.read_text()).encode()).hexdigest()[:16] for path in files}


def _code(text: str) -> str:
    """A module without comments, empty lines and what stands at lines' ends."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def compile_one(configuration, sm: int) -> dict:
    """A row of the table: what one kernel costs on one kind of GPU, or ``error``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row = {"name": configuration.name, "sm": sm, "kernel": configuration.kernel.__name__}
    row |= {"key": fingerprint(configuration), "warps": configuration.num_warps, "error": None}
    signature, attrs = attributes(configuration.signature)
    source = ASTSource(configuration.kernel, signature, configuration.constexprs, attrs)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    options |= {"maxnreg": configuration.registers}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # whatever a compiler raises belongs into the table, which fails for it
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    sass, usage = disassemble(compiled.asm["cubin"])
    facts = {name: configuration.constexprs.get(name) for name in FACTS}
    row |= {"facts": {name: value for name, value in facts.items() if value is not None}}
    row |= {"registers": usage["REG"], "stack": usage["STACK"], "shared": compiled.metadata.shared}
    row["tensor_memory"] = compiled.metadata.tmem_size or 0
    return row | describe(sass, configuration.constexprs, configuration.num_warps)


def disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """(SASS, resources) by the cuobjdump of Triton's wheel."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return sass, {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget(row: dict) -> float | None:
    """Integer instructions, addresses included, that a decoded 4-bit weight may cost; None: no budget."""
    facts, sm = row.get("facts", {}), row["sm"]
    if row["kernel"] != "linear_kernel" or " paper4 " not in row["name"]:
        return None
    # Words of another type are converted, one by one.
    if facts["SOURCE"] != facts["DOT"]:
        return None
    if facts["DOT"] == "e4m3":
        return 0.7 if sm == 90 else None
    return 1.3 if facts["DOT"] in ("fp16", "bf16") and sm in (80, 86, 89, 90) else None


def expected_tensor(row: dict) -> str | None:
    """The tensor-core instruction that a product must have in its loop; None where it has none."""
    dot, sm = row.get("facts", {}).get("DOT"), row["sm"]
    if row["kernel"] != "linear_kernel" or dot in (None, "fp32"):
        return None
    if sm == 100:
        return "UTCQMMA" if dot == "e4m3" else "UTCHMMA"
    if dot == "e4m3":
        return "QGMMA" if sm == 90 else "QMMA"
    return "HGMMA" if sm == 90 else "HMMA"


def is_ieee(row: dict) -> bool:
    """Whether products are of float32 as IEEE has them: a tensor core's, of any type, would lose bits."""
    facts = row.get("facts", {})
    return facts.get("DOT") == "fp32" and facts.get("PRECISION", "ieee") == "ieee"


def problems(row: dict) -> list[str]:
    """What is wrong with a row, in words."""
    if row["error"]:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: {row['stack']} bytes of stack, {row['local']} instructions")
    if row["shared"] > SHARED_LIMIT[row["sm"]]:
        found.append(f"shared memory: expected at most {SHARED_LIMIT[row['sm']]} bytes, got {row['shared']}")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"tensor memory: expected at most {TENSOR_MEMORY} columns, got {row['tensor_memory']}")
    if (name := expected_tensor(row)) and not any(each.startswith(name) for each in row["tensor"]):
        found.append(f"tensor cores: expected {name} in the main loop, got {row['tensor'] or 'none'}")
    if is_ieee(row) and row["tensor_anywhere"]:
        found.append(f"tensor cores: expected none for float32, got {row['tensor_anywhere']} {' '.join(row['tensor'])}")
    limit = budget(row)
    if limit is not None and (got := row["per_weight"].get("integer", 0)) > limit:
        found.append(f"integer instructions a weight: expected at most {limit}, got {got:.2f}")
    return found


# --- the table --------------------------------------------------------------------------------------------------------

# A row as it is written: its constants, classes of instructions and the like without their names.
_COLUMNS = (
    *("name", "sm", "kernel", "key", "warps", "registers", "stack", "local", "shared", "tensor_memory"),
    *("instructions", "unrolled", "tensor", "tensor_anywhere", "facts", "per_weight", "error"),
)
_NAMED = {"facts": FACTS, "per_weight": CLASSES}


def write(path: Path, results: dict) -> None:
    """``results`` as JSON, a line for each row."""
    lines = []
    for row in results["rows"]:
        short = dict(row)
        for column, names in _NAMED.items():
            short[column] = None if row.get(column) is None else [row[column].get(name) for name in names]
        lines.append("  " + json.dumps([short.get(column) for column in _COLUMNS], separators=(",", ":")))
    head = {name: value for name, value in results.items() if name != "rows"} | {"columns": _COLUMNS, "rows": []}
    text = json.dumps(head, indent=1)
    assert text.endswith('"rows": []\n}')
    path.write_text(text[: -len("[]\n}")] + "[\n" + ",\n".join(lines) + "\n ]\n}\n")


def read(path: Path) -> dict:
    """What ``write`` wrote."""
    results = json.loads(path.read_text())
    rows = []
    for line in results["rows"]:
        row = dict(zip(results["columns"], line, strict=True))
        for column, names in _NAMED.items():
            if row[column] is not None:
                row[column] = {name: value for name, value in zip(names, row[column], strict=True) if value is not None}
        rows.append(row)
    return {name: value for name, value in results.items() if name != "columns"} | {"rows": rows}


def folder(version: str) -> Path:
    """Where the committed table of a version of Triton is."""
    return ROOT / "bench" / "results" / f"static-{version}"


# --- all of it --------------------------------------------------------------------------------------------------------


_NONE = "inq bench: no configuration is like that: see --only"


def _named(name: str, only: Sequence[str]) -> bool:
    """Whether ``--only`` lets it through: one of the words is in the name, or there are none."""
    return not only or any(word in name for word in only)


def compile_all(
    capabilities: Sequence[int], only: Sequence[str] = (), jobs: int = 2, exact: Iterable[tuple[str, int]] | None = None
) -> list[dict]:
    """Rows of every wanted configuration, compiled by ``jobs`` processes in which nothing is interpreted.

    Args:
        only: words; configurations whose names hold none of them are left out.
        exact: names and capabilities; others are left out.

    Raises:
        RuntimeError: a process ended early; its last words are in the message.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(places)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        # A cache that Triton is told of is used: kernels that have not changed are not compiled again.
        environment.setdefault("TRITON_CACHE_DIR", str(Path(temporary, "cache")))
        running = []
        for job in range(jobs):
            task = {"capabilities": list(capabilities), "only": list(only), "job": job, "jobs": jobs}
            task["exact"] = None if exact is None else sorted(exact)
            asked, answer = Path(temporary, f"{job}.task.json"), Path(temporary, f"{job}.json")
            asked.write_text(json.dumps(task))
            words = [sys.executable, "-m", f"{__package__}.static", str(asked), str(answer)]
            running.append(
                subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        errors = [process.communicate()[1] for process in running]
        for job, process in enumerate(running):
            if process.returncode:
                raise RuntimeError(f"static: a process ended with status {process.returncode}: {errors[job][-2000:]}")
            rows += json.loads(Path(temporary, f"{job}.json").read_text())
    place: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: (-row["sm"], row["at"])):
        place.setdefault(row["name"], row["at"])
    rows.sort(key=lambda row: (place[row["name"]], row["name"], row["sm"]))
    return [{name: value for name, value in row.items() if name != "at"} for row in rows]


def worker(task: dict, path: Path) -> None:
    """One process's share of the work, every ``jobs``-th, as JSON."""
    from ..triton_ops import launch
    from ..triton_ops.configurations import configurations

    if launch.INTERPRETED:
        raise RuntimeError("static: expected Triton without its interpreter; TRITON_INTERPRET is set")
    exact = None if task["exact"] is None else {tuple(each) for each in task["exact"]}
    work = [
        (at, each, sm)
        for sm in task["capabilities"]
        for at, each in enumerate(wanted(configurations(sm), sm))
        if _named(each.name, task["only"]) and (exact is None or (each.name, sm) in exact)
    ]
    rows = [compile_one(each, sm) | {"at": at} for at, each, sm in work[task["job"] :: task["jobs"]]]
    path.write_text(json.dumps(rows))


def extremes(rows: Sequence[dict]) -> list[dict]:
    """Few rows that stand for all: of each kernel and type of product, for each capability, the one with most
    registers, and the first of each tile that has a budget."""
    chosen: dict[tuple, dict] = {}
    for row in rows:
        facts = row["facts"]
        key = (row["kernel"], row["sm"], facts.get("DOT"))
        if key not in chosen or row["registers"] > chosen[key]["registers"]:
            chosen[key] = row
        if budget(row) is not None:
            chosen.setdefault((*key, facts["BM"]), row)
    return list({(row["name"], row["sm"]): row for row in chosen.values()}.values())


def check(jobs: int, capabilities: Sequence[int], only: Sequence[str]) -> int:
    """``inq bench static --check``: the extremes, compiled again, and the committed table; 1 where they differ."""
    version = importlib.metadata.version("triton")
    path = folder(version) / "static.json"
    if not path.exists():
        print(f"inq bench: {path}: no such file: make static writes it", file=sys.stderr)
        return 1
    results = read(path)
    wrong = [f"{name}: changed since the table was made: make static" for name in changed(results)]
    known = {
        (row["name"], row["sm"]): row
        for row in extremes(results["rows"])
        if row["sm"] in capabilities and _named(row["name"], only)
    }
    if not known:
        print("\n".join([*(f"inq bench: {each}" for each in wrong), _NONE]), file=sys.stderr)
        return 1
    rows = compile_all(capabilities, (), jobs, known)
    # As they come back from a file.
    for row in json.loads(json.dumps(rows)):
        before = known.pop((row["name"], row["sm"]))
        differ = [f"{name} {before[name]} → {row[name]}" for name in sorted(before) if before[name] != row.get(name)]
        wrong += [f"{row['name']} on sm_{row['sm']}: {each}" for each in (*differ, *problems(row))]
    wrong += [f"{name} on sm_{sm}: no such configuration any more" for name, sm in known]
    print(f"{path}: {len(rows)} of {len(results['rows'])} kernels compiled again, {len(wrong)} problems")
    for each in wrong:
        print(f"inq bench: {each}", file=sys.stderr)
    return 1 if wrong else 0


def changed(results: dict) -> list[str]:
    """The source files that are others than those a table was made of."""
    now, then = sources(), results["sources"]
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def markdown(results: dict) -> str:
    """The results as a table for people: a line for each kernel, type, tile and capability, and the most that any of
    its configurations has."""
    from ..triton_ops.configurations import COVERED

    lines = [
        "# Machine code of the Triton kernels",
        "",
        COVERED,
        "",
        f"By `inq bench static`, with Triton {results['triton']} and no GPU: {len(results['rows'])} kernels. A line is "
        "of all configurations of one kernel, type of product, words and tile, and says the most that any of them has. "
        "Instructions are those of the main loop for each weight that a thread decodes: integer (addresses, moves and "
        "the uniform datapath included; the least, too), then tensor-core, conversion, float, shared, global memory. "
        "Nothing here is a measurement of time. static.json has each configuration by itself.",
        "",
        "| kernel | product | words | sm | BN×BM×BK | warps | configurations | registers | shared KB | spills | "
        "integer | tensor | convert | float | shared | global | tensor cores |",
        "|" + "---|" * 17,
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        if row["error"]:
            lines.append(f"| {row['name']} | | | {row['sm']} | does not compile: {row['error']} |" + " |" * 12)
            continue
        facts = row["facts"]
        tile = "×".join(str(facts[name]) for name in ("BN", "BM", "BK") if name in facts)
        dot = " ".join(str(facts[name]) for name in ("DOT", "PRECISION") if name in facts)
        words = f"{facts['CODES']} {facts['SOURCE']}" if {"CODES", "SOURCE"} <= facts.keys() else ""
        groups.setdefault((row["kernel"], dot, words, row["sm"], tile, row["warps"]), []).append(row)
    for key, rows in groups.items():
        numbers = []
        for name in ("integer", "tensor", "convert", "float", "shared", "global"):
            found = [row["per_weight"].get(name, 0) for row in rows if row["per_weight"] is not None]
            most = f"{max(found):.2f}" if found else ""
            numbers.append(f"{min(found):.2f}–{most}" if found and name == "integer" else most)
        names = sorted({name for row in rows for name in row["tensor"]})
        cells = [*key, len(rows), max(row["registers"] for row in rows)]
        cells += [f"{max(row['shared'] for row in rows) / 1024:.1f}", max(row["local"] for row in rows), *numbers]
        lines.append("| " + " | ".join(map(str, [*cells, " ".join(names)])) + " |")
    return "\n".join(lines) + "\n"


def run(out: Path | None, capabilities: Sequence[int], only: Sequence[str], jobs: int, checking: bool = False) -> int:
    """``inq bench static``: files under ``out``, problems on stderr and as exit status 1."""
    if importlib.util.find_spec("triton") is None:
        print("inq bench: static needs Triton: pip install 'inq_kernels[triton]'", file=sys.stderr)
        return 1
    if checking:
        return check(jobs, capabilities, only)
    version = importlib.metadata.version("triton")
    out = out or Path("bench", "results", f"static-{version}")
    # Before minutes of compiling: a folder that cannot be made is told at once.
    out.mkdir(parents=True, exist_ok=True)
    made_of = sources()
    rows = compile_all(capabilities, only, jobs)
    if not rows:
        print(_NONE, file=sys.stderr)
        return 1
    results = {"schema": SCHEMA, "triton": version, "capabilities": list(capabilities), "sources": made_of}
    results["rows"] = rows
    write(out / "static.json", results)
    (out / "static.md").write_text(markdown(results))
    cells, wrong = [], []
    for row in rows:
        found = problems(row)
        wrong += [f"{row['name']} on sm_{row['sm']}: {each}" for each in found]
        if row["error"] is None and row["per_weight"] is not None and (only or budget(row) is not None):
            limit = budget(row)
            integer = f"{row['per_weight'].get('integer', 0):.3f}"
            sizes = (row["registers"], row["shared"], integer, limit or "-")
            cells.append((row["name"], row["sm"], *sizes, " ".join(row["tensor"])))
    print(render(("configuration", "sm", "registers", "shared", "integer/weight", "budget", "tensor cores"), cells))
    print(f"{out / 'static.json'}: {len(rows)} kernels compiled, {len(wrong)} problems")
    for each in wrong:
        print(f"inq bench: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    worker(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
