"""``inq bench static``: kernels compile for GPUs that are not here, within their budgets, and the committed table is
whole. Counting is tested on small disassemblies; one fresh compile holds the key configurations to their budgets."""

import itertools
from importlib import metadata

import pytest
import torch

from inq_kernels import slices
from inq_kernels.format import Format

pytest.importorskip("triton", reason="kernels are compiled by Triton, which is not installed")

from inq_kernels.bench import static
from inq_kernels.bench.command import CAPABILITIES
from inq_kernels.triton_ops import (
    conv2d,
    dense,
    exponents,
    linear,
    linear_dx,
    linear_fp8,
    masked_steps,
    operands,
    partition,
    portion,
    quantize,
    tables,
    tiles,
)
from inq_kernels.triton_ops.codec import DOT
from inq_kernels.triton_ops.configurations import configurations, layout_for

from inq_kernels.cli import main

KEY = (
    "linear fp16 paper4 m16",
    "linear bf16 paper4 m16",
    "linear bf16 paper4 m64",
    "linear fp16 paper4 m64 masked split",
)
FP8 = ("linear e4m3 paper4 m16", "linear e4m3 paper4 m64")


def sass(*lines, loop=None):
    """A disassembly, 16 bytes an instruction; ``loop``: the line that the last one branches to."""
    lines = [*lines, *([f"@P0 BRA 0x{16 * loop:x}"] if loop is not None else []), "EXIT"]
    text = [f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */" for i, line in enumerate(lines)]
    return "\n".join(
        ["        Function : kernel", *text, f"        /*{16 * len(lines):04x}*/  BRA 0x{16 * len(lines):x};"]
    )


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("IMAD.SHL.U32 R1, R2, 0x4, RZ", "integer"),
        ("LOP3.LUT R40, R4, 0xcc00cc00, RZ, 0xc0, !PT", "integer"),
        ("UIADD3.64 UR18, UR22, 0x2, URZ", "integer"),
        ("ULEA UR24, UR13, UR9, 0xe", "integer"),
        ("IADD3.X R89, R3, UR4, RZ, P2, !PT", "integer"),
        ("PRMT R1, R2, 0x5410, R3", "integer"),
        ("MOV R1, R2", "integer"),
        ("HMMA.16816.F32 R4, R8, R12, R4", "tensor"),
        ("HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR12], R24, gsb0", "tensor"),
        ("QGMMA.64x16x32.F32.E4M3.E4M3 R24, R40, gdesc[UR12], R24", "tensor"),
        ("UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR4]", "tensor"),
        ("LDGSTS.E.BYPASS.128 [R95], desc[UR20][R12.64], !P0", "global"),
        ("LDSM.16.M88.4 R4, [R68+UR25]", "shared"),
        ("LDL R4, [R1]", "local"),
        ("STL.64 [R1+0x8], R4", "local"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "convert"),
        ("FADD R1, R2, R3", "float"),
        ("HMUL2 R1, R2, R3", "float"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "other"),
        ("LDGDEPBAR", "other"),
        ("WARPGROUP.ARRIVE", "other"),
        ("DEPBAR.LE SB0, 0x5", "other"),
    ],
)
def test_classes_of_instructions(text, kind):
    assert static.kind(text) == kind


def test_multiply_adds_of_a_warp():
    assert static.multiply_adds("HMMA.16816.F32.BF16 R4") == 16 * 8 * 16
    assert static.multiply_adds("HMMA.1688.F32.TF32 R4") == 16 * 8 * 8
    assert static.multiply_adds("QMMA.16832.F32.E4M3.E4M3 R4") == 16 * 8 * 32
    assert static.multiply_adds("HGMMA.64x128x16.F32 R4") == 16 * 128 * 16
    assert static.multiply_adds("FFMA R1, R2, R3, R1") == 32
    assert static.multiply_adds("IMAD R1, R2, R3, R1") == 0


def test_the_main_loop():
    """The innermost loop with the products: not a waiting loop, not what surrounds it, not the kernel's end."""
    code = static.instructions(
        sass(
            "MOV R1, R2",
            "NANOSLEEP 0x1",
            "@!P1 BRA 0x10",  # waits
            "IADD3 R1, R1, 0x1, RZ",
            "HMMA.16816.F32 R4, R8, R12, R4",
            "@P0 BRA 0x30",  # the loop
            "FADD R1, R2, R3",
            loop=0,  # around all of it
        )
    )
    body = static.main_loop(code, lambda text: static.kind(text) == "tensor")
    assert [static.opcode(text) for text in body] == ["IADD3", "HMMA.16816.F32", "BRA"]
    none = static.main_loop(code, lambda text: False)
    assert len(none) == len(code)


@pytest.mark.parametrize("turns", [1, 2])
def test_instructions_a_weight(turns):
    """A loop that the compiler has unrolled decodes as many times more."""
    constants = {"BN": 16, "BM": 8, "BK": 16, "CODES": 1, "DOT": "fp16"}
    text = sass(*["LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT", "HMMA.16816.F32 R4, R8, R12, R4"] * turns, loop=0)
    found = static.describe(text, constants, warps=1)
    assert found["unrolled"] == turns
    # 16·16 weights by 32 threads: 8 for each.
    assert found["per_weight"] == pytest.approx({"integer": 1 / 8, "tensor": 1 / 8, "other": 1 / 8 / turns})
    assert found["tensor"] == {"HMMA": turns}
    assert found["tensor_anywhere"] == turns
    assert found["local"] == 0


def test_what_launches_know_of_arguments():
    types, attrs = static.attributes({"x": "*fp16", "BN": "constexpr", "words": "i32:16", "M": "i32"})
    assert types == {"x": "*fp16", "BN": "constexpr", "words": "i32", "M": "i32"}
    assert attrs == {(0,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}
    with pytest.raises(ValueError, match="M: expected a type, or one that ends with :16, got 'i32:8'"):
        static.attributes({"M": "i32:8"})


def row(**more):
    facts = {"DOT": "fp16", "SOURCE": "fp16", "BM": 16}
    found = {"name": KEY[0], "kernel": "linear_kernel", "sm": 90, "error": None, "facts": facts, "stack": 0, "local": 0}
    found |= {"shared": 1000, "tensor_memory": 0, "tensor": {"HGMMA": 4}, "per_weight": {"integer": 1.3}}
    found |= {"key": "0", "warps": 4, "registers": 100, "instructions": 10, "unrolled": 1, "tensor_anywhere": 4}
    return found | more


IEEE = {"facts": {"DOT": "fp32", "SOURCE": "fp16", "BM": 16}, "tensor": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "CompilationError: no"}, "does not compile: CompilationError"),
        ({"stack": 8}, "spills: 8 bytes of stack, 0 instructions"),
        ({"local": 3}, "spills: 0 bytes of stack, 3 instructions"),
        ({"shared": 240_000}, "shared memory: expected at most 232448 bytes, got 240000"),
        ({"shared": 110_000, "sm": 86, "tensor": {"HMMA": 1}}, "shared memory: expected at most 101376"),
        ({"tensor_memory": 544, "sm": 100, "tensor": {"UTCHMMA": 1}}, "tensor memory: expected at most 512 columns"),
        ({"tensor": {"HMMA": 4}}, "tensor cores: expected HGMMA"),
        ({"tensor": {}, "sm": 80}, "tensor cores: expected HMMA in the main loop, got none"),
        ({"per_weight": {"integer": 1.31}}, "integer instructions a weight: expected at most 1.3, got 1.31"),
        (IEEE, "tensor cores: expected none for float32, got 4"),
    ],
)
def test_problems(change, message):
    assert static.problems(row()) == []
    (found,) = static.problems(row(**change))
    assert message in found


def test_float32_products_that_are_tf32_may_be_tensor_cores():
    assert static.problems(row(**IEEE, tensor_anywhere=0)) == []
    tf32 = {"DOT": "fp32", "SOURCE": "fp16", "PRECISION": "tf32", "BM": 16}
    assert static.problems(row(kernel="linear_dx_kernel", facts=tf32)) == []


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_every_tile_that_select_can_return_is_compiled(sm):
    found = list(configurations(sm))
    assert len({each.name for each in found}) == len(found)
    compiled = list(static.wanted(found, sm))
    kernels = {"linear": "linear_kernel", "linear_dx": "linear_dx_kernel"}
    have = {
        (each.kernel.__name__, *(each.constexprs.get(n) for n in ("BN", "BM", "BK")), each.num_warps)
        for each in compiled
    }
    # Each tile with each value of what is in its loop, and sums that are parts; what is added behind the loop is all
    # there.
    variants: dict[tuple, set] = {}
    for each in compiled:
        if each.kernel.__name__ == "linear_kernel":
            c = each.constexprs
            tile = (c["DOT"], c["SOURCE"], c["CODES"], c["BN"], c["BM"], c["BK"], each.num_warps)
            variants.setdefault(tile, set()).add((c["MASKED"], c["SPLIT"]))
            assert c["HAS_SCALE"] == c["HAS_BIAS"] == (not c["SPLIT"])
    own = {"fp16": ("fp16", 4), "bf16": ("bf16", 4), "fp32": ("fp16", 4), "e4m3": ("e4m3", 2)}
    for tile, seen in variants.items():
        masked = max(v[0] for v in seen)  # which of 1 and 2 is linear.masks' matter
        assert masked == 2 or (masked == 1 and tile[2] != 3), tile
        if tile[1:3] == own[tile[0]]:
            assert seen >= set(itertools.product((0, masked), (False, True))), tile
    for key, by_rows in tiles.defaults(sm).items():
        op, dot = key.removesuffix(" ragged").split(maxsplit=1)
        if dot.startswith("e4m3") and sm < static.FIRST_E4M3:
            continue
        for tile in by_rows.values():
            assert (kernels[op], tile.bn, tile.bm, tile.bk, tile.warps) in have, (key, tile)
    convolutions = {
        (c["DOT"], c["BN"], c["BM"], c["BK"], each.num_warps, c["STAGES"], c["SPLIT"])
        for each in compiled
        if (c := each.constexprs) and each.kernel.__name__ == "conv2d_kernel"
    }
    for dot in ("fp16", "bf16", "fp32"):
        for tile, split in itertools.product(conv2d.tiles_of(dot), (False, True)):
            assert (dot, tile.bn, tile.bm, tile.bk, tile.warps, tile.stages, split) in convolutions


class Launches:
    """In the place of a module's kernel: what it is launched with, and nothing runs."""

    def __init__(self, monkeypatch):
        self.seen, self._patch = [], monkeypatch

    def of(self, module, *names):
        for name in names:
            self._patch.setattr(module, name, _Recorded(getattr(module, name), self.seen))


class _Recorded:
    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        return lambda *args, **named: self.seen.append((self.kernel.__name__, named))


# What makes other numbers of the same kernel, or adds what the compiled ones have.
NUMBERS = ("EXPONENT", "MAGNITUDES", "HAS_SCALE", "HAS_BIAS", "HAS_ROWS", "INTERPRETED")


def missing(seen, compiled):
    """The launches that no compiled configuration is, but for NUMBERS."""

    def facts(kernel, constants, warps, registers, names):
        return kernel, warps, registers, *((name, str(constants[name])) for name in sorted(names))

    options = ("num_warps", "num_stages", "maxnreg")
    names = {name: {n for n in named if n not in (*options, *NUMBERS)} for name, named in seen}
    have = {
        facts(each.kernel.__name__, each.constexprs, each.num_warps, each.registers, names[each.kernel.__name__])
        for each in compiled
        if each.kernel.__name__ in names
    }
    launched = {facts(name, n, n.get("num_warps", 4), n.get("maxnreg"), names[name]) for name, n in seen}
    return sorted(map(str, launched - have))


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_products_are_launched_as_they_are_compiled(sm, monkeypatch):
    """All that a launcher passes on: every tile, rows and K of all kinds; on sm_90 from the words of every format."""
    launches, compiled = Launches(monkeypatch), list(static.wanted(configurations(sm), sm))
    launches.of(linear, "linear_kernel", "reduce_kernel")
    launches.of(linear_dx, "linear_dx_kernel")
    launches.of(dense, "dense_kernel")
    monkeypatch.setattr(operands, "capability", lambda device: sm)
    monkeypatch.setattr(operands, "processors", lambda device: 132)
    formats = (Format(4), Format(4, "dense"), Format(5), Format(5, "dense")) if sm == 90 else (Format(4),)
    sizes = [(m, n, k) for m in (1, 17, 33, 65) for n in (48, 40) for k in (768, 1000, 1024, 2048, 3072, 2100)]
    for fmt, dtype, (m, n, k) in itertools.product(formats, DOT, [*sizes, (2048, 48, 1024)]):
        layout = slices.best(dtype, fmt)
        w, n1 = torch.empty(slices.shape(layout, n, k, fmt), dtype=torch.uint8), torch.zeros(n, 1, dtype=torch.int8)
        x, tail = torch.empty(m, k, dtype=dtype), (fmt.bits, fmt.levels, layout, "triton")
        linear.linear(x, w, n1, None, None, *tail)
        linear_dx.linear_dx(torch.empty(m, n, dtype=dtype), w, n1, None, k, *tail)
        dot, layout = linear_fp8.product_of(slices.E4M3 if slices.has(slices.E4M3, fmt) else layout, sm)
        w = torch.empty(slices.shape(layout, n, k, fmt), dtype=torch.uint8)
        if layout == layout_for(dot, fmt):
            x8 = x.to(torch.float8_e4m3fn if dot == "e4m3" else torch.float16)
            linear.multiply(x8, torch.zeros(m, dtype=torch.int32), w, n1, None, None, fmt, layout, dot, dtype)
    assert {name for name, _ in launches.seen} == {"linear_kernel", "reduce_kernel", "linear_dx_kernel", "dense_kernel"}
    assert missing(launches.seen, compiled) == []


def test_training_kernels_are_launched_as_they_are_compiled(monkeypatch):
    launches, compiled = Launches(monkeypatch), list(configurations(90))
    launches.of(partition, "count_digits", "sum_copies", "select_digit", "ties_before")
    launches.of(exponents, "tensor_exponents", "row_exponents")
    launches.of(quantize, "freeze_all", "freeze_above", "count_before", "freeze_ties")
    launches.of(masked_steps, "sgd_step", "adamw_step")
    for dtype, offset in itertools.product(tables.DTYPES, (0, 1)):
        w, grad, first, second = (
            torch.zeros(100 + offset, dtype=d)[offset:].view(4, 25) for d in (dtype, dtype, *[torch.float32] * 2)
        )
        mask, n1 = torch.zeros(13, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.int8)
        for fmt, random in itertools.product(
            (Format(4, granularity=g, exponent=e) for g in ("tensor", "channel") for e in ("max", "mse")), (False, True)
        ):
            for derive in (False, True):
                portion.freeze_portions_([w], [mask], [n1], [None], [5], derive, fmt, random, [0])
            partition.exponents_of([w], fmt)
            quantize.freeze_([w], [mask], [n1], torch.zeros(1, 2, dtype=torch.int64), [None], fmt, random, [0])
        for momentum, decay, nesterov, maximize, first_step in itertools.product(
            (0, 0.5), (0, 0.5), *[(False, True)] * 3
        ):
            numbers = (0.1, momentum, 0, decay, nesterov, maximize, first_step)
            masked_steps.masked_sgd_([w], [grad], [first], [mask], *numbers)
        for beta, maximize in itertools.product((0.2, 0.9), (False, True)):
            masked_steps.masked_adamw_([w], [grad], [first], [second], [mask], 0.1, beta, 0.9, 0.1, 1e-8, 1, maximize)
    assert len({name for name, _ in launches.seen}) == 12
    assert missing(launches.seen, compiled) == []


@pytest.fixture(scope="module")
def committed():
    """(path, table) of this version of Triton."""
    version = metadata.version("triton")
    path = static.folder(version) / "static.json"
    if not path.exists():
        pytest.skip(f"there is no committed table for Triton {version}")
    return path, static.read(path)


def test_the_committed_table_is_of_these_sources(committed):
    """Kernels that changed since have other machine code than it says."""
    assert static.changed(committed[1]) == [], "make static writes the table again"


def test_the_committed_table_is_whole(committed):
    """It has every configuration, as it is launched now, and keeps the budgets."""
    path, results = committed
    assert results["capabilities"] == list(CAPABILITIES)
    rows = {(each["name"], each["sm"]): each for each in results["rows"]}
    expected = {
        (each.name, sm): static.fingerprint(each)
        for sm in CAPABILITIES
        for each in static.wanted(configurations(sm), sm)
    }
    assert {key: each["key"] for key, each in rows.items()} == expected, "make static writes the table again"
    assert [f"{key}: {found}" for key, each in rows.items() for found in static.problems(each)] == []
    assert (path.parent / "static.md").read_text() == static.markdown(results)


def test_what_is_compiled_again_stands_for_all(committed):
    """Each kernel on each kind of GPU, in no more than CI has time for."""
    rows = committed[1]["rows"]
    chosen = static.extremes(rows)
    assert {(each["kernel"], each["sm"]) for each in chosen} == {(each["kernel"], each["sm"]) for each in rows}
    assert len(chosen) <= 250


def test_comments_make_no_table_old():
    code = "def f():\n    # why\n    return 1  # one\n"
    assert static._code(code) == static._code("def f():\n\n    return 1\n") != static._code(code.replace("1", "2"))


def test_key_configurations_keep_their_budgets():
    """Compiled afresh, in processes that interpret nothing."""
    exact = [(name, sm) for name in KEY for sm in (80, 90)] + [(name, 90) for name in FP8]
    found = {(each["name"], each["sm"]): each for each in static.compile_all((80, 90), exact=exact)}
    assert found.keys() == set(exact)
    assert [f"{key}: {problem}" for key, each in found.items() for problem in static.problems(each)] == []
    for sm in (80, 90):
        for name in KEY:
            each = found[name, sm]
            assert static.budget(each) == 1.3
            assert 0.8 < each["per_weight"]["integer"] <= 1.3
            assert each["tensor"].keys() == {"HGMMA" if sm == 90 else "HMMA"}
            assert each["per_weight"]["global"] < 0.3
    for name in FP8:
        fp8 = found[name, 90]
        assert 0.5 <= fp8["per_weight"]["integer"] <= static.budget(fp8) == 0.7
        assert fp8["tensor"].keys() == {"QGMMA"}


def test_the_command(tmp_path, capsys, monkeypatch):
    rows = [row()]
    monkeypatch.setattr(static, "compile_all", lambda capabilities, only, jobs: rows)
    assert main(["bench", "static", "--sm", "90", "--only", "m16", "--out", str(tmp_path)]) == 0
    assert static.read(tmp_path / "static.json")["rows"] == rows
    assert "| linear_kernel | fp16 |" in (tmp_path / "static.md").read_text()
    rows[0]["local"] = 2
    assert main(["bench", "static", "--out", str(tmp_path)]) == 1
    assert f"inq bench: {KEY[0]} on sm_90: spills: 0 bytes of stack, 2 instructions" in capsys.readouterr().err
    rows.clear()
    assert main(["bench", "static", "--only", "nothing", "--out", str(tmp_path)]) == 1
    assert "no configuration is like that" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_costs_no_time(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(static, "compile_all", lambda *a: asked.append(a) or [row()])
    (tmp_path / "file").write_text("")
    assert main(["bench", "static", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err
    assert not asked


def test_what_comes_out_is_compared_with_the_table(tmp_path, capsys, monkeypatch):
    made = [row()]
    results = {"schema": 2, "triton": "3", "capabilities": [90], "sources": static.sources(), "rows": made}
    static.write(tmp_path / "static.json", results)
    now = [row()]
    monkeypatch.setattr(static, "folder", lambda version: tmp_path)
    monkeypatch.setattr(static, "compile_all", lambda capabilities, only, jobs, exact: now)
    command = ["bench", "static", "--check", "--sm", "90"]
    assert main(command) == 0
    assert "1 of 1 kernels compiled again, 0 problems" in capsys.readouterr().out
    assert main([*command, "--only", KEY[0]]) == 0
    capsys.readouterr()
    assert main([*command, "--only", "nothing"]) == 1
    assert "no configuration is like that: see --only" in capsys.readouterr().err
    now[0]["registers"] = 101
    assert main(command) == 1
    assert f"{KEY[0]} on sm_90: registers 100 → 101" in capsys.readouterr().err
    now[0]["registers"] = 100
    results["sources"]["linear.py"] = "another"
    static.write(tmp_path / "static.json", results)
    assert main([*command, "--only", "nothing"]) == 1
    assert "linear.py: changed since the table was made" in capsys.readouterr().err
    assert main(command) == 1
    assert "inq bench: linear.py: changed since the table was made" in capsys.readouterr().err


def test_the_capabilities_are_those_of_the_tiles():
    assert tiles.CAPABILITIES == CAPABILITIES
