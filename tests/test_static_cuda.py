"""bench/static_cuda.py: the decoding of a main loop, counted by data flow."""

import pytest
from inq_kernels.bench import static_cuda

# A loop that loads a word, decodes it into the four registers of a product and multiplies it with two sets of tokens.
# The second product of each pair takes the same weights: they are decoded once. Addresses do not count.
LOOP = [
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
    "IADD3 R2, P0, R2, 0x200, RZ",
    "LOP3.LUT R8, R4, 0xcc00cc00, RZ, 0xc0, !PT",
    "IMAD.SHL.U32 R9, R4, 0x4, RZ",
    "LOP3.LUT R9, R9, 0xcc00cc00, RZ, 0xc0, !PT",
    "IMAD.SHL.U32 R10, R4, 0x100, RZ",
    "LOP3.LUT R10, R10, 0xcc00cc00, RZ, 0xc0, !PT",
    "IMAD.SHL.U32 R11, R4, 0x400, RZ",
    "LOP3.LUT R11, R11, 0xcc00cc00, RZ, 0xc0, !PT",
    "LDSM.16.M88.4 R16, [R30]",
    "HMMA.16816.F32 R20, R8, R16, R20",
    "HMMA.16816.F32 R24, R8, R18, R24",
]


def test_decoding_is_what_lies_between_loads_and_products():
    found = static_cuda.decoding(LOOP)
    assert found["instructions"] == 7
    assert found["weights"] == 8
    assert found["by_name"] == {"IMAD.SHL.U32": 3, "LOP3.LUT": 4}
    assert found["loads"] == {"LDG.E.128.CONSTANT": 1}
    assert static_cuda.per_two({"decoding": found}) == pytest.approx(1.75)


def test_a_pipeline_decodes_for_the_next_turn():
    """The products first: their weights are those of the turn before."""
    assert static_cuda.decoding([*LOOP[-2:], *LOOP[:-2]]) == static_cuda.decoding(LOOP)


def test_registers_of_a_load_are_all_its_own():
    body = [LOOP[0], "LOP3.LUT R8, R7, 0x1, RZ, 0xc0, !PT", "HMMA.16816.F32 R20, R8, R16, R20"]
    found = static_cuda.decoding(body)
    assert (found["instructions"], found["loads"]) == (1, {"LDG.E.128.CONSTANT": 1})


def test_weights_of_hopper():
    text = "HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0"
    assert static_cuda.weights_of(text) == [8, 9, 10, 11]
    assert static_cuda.weights_of("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT") == []
    assert static_cuda.decoding([text])["weights"] == 8
    assert static_cuda.decoding([text.replace("HGMMA.64x128x16", "QGMMA.64x128x32")])["weights"] == 16


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("LOP3.LUT P0, R9, R4, R5, RZ, 0xc0, !PT", [9]),
        ("IMAD.WIDE R12, R4, 0x4, R2", [12, 13]),
        ("LDS.128 R12, [R3+0x10]", [12, 13, 14, 15]),
        ("STS.128 [R3], R12", []),
        ("ISETP.GE.AND P0, PT, R3, R4, PT", []),
        ("LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64]", []),
        ("EXIT", []),
    ],
)
def test_what_an_instruction_writes(text, registers):
    assert static_cuda.defined(text) == registers


def row(**changed):
    decoding = {"instructions": 7, "weights": 8, "by_name": {}, "loads": {"LDS.128": 1}}
    copies = {"LDGSTS.E.BYPASS.128": 5, "LDGSTS.E": 1}
    fields = {"registers": 90, "stack": 0, "local": 0, "tensor": {"HMMA": 2}, "copies": copies, "loads": {}}
    return {"name": LINEAR, "sm": "80", **fields, "decoding": decoding} | changed


LINEAR = "linear_kernel<Plan<CodecOf<(Number)0, (Levels)0>, 16, false> >"
HOPPER = "hopper::linear_hopper_kernel<hopper::Shape<CodecOf<(Number)0, (Levels)0>, 1, 64> >"


def test_budgets():
    assert static_cuda.problems(row()) == []
    assert "spills: 8 bytes" in static_cuda.problems(row(stack=8))[0]
    slow = {"instructions": 9, "weights": 8, "by_name": {}, "loads": {}}
    assert "expected at most 2.0 instructions for two weights, got 2.25" in static_cuda.problems(row(decoding=slow))[0]
    bulk = {"UBLKCP.S.G": 3, "UTMALDG.2D": 1}
    assert static_cuda.problems(row(name=HOPPER, tensor={"HGMMA": 1}, copies=bulk)) == []
    e4m3 = row(name=HOPPER, tensor={"QGMMA": 1}, copies=bulk, decoding=slow | {"instructions": 5})
    assert "expected at most 1.0" in static_cuda.problems(e4m3)[0]
    name = "linear_kernel<Plan<CodecOf<(Number)1, (Levels)1>, 8, false> >"
    assert static_cuda.budget(row(name=name)) == static_cuda.BUDGET_LIFTED
    assert static_cuda.budget(row(name=name.replace("false", "true"))) == static_cuda.BUDGET_DX["bf16"]
    assert static_cuda.budget(row(name=name.replace("(Levels)1", "(Levels)2"))) == static_cuda.BUDGET
    assert "expected HGMMA" in static_cuda.problems(row(name=HOPPER))[0]
    none = row()["decoding"] | {"weights": 0}
    assert "found none in the main loop" in static_cuda.problems(row(decoding=none))[0]


def test_weights_move_by_128_bits():
    for load in ("LDG.E", "LDS.64"):
        narrow = row()["decoding"] | {"loads": {load: 1}}
        assert static_cuda.problems(row(decoding=narrow)) == [f"weights: expected loads of 128 bits, got {load}"]
    # Layout H's fifth word.
    fifth = row()["decoding"] | {"instructions": 4, "loads": {"LDS": 2, "LDS.128": 2}}
    h = row(name="hopper::linear_hopper_kernel<hopper::Shape<codec::H, 1, 64> >", tensor={"QGMMA": 4}, decoding=fifth)
    assert static_cuda.problems(h | {"copies": {"UBLKCP.S.G": 3, "UTMALDG.2D": 1}}) == []
    for copies in ({"LDGSTS.E.BYPASS.128": 4, "LDGSTS.E": 1}, {"LDGSTS.E.BYPASS.128": 5, "LDGSTS.E": 2}, {}):
        assert "expected 5 copies of 128 bits" in static_cuda.problems(row(copies=copies))[0]
    assert "expected bulk copies" in static_cuda.problems(row(name=HOPPER, tensor={"HGMMA": 1}))[0]
    plain = {"decoding": None, "tensor": {}, "copies": {}}
    assert static_cuda.problems(row(name="freeze<(DType)0, true>(KernelParams)", loads={"LDG.E.128": 4}, **plain)) == []
    for name in ("freeze<(DType)0, true>(KernelParams)", "decode_dense_kernel<CodecOf<(Number)0, (Levels)0> >"):
        assert (
            "expected loads of 128 bits"
            in static_cuda.problems(row(name=name, registers=32, loads={"LDG.E": 1}, **plain))[0]
        )


@pytest.mark.parametrize(("registers", "fit"), [(128, 2), (129, 1), (96, 2), (80, 3), (81, 2)])
def test_blocks_that_registers_leave_room_for(registers, fit):
    assert static_cuda.blocks_of_an_sm(row(registers=registers)) == (fit, 2)
    wrong = static_cuda.problems(row(registers=registers))
    assert bool(wrong) == (fit < 2)
    assert not wrong or "expected room for 2 blocks on an SM" in wrong[0]


def test_a_kernel_without_a_design_is_named():
    assert static_cuda.problems(row(name="new_kernel")) == ["registers: expected a line in DESIGN, found none"]


def test_a_committed_table_that_says_something_else_is_named():
    rows = [row(), row(sm="90a")]
    assert static_cuda.stale(rows, rows) == []
    other = [rows[0] | {"registers": 91}, rows[0] | {"sm": "120a"}]
    assert static_cuda.stale(rows, other) == [
        f"{LINEAR} on sm_90a: not in the committed table",
        f"{LINEAR} on sm_120a: in the committed table alone",
        f"{LINEAR} on sm_80: registers: the committed table has 91, got 90",
    ]
