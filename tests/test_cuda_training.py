"""The CUDA training kernels, run by the emulator, give the reference's bits, for one tensor and for many."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from support import FORMATS, WHICH, bits_to_weights, candidates, generator, kinds, random_masks, same_bits
from support_emulator import emulated, load, seeds
from test_masked_steps import ADAMW, SGD

import inq_kernels as inq
from inq_kernels import reference
from inq_kernels.reference import pack_bits, unpack_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ragged in bytes of a mask and in tiles of 256, of one chunk and of several.
SIZES = (1, 7, 31, 257, 100, 1000, 33, 1024, 3003, 512)
# The least chunk of partition's blocks: several for what the emulator can run.
CHUNK = 256
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_seeds = pytest.mark.parametrize("seed", seeds())


@pytest.fixture(scope="module")
def partition_library():
    return load("partition")


@pytest.fixture(scope="module")
def quantize_library():
    return load("quantize")


@pytest.fixture(scope="module")
def step_library():
    return load("masked_step")


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A tensor of a list: what is frozen, what is kept (None: all), how many weights are to freeze."""

    w: torch.Tensor
    mask: torch.Tensor
    keep: torch.Tensor | None
    count: int
    seed: int = 0

    def threshold(self, random):
        return reference.partition_threshold(self.w, self.mask, self.keep, self.count, random, self.seed)


def cases(dtype, seed=0, zeroed=False):
    """Every size, kinds of weights in turn, masks of every kind, counts from none to all, and an empty tensor."""
    out = []
    for i, size in enumerate(SIZES):
        name = list(kinds((1,), dtype))[(i * 7 + DTYPES.index(dtype) + 3 * seed) % 10]
        rows = {1000: 10, 3003: 3, 512: 512, 1024: 4}.get(size, size)
        w = kinds((rows, size // rows), dtype, seed=i)[name]
        mask, keep = random_masks(size, WHICH[(i + i // 5 + seed) % 5], seed=i)
        if zeroed and keep is not None:
            w = w * unpack_bits(keep, w.shape)
        total = candidates(mask, keep, size)
        out.append(Case(w, mask, keep, (total // 3, min(1, total), 0, total)[(i + seed) % 4], seed=i << 40 | i))
    out.insert(4, Case(torch.empty(0, 3, dtype=dtype), torch.empty(0, dtype=torch.uint8), None, 0))
    return out


def address(t):
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


class Table:
    """WeightTensor for each case, with everything on the device; ``offset``: bytes off alignment, in weights."""

    def __init__(self, device, some, chunk, chunks_of, capacity=None, offset=0, writable=False):
        place = device.inout if writable else device.input
        item = some[0].w.element_size()
        self.ws = [place(c.w, f"w[{i}]", offset * item) for i, c in enumerate(some)]
        self.masks = [place(c.mask, f"mask[{i}]", offset) for i, c in enumerate(some)]
        keeps = [device.input(c.keep, f"keep[{i}]", offset) for i, c in enumerate(some)]
        rows, self.chunks, self.rows = [], 0, 0
        for i, c in enumerate(some):
            n = c.w.shape[0]
            numel = c.w.numel()
            room = 0 if capacity is None else capacity(numel)
            listed = device.output((room,), torch.int32, f"list[{i}]")
            pointers = [address(t) for t in (self.ws[i], self.masks[i], keeps[i])]
            sizes = [numel, n, numel // n if n else 0, self.rows, self.chunks]
            rows.append([*pointers, *sizes, c.seed, c.count, address(listed), room])
            self.chunks += chunks_of(numel, chunk)
            self.rows += n
        self.count = len(some)
        self.address = device.input(torch.tensor(rows), "tensors").data_ptr()


def partition(
    library, some, seed, *, fmt=None, thresholds=True, random=False, chunk=CHUNK, offset=0, capacity=None, traffic=None
):
    """(thresholds or None, n1 or None) of the kernels; ``traffic``: a list that gets what they read and wrote."""
    with emulated(library, seed) as device:
        table = Table(device, some, chunk, library.chunks, capacity or library.list_capacity, offset)
        states = device.output((table.count * library.STATE_BYTES,), torch.uint8, "states")
        out = device.output((table.count, 2), torch.int64, "thresholds") if thresholds else None
        n1 = device.output((table.rows,), torch.int8, "n1") if fmt else None
        fmt = fmt or inq.Format(4)
        status = library.partition(
            tensors=table.address, tensor_count=table.count, chunk=chunk, chunks=table.chunks, rows=table.rows,
            states=states.data_ptr(), thresholds=address(out), n1=address(n1), bits=fmt.bits,
            dense=fmt.levels == "dense", dtype=DTYPES.index(some[0].w.dtype), random=random,
            channel=fmt.granularity == "channel", mse=fmt.exponent == "mse",
        )  # fmt: skip
        assert status == 0 or library._faults()
        if traffic is not None:
            traffic.append(device.traffic())
    if n1 is not None:
        n1 = [part.view(-1, 1) for part in n1.split([c.w.shape[0] for c in some])]
    return out, n1


def check_thresholds(got, some, random=False):
    for i, case in enumerate(some):
        expected = case.threshold(random)
        assert torch.equal(got[i], expected), (i, case.w.shape, case.count, got[i], expected)


def check_exponents(got, some, fmt):
    for i, case in enumerate(some):
        if case.w.numel():
            expected = reference.exponents(case.w, fmt)
            assert torch.equal(got[i], expected), (i, case.w.shape, fmt, got[i].T, expected.T)


# --- thresholds -------------------------------------------------------------------------------------------------------


@all_seeds
@dtypes
def test_thresholds_of_many_tensors(partition_library, dtype, seed):
    some = cases(dtype, seed)
    check_thresholds(partition(partition_library, some, seed, offset=seed % 2)[0], some)


@all_seeds
def test_thresholds_of_a_random_partition(partition_library, seed):
    some = cases(DTYPES[seed % 3], seed)
    check_thresholds(partition(partition_library, some, seed, random=True)[0], some, random=True)


@all_seeds
@pytest.mark.parametrize("room", [0, 1, 100])
def test_keys_that_the_list_has_no_room_for(partition_library, seed, room):
    some = [c for c in cases(torch.float32, seed) if c.w.numel() in (1000, 3003, 1024)]
    some.append(Case(torch.full((1, 700), 0.5), torch.zeros(88, dtype=torch.uint8), None, 300))
    check_thresholds(partition(partition_library, some, seed, capacity=lambda numel: room)[0], some)


@all_seeds
@pytest.mark.parametrize("rule", ["mse", "max"])
def test_no_room_and_weights_that_are_held(partition_library, seed, rule):
    """The reading that counts third digits counts, for n1, what the mask holds as well: here what is largest."""
    w = torch.randn(5, 600, generator=generator(seed))
    mask, _ = random_masks(w.numel(), "half", seed)
    w[unpack_bits(mask, w.shape)] *= 8
    none = torch.zeros_like(mask)
    some = [Case(w, mask, None, 700), Case(w, none, None, 900), Case(w[:1].clone(), mask[:75].clone(), None, 1)]
    for room in (0, 1 << 12):
        fmt = inq.Format(4, exponent=rule)
        out, n1 = partition(partition_library, some, seed, fmt=fmt, capacity=lambda numel, room=room: room)
        check_thresholds(out, some)
        check_exponents(n1, some, fmt)


@all_seeds
def test_a_long_list(partition_library, seed):
    # Tiles full of weights with the boundary's first digit: warps write their parts of the list more than once.
    g = generator(seed)
    w = torch.rand(2, 10001, generator=g) / 16 + 0.5
    w[:, ::5] = torch.randn(2, 2001, generator=g)
    mask, _ = random_masks(w.numel(), "half", seed)
    some = [Case(w, mask, None, candidates(mask, None, w.numel()) // 2)]
    got, _ = partition(partition_library, some, seed, chunk=1 << 14, capacity=lambda numel: numel)
    check_thresholds(got, some)


def test_impossible_counts_select_all_or_nothing(partition_library):
    w, mask = torch.tensor([[1.0, -3.0, 2.0]]), torch.tensor([1], dtype=torch.uint8)
    some = [Case(w, mask, None, 5), Case(w, mask, None, -2), Case(w, torch.full_like(mask, 7), None, 1)]
    got, _ = partition(partition_library, some, 0)
    everything, nothing = (reference.partition_threshold(w, mask, None, count) for count in (2, 0))
    assert torch.equal(got, torch.stack([everything, nothing, nothing]))


def test_a_chunk_of_full_size(partition_library):
    # Its counters hold as much as they can: all weights but one in one bin, with the largest sums.
    w = torch.full((1, 1 << 16), torch.nextafter(torch.tensor(0.5625), torch.tensor(0.0)).item())
    w[0, 777] = 3.0
    some = [Case(w, torch.zeros(1 << 13, dtype=torch.uint8), None, 40000)]
    fmt = inq.Format(4)
    got, n1 = partition(partition_library, some, 0, fmt=fmt, chunk=1 << 16)
    check_thresholds(got, some)
    check_exponents(n1, some, fmt)


# --- exponents --------------------------------------------------------------------------------------------------------


@all_seeds
@dtypes
def test_exponents_and_thresholds(partition_library, dtype, seed):
    some = cases(dtype, seed, zeroed=True)
    fmt = FORMATS[(DTYPES.index(dtype) * 3 + seed) % len(FORMATS)]
    got, n1 = partition(partition_library, some, seed, fmt=fmt)
    check_thresholds(got, some)
    check_exponents(n1, some, fmt)


@all_seeds
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_combination(partition_library, granularity, random, seed):
    some = cases(DTYPES[seed % 3], seed, zeroed=True)[2:8]
    fmt = inq.Format(3, "dense", granularity)
    got, n1 = partition(partition_library, some, seed, fmt=fmt, random=random)
    check_thresholds(got, some, random)
    check_exponents(n1, some, fmt)


@dtypes
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_exponents_alone(partition_library, granularity, dtype):
    # Each kind of weights, as a tensor or as a row.
    given = list(kinds((3, 111), dtype).values())
    if granularity == "channel":
        given = [torch.cat(given), kinds((1, 7), dtype)["normal"], kinds((2, 1500), dtype)["any"]]
    some = [Case(w, torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8), None, 0) for w in given]
    for fmt in FORMATS[DTYPES.index(dtype) :: 3]:
        for rule in ("max", "mse"):
            rule = inq.Format(fmt.bits, fmt.levels, granularity, rule)
            _, n1 = partition(partition_library, some, 0, fmt=rule, thresholds=False, chunk=512)
            check_exponents(n1, some, rule)


def test_exponents_of_a_long_row(partition_library):
    # More than one round of its histogram, and not at the begin of a tile.
    w = torch.randn(3, (1 << 15) + 1001, generator=generator(3))
    w[1, 30000] = 100
    # As many as move the least squared error, in the first round or in the last.
    w[2, :900] = 50
    w[0, -900:] = 50
    some = [Case(w, torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8), None, 0)]
    for rule in ("max", "mse"):
        fmt = inq.Format(4, granularity="channel", exponent=rule)
        check_exponents(partition(partition_library, some, 0, fmt=fmt, thresholds=False)[1], some, fmt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ties_and_subnormal_weights_of_the_mse_rule(partition_library, granularity, dtype):
    # At 2 bits n1 = 0 makes the errors 0 and 1/4 (0.5 becomes 1), n1 = −1 makes them 1/4 and 0.
    subnormal = [2.0**-125] + [-0.75 * 2.0**-126] * 5
    given = ([1.0, 0.5], [1.0, 0.5, 0.5], subnormal, subnormal[:3])
    some = [Case(torch.tensor([w]).to(dtype), torch.zeros(1, dtype=torch.uint8), None, 0) for w in given]
    _, n1 = partition(partition_library, some, 0, fmt=inq.Format(2, granularity=granularity), thresholds=False)
    assert [int(n) for n in n1] == [0, -1, -126, -125]


# --- freezing ---------------------------------------------------------------------------------------------------------


def freeze(library, some, n1s, thresholds, fmt, seed, *, random=False, offset=0, traffic=None):
    """(weights, masks, frozen counts) of the kernel."""
    with emulated(library, seed) as device:
        table = Table(device, some, library.CHUNK, library.chunks, offset=offset, writable=True)
        scratch = library.scratch_bytes(table.count, table.chunks)
        frozen = device.output((scratch // 8,), torch.int64, "frozen")
        n1 = device.input(torch.cat([n.view(-1) for n in n1s]), "n1")
        status = library.quantize_with_mask(
            tensors=table.address, tensor_count=table.count, chunks=table.chunks,
            thresholds=device.input(thresholds, "thresholds").data_ptr(), n1=n1.data_ptr(), frozen=frozen.data_ptr(),
            bits=fmt.bits, dense=fmt.levels == "dense", dtype=DTYPES.index(some[0].w.dtype), random=random,
        )  # fmt: skip
        assert status == 0 or library._faults()
        if traffic is not None:
            traffic.append(device.traffic())
    return table.ws, table.masks, frozen[: table.count]


def check_freezing(library, some, n1s, thresholds, fmt, seed, random=False, offset=0):
    ws, bits, frozen = freeze(library, some, n1s, thresholds, fmt, seed, random=random, offset=offset)
    for i, case in enumerate(some):
        w, mask = case.w.clone(), case.mask.clone()
        if w.numel():
            reference.quantize_with_mask_(w, mask, n1s[i], thresholds[i], case.keep, fmt, random, case.seed)
        assert same_bits(ws[i], w), i
        assert torch.equal(bits[i], mask), i
        assert int(frozen[i]) == int(unpack_bits(mask, (w.numel(),)).sum()), i


@all_seeds
@pytest.mark.parametrize("random", [False, True])
@dtypes
def test_freezing_many_tensors(quantize_library, dtype, random, seed):
    some = cases(dtype, seed)
    fmt = FORMATS[(DTYPES.index(dtype) * 2 + random + seed) % len(FORMATS)]
    rule = inq.Format(fmt.bits, granularity="channel")
    n1s = [reference.exponents(c.w, rule) if c.w.numel() else torch.empty(0, 1, dtype=torch.int8) for c in some]
    thresholds = torch.stack([c.threshold(random) for c in some])
    check_freezing(quantize_library, some, n1s, thresholds, fmt, seed, random, offset=seed % 2)


@all_seeds
@dtypes
def test_ties_across_chunks(quantize_library, dtype, seed):
    # Equal weights nearly everywhere: the boundary in the first, a middle or the last of several chunks.
    numel = 3 * quantize_library.CHUNK + 1003
    w = torch.tensor([0.5, -0.5, 0.25])[torch.randint(0, 3, (1, numel), generator=generator(7))].to(dtype)
    mask, _ = random_masks(numel, "half")
    total, n1 = candidates(mask, None, numel), torch.zeros(1, 1, dtype=torch.int8)
    few = torch.zeros((numel + 7) // 8, dtype=torch.uint8)
    sparse = torch.zeros(1, numel).to(dtype)
    sparse[0, [5, quantize_library.CHUNK + 3, numel - 7, numel - 1]] = 1.0
    some = [
        Case(w, mask, None, (total // 2, 1, total // 3)[seed % 3]),
        Case(sparse, few, None, 3),
        Case(w[:, : numel - 499].clone(), mask[: (numel - 499 + 7) // 8].clone(), None, total // 5),
    ]
    thresholds = torch.stack([c.threshold(False) for c in some])
    check_freezing(quantize_library, some, [n1] * 3, thresholds, inq.Format(4), seed)


@dtypes
def test_any_exponent_of_rows(quantize_library, dtype):
    # Rows shorter and longer than a tile, and every n1 that the dtype allows.
    lo, hi = reference.exponent_limits(dtype)
    g = generator(2)
    shapes = [(hi - lo + 1, 21), (3, 2500), (4, 700)]
    n1s = [torch.arange(lo, hi + 1), torch.tensor([-3, 0, 5]), torch.tensor([1, -7, 3, 0])]
    n1s = [n.to(torch.int8).view(-1, 1) for n in n1s]
    some = []
    for shape in shapes:
        w = bits_to_weights(torch.randint(-(1 << 31), 1 << 31, shape, generator=g), dtype)
        # Half of them subnormal, or nearly.
        w[:, ::2] = kinds(shape, dtype)["subnormal"][:, ::2]
        some.append(Case(w, torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8), None, 0))
    everything = torch.tensor([[-1, 0]] * 3)
    for fmt in FORMATS[DTYPES.index(dtype) :: 3]:
        ws, _, frozen = freeze(quantize_library, some, n1s, everything, fmt, 0)
        assert frozen.tolist() == [c.w.numel() for c in some]
        for got, case, n1 in zip(ws, some, n1s, strict=True):
            assert same_bits(got, reference.quantize(case.w, n1, fmt)), fmt


# --- what it costs ----------------------------------------------------------------------------------------------------


def readings(partition_library, quantize_library, case, fmt, derive, random):
    """How often a portion reads and writes its weight: (partition's readings, the freezing kernel's, writes)."""
    bytes_ = case.w.numel() * case.w.element_size()
    counted = []
    got, n1 = partition(
        partition_library, [case], 0, fmt=fmt if derive else None, random=random, traffic=counted, chunk=1 << 12
    )
    check_thresholds(got, [case], random)
    if derive:
        check_exponents(n1, [case], fmt)
    else:
        n1 = [reference.exponents(case.w, fmt)]
    freeze(quantize_library, [case], n1, got, fmt, 0, random=random, traffic=counted)
    return *(of["w[0]"][0] / bytes_ for of in counted), counted[1]["w[0]"][1] / bytes_


@pytest.mark.parametrize("derive", [True, False], ids=["first portion", "later one"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("held", [False, True], ids=["", "some frozen"])
@pytest.mark.parametrize("values", ["normal", "alike", "equal"])
@pytest.mark.parametrize(("dtype", "random"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_four_readings_and_one_write(
    partition_library, quantize_library, dtype, random, values, held, granularity, derive
):
    """Of weights of any kind: where most have one first digit, the list of keys has no room for them."""
    shape, g = (4, 1 << 12), generator(5)
    w = torch.randn(shape, generator=g)
    w = {"normal": w, "alike": 0.5 + w.abs().clamp(max=4) / 80, "equal": torch.full(shape, -0.3)}[values].to(dtype)
    mask = random_masks(w.numel(), "half" if held else "none")[0]
    count = candidates(mask, None, w.numel()) // 2
    fmt = inq.Format(4, granularity=granularity)
    read, freezing, written = readings(
        partition_library, quantize_library, Case(w, mask, None, count, 3), fmt, derive, random
    )
    assert read + freezing <= 4
    assert written <= 1
    if random:
        # Ranks are hashes of places: weights are read for n1 alone.
        assert read == derive
    elif not held:
        overflows = dtype == torch.float32 and values != "normal"
        assert read == 2 + (overflows or (derive and granularity == "channel"))
    assert freezing == 1


# --- optimizer steps --------------------------------------------------------------------------------------------------

STEP_SIZES = (7, 65, 8, 1024, 1030, 1, 8192 + 300, 0)
STATES = {"sgd": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


def step_case(dtype, seed):
    """Parameters, gradients, and what is held: nothing, some of it, all of it; state beside them."""
    g = generator(seed)
    params, grads = ([torch.randn(n, generator=g).to(dtype) for n in STEP_SIZES] for _ in range(2))
    firsts, seconds = ([torch.randn(n, generator=g) for n in STEP_SIZES] for _ in range(2))
    held = [torch.rand(n, generator=g) < (0, 0.5, 1, 0.9)[(i + seed) % 4] for i, n in enumerate(STEP_SIZES)]
    # Runs of frozen ones, which are not read.
    held[4][256:700] = True
    return params, grads, firsts, [s.abs() for s in seconds], held


def rounded_sgd(p, g, buffer, n):
    """One step in float32 with each operation rounded by itself, n as masked_sgd's arguments: (p, buffer)."""
    f = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    w, d = p.float(), -g.float() if n["maximize"] else g.float()
    if n["weight_decay"]:
        d = d + f(n["weight_decay"]) * w
    if n["momentum"]:
        if n["first_step"]:
            buffer = d
        else:
            left = f(n["momentum"]) * buffer
            buffer = left + f(1 - n["dampening"]) * d
        d = d + f(n["momentum"]) * buffer if n["nesterov"] else buffer
    return (w + f(-n["lr"]) * d).to(p.dtype), buffer


def rounded_adamw(p, g, m, v, n):
    f = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    beta1, beta2 = n["beta1"], n["beta2"]
    w, d = p.float(), -g.float() if n["maximize"] else g.float()
    m = d - (d - m) * f(beta1) if f(1 - beta1) >= 0.5 else m + f(1 - beta1) * (d - m)
    v = v * f(beta2) + f(1 - beta2) * d * d
    # torch's own square root of float32 is not the nearest one everywhere.
    denominator = v.double().sqrt().float() * f(1 / (1 - beta2 ** n["step"]) ** 0.5) + f(n["eps"])
    move = f(-n["lr"] / (1 - beta1 ** n["step"])) * m / denominator
    return (w * f(1 - n["lr"] * n["weight_decay"]) + move).to(p.dtype), m, v


def run_steps(library, name, dtype, numbers, seed, offset):
    params, grads, firsts, seconds, held = step_case(dtype, seed)
    has_first, has_second = name == "adamw" or numbers["momentum"] != 0, name == "adamw"
    item = params[0].element_size()
    with emulated(library, seed) as device:
        place = lambda ts, what, size: [device.inout(t, f"{what}[{i}]", size) for i, t in enumerate(ts)]  # noqa: E731
        ws = place(params, "w", offset * item)
        gs = [device.input(t, f"grad[{i}]", offset * item) for i, t in enumerate(grads)]
        ms = place(firsts, "first", offset * 4) if has_first else [None] * len(ws)
        vs = place(seconds, "second", offset * 4) if has_second else [None] * len(ws)
        bits = [device.input(pack_bits(h), f"mask[{i}]", offset) if h.any() else None for i, h in enumerate(held)]
        rows, chunks = [], 0
        for w, *others in zip(ws, gs, ms, vs, bits, strict=True):
            rows.append([address(w), *map(address, others), w.numel(), chunks])
            chunks += library.chunks(w.numel(), library.CHUNK)
        table = device.input(torch.tensor(rows), "tensors")
        function = library.masked_sgd if name == "sgd" else library.masked_adamw
        more = {"has_momentum": has_first} if name == "sgd" else {}
        status = function(
            tensors=table.data_ptr(), tensor_count=len(ws), chunks=chunks, dtype=DTYPES.index(dtype), **more, **numbers
        )
        assert status == 0 or library._faults()
    for i, (p, g, m, v, h) in enumerate(zip(params, grads, firsts, seconds, held, strict=True)):
        if name == "sgd":
            new = rounded_sgd(p, g, m, numbers)
        else:
            new = rounded_adamw(p, g, m, v, numbers)
        for old, wanted, got, what in zip(
            (p, m, v), new, (ws[i], ms[i], vs[i]), ("w", "first", "second"), strict=False
        ):
            if got is not None:
                assert same_bits(got, torch.where(h, old, wanted)), (name, what, i, numbers)


@pytest.mark.parametrize(("dtype", "options"), list(itertools.product(DTYPES, SGD)), ids=str)
def test_sgd(step_library, dtype, options):
    numbers = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False, **options}
    for seed in seeds():
        run_steps(step_library, "sgd", dtype, {"lr": 0.1, **numbers, "first_step": seed % 2 == 0}, seed, seed % 2)


@pytest.mark.parametrize(("dtype", "options"), list(itertools.product(DTYPES, ADAMW)), ids=str)
def test_adamw(step_library, dtype, options):
    numbers = {"weight_decay": 1e-2, "eps": 1e-8, "maximize": False, **options}
    beta1, beta2 = numbers.pop("betas", (0.9, 0.999))
    for seed in seeds():
        run_steps(
            step_library, "adamw", dtype, {"lr": 0.01, "beta1": beta1, "beta2": beta2, "step": 1 + 6 * seed, **numbers},
            seed, seed % 2,
        )  # fmt: skip
