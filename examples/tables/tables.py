"""One function for each table, from the results of all jobs. Less is better everywhere but in ratios; differences are
taken within a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from . import paper
from .intervals import Estimate, estimate, paired
from .jobs import LANGUAGE_MODEL
from .methods import METHODS, TERNARY_PORTIONS
from .networks import NETWORKS

TITLES = {LANGUAGE_MODEL: "language model"} | {name: network.title for name, network in NETWORKS.items()}
# What begins a column of differences.
MINUS = "− "


@dataclass(frozen=True)
class Rows:
    """The results of a run: ``jobs`` of its results.json."""

    by_name: Mapping[tuple[str, str], Sequence[dict]]

    @classmethod
    def of(cls, jobs: Sequence[dict]) -> Rows:
        """By network and method, seeds ascending."""
        by_name: dict[tuple[str, str], list[dict]] = {}
        for job in sorted(jobs, key=lambda job: job["seed"]):
            by_name.setdefault((job["network"], job["method"]), []).append(job)
        return cls(by_name)

    def networks(self, *methods: str) -> list[str]:
        """Those that have results of all these methods."""
        return [net for net in TITLES if all((net, method) in self.by_name for method in methods)]

    def values(self, network: str, method: str) -> list[float]:
        """What was measured, seed by seed."""
        return [job["value"] for job in self.by_name[network, method]]

    def mean(self, network: str, method: str) -> Estimate:
        """Of ``values``."""
        return estimate(self.values(network, method))

    def minus(self, network: str, method: str, other: str) -> Estimate:
        """``method`` − ``other``."""
        return paired(self.values(network, method), self.values(network, other))

    def sizes(self, network: str, method: str, way: str, what: str) -> list[float]:
        """A number of ``methods._size``, seed by seed."""
        return [job["sizes"][way][what] for job in self.by_name[network, method]]

    def times_smaller(self, network: str, method: str, way: str) -> str:
        """How many times smaller than float32 the whole file is, on average."""
        return f"{estimate(self.sizes(network, method, way, 'ratio')).mean:.1f}×"


@dataclass(frozen=True)
class Claim:
    """What is claimed, of one network here: the difference is expected to be below 0 (``sign`` −1), above (1), or not
    above it ("as good as", 0)."""

    text: str
    network: str
    difference: Estimate
    sign: int

    def seen(self) -> str:
        """What the 95 % interval says about it."""
        if self.difference.half is None:
            return "no interval"
        found = self.difference.sign()
        if self.sign == 0:
            return {1: "no: worse", 0: "not told apart", -1: "yes: better"}[found]
        return "not told apart" if found == 0 else "yes" if found == self.sign else "no: the other way round"


@dataclass(frozen=True)
class Table:
    """A table of the page. ``paper`` marks its columns of the paper's numbers, which are of ImageNet."""

    title: str
    note: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    claims: list[Claim] = field(default_factory=list)


def _errors(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}".replace("-", "−")


def of_paper(network: str) -> tuple[str, ...]:
    """Those of the paper's networks that it stands for."""
    return NETWORKS[network].of_paper if network in NETWORKS else ()


def _name(network: str) -> str:
    return TITLES[network]


def digits_of(network: str) -> int:
    """Decimals: bits a byte differ less than errors in percent."""
    return 4 if network == LANGUAGE_MODEL else 2


def t1(rows: Rows) -> Table:
    """float32 to 5 bits."""
    lines, claims = [], []
    for net in rows.networks("inq-5", "float32", "longer"):
        start, long = rows.minus(net, "inq-5", "float32"), rows.minus(net, "inq-5", "longer")
        cells = [rows.mean(net, method).text() for method in ("float32", "longer", "inq-5")]
        theirs = [
            f"{name}: {_errors(paper.T1[name][0])} → {_errors(paper.T1[name][1])}" for name in NETWORKS[net].of_paper
        ]
        lines.append((_name(net), *cells, start.text(signed=True), long.text(signed=True), "; ".join(theirs)))
        claims.append(Claim("T1: INQ at 5 bits is as good as float32", net, start, 0))
        claims.append(Claim("T1: INQ at 5 bits is as good as float32 trained as long", net, long, 0))
    headers = (
        *("network", "float32", "float32, trained as long", "INQ, 5 bits", f"INQ {MINUS}float32"),
        *(f"INQ {MINUS}float32 trained as long", "paper, ImageNet: reference → INQ"),
    )
    note = (
        "Formats as in the paper: its levels, one exponent a layer, from the largest weight; for all networks the "
        "portions that it has for ResNet-18."
    )
    return Table("T1: from full precision to 5 bits", note, headers, lines, claims)


def t2(rows: Rows) -> Table:
    """Which weights freeze first."""
    lines, claims = [], []
    for bits, method in ((5, "inq-5"), (2, "inq-2-mse")):
        random = f"{method}-random"
        for net in rows.networks(method, random):
            better = rows.minus(net, method, random)
            cells = [rows.mean(net, each).text(digits_of(net)) for each in (random, method)]
            theirs = bits == 5 and "ResNet-18" in of_paper(net)
            numbers = [_errors(paper.T2[how]) if theirs else "" for how in ("random", "magnitude")]
            lines.append((_name(net), str(bits), *cells, better.text(digits_of(net), signed=True), *numbers))
            claims.append(Claim(f"T2: largest first is as good as random, {bits} bits", net, better, 0))
    headers = (
        *("network", "bits", "random", "largest first", f"largest first {MINUS}random"),
        *("paper, ResNet-18 on ImageNet: random", "paper: largest first"),
    )
    note = (
        "The paper has 5 bits alone. At 2 bits, where more can be lost, it is T4's INQ with an exponent a layer by "
        "`mse`, with its portions and learning rate."
    )
    return Table("T2: the partition", note, headers, lines, claims)


# The title, and the row of the paper's table.
T3_ROWS = {
    "float32": ("32", 32),
    **{f"inq-{bits}": (str(bits), bits) for bits in (5, 4, 3, 2)},
    "inq-2-mse": ("2, `mse`", None),
}


def t3(rows: Rows) -> Table:
    """Bit-widths."""
    nets, lines, claims = rows.networks(*T3_ROWS), [], []
    for method, (title, bits) in T3_ROWS.items() if nets else ():
        cells = []
        for net in nets:
            mean = rows.mean(net, method).text()
            if method != "float32":
                difference = rows.minus(net, method, "float32")
                mean += f" ({difference.text(signed=True)})"
                if method in ("inq-4", "inq-3"):
                    claims.append(Claim(f"T3: {bits} bits are as good as float32", net, difference, 0))
            cells.append(mean)
        lines.append((title, *cells, _errors(paper.T3.get(bits))))
    headers = ("bits", *map(_name, nets), "paper, ResNet-18 on ImageNet")
    note = (
        f"In brackets: {MINUS}float32, paired. The same number of further steps at every bit-width, in the paper's 4, "
        "6, 8 and 10 portions, so the fewer bits, the shorter each portion; n1 from the largest weight, as the paper "
        "has it: at 2 bits all weights below a third to two thirds of the largest are 0 then. The last row has n1 by "
        "`mse`, and T4's portions and learning rate."
    )
    return Table("T3: bit-widths", note, headers, lines, claims)


@dataclass(frozen=True)
class Ternary:
    """A row of T4. ``beside``: TWN and BWN of as many layers, where it is INQ."""

    title: str
    beside: tuple[str, str] | None = None
    of_paper: str = ""


T4_ROWS = {
    "float32": Ternary("float32"),
    "longer": Ternary("float32, trained as long"),
    "bwn": Ternary("BWN, first and last layer float", of_paper="BWN"),
    "twn": Ternary("TWN, first and last layer float", of_paper="TWN"),
    "inq-2-mse-channel-ends": Ternary("INQ ternary, an exponent a channel, first and last layer float", ("twn", "bwn")),
    "bwn-all": Ternary("BWN, all layers"),
    "twn-all": Ternary("TWN, all layers"),
    "inq-2-mse-channel": Ternary("INQ ternary, an exponent a channel, all layers", ("twn-all", "bwn-all")),
    "inq-2-mse": Ternary("INQ ternary, an exponent a layer, all layers", ("twn-all", "bwn-all"), "INQ"),
}


def t4(rows: Rows) -> Table:
    """Ternary INQ beside TWN and BWN."""
    lines, claims = [], []
    for net in rows.networks(*T4_ROWS):
        digits = digits_of(net)
        for method, row in T4_ROWS.items():
            beside = [rows.minus(net, method, other) for other in row.beside or ()]
            ratio = "" if method in ("float32", "longer") else rows.times_smaller(net, method, "packed")
            differences = [each.text(digits, signed=True) for each in beside] or ["", ""]
            theirs = _errors(paper.T4[row.of_paper]) if row.of_paper and "ResNet-18" in of_paper(net) else ""
            lines.append((_name(net), row.title, rows.mean(net, method).text(digits), *differences, ratio, theirs))
            # On the language model, where more can be lost, INQ is claimed to be better, with ends like theirs.
            better = net == LANGUAGE_MODEL and method == "inq-2-mse-channel-ends"
            for other, each in zip(("TWN", "BWN"), beside, strict=False):
                text = f"T4: {row.title} is {'better than' if better else 'as good as'} {other}"
                claims.append(Claim(text, net, each, -1 if better else 0))
    headers = (
        *("network", "weights", "result", f"INQ {MINUS}TWN", f"INQ {MINUS}BWN", "smaller, packed"),
        "paper, ResNet-18 on ImageNet",
    )
    note = (
        "INQ at 2 bits, exponents by `mse`, in the portions "
        f"{', '.join(f'{portion:g}' for portion in TERNARY_PORTIONS)}. TWN and BWN are published with float first and "
        "last layers; the paper's INQ quantizes all layers and is compared with them. Here INQ stands beside TWN and "
        "BWN of as many layers. TWN has one float factor a layer, BWN one a filter, INQ a power of two a layer or a "
        "channel, counted as a byte a channel in both cases, as its files hold it."
    )
    return Table("T4: ternary weights", note, headers, lines, claims)


T5_METHODS = (
    ("Deep Compression, P+Q, 8/5 bits", "dc-8-5", "P+Q"),
    ("Deep Compression, P+Q+H, 8/5 bits", "dc-8-5", "P+Q+H"),
    ("Deep Compression, P+Q+H, 4/2 bits", "dc-4-2", "P+Q+H"),
    *((f"DNS + INQ, {bits} bits", f"dns-inq-{bits}", "coded") for bits in (5, 4, 3)),
    *((f"DNS + INQ, {bits} bits, stored as Deep Compression's", f"dns-inq-{bits}", "relative") for bits in (5, 4, 3)),
)


def t5(rows: Rows) -> Table:
    """DNS + INQ beside Deep Compression."""
    lines, claims = [], []
    for net in rows.networks(*dict.fromkeys(method for _, method, _ in T5_METHODS)):
        kept = estimate([100 * job["fraction"] for job in rows.by_name[net, "dns"]])
        for title, method, way in T5_METHODS:
            ratios = [
                estimate(rows.sizes(net, method, way, what)).text(1)
                for what in ("ratio", "weight_ratio", "streams_ratio")
            ]
            size = estimate(rows.sizes(net, method, way, "bytes")).mean
            decrease = paired(rows.values(net, "float32"), rows.values(net, method))
            ratio, errors = paper.T5.get(title, ("", None)) if net == "lenet-5" else ("", None)
            cells = (rows.mean(net, method).text(), decrease.text(signed=True), f"{size:.0f}", *ratios)
            lines.append((_name(net), title, kept.text(1), *cells, ratio, _errors(errors)))
        # Few bits beside few bits, too.
        for bits, theirs in ((5, "8/5"), (4, "8/5"), (3, "8/5"), (3, "4/2")):
            ours, other = f"dns-inq-{bits}", f"dc-{theirs.replace('/', '-')}"
            more = paired(rows.sizes(net, ours, "coded", "ratio"), rows.sizes(net, other, "P+Q+H", "ratio"))
            what = f"T5: DNS + INQ, {bits} bits:"
            claims.append(Claim(f"{what} higher ratio than Deep Compression, {theirs}", net, more, 1))
            claims.append(Claim(f"{what} as good as Deep Compression, {theirs}", net, rows.minus(net, ours, other), 0))
    headers = (
        *("network", "method", "weights kept, %", "error", "decrease in error", "bytes", "ratio, whole file"),
        *("ratio, weights alone", "ratio, codes and indices alone", "paper, AlexNet on ImageNet: ratio"),
        "paper: decrease in error",
    )
    note = (
        "Deep Compression keeps as many weights of each layer as DNS kept with the same seed, and has the best "
        "index bits of 2 to 8 for each layer. INQ has n1 by `mse`. DNS + INQ as `inq.save(compress=True)` stores "
        "its codes; and again with relative indices and Huffman codes, as Deep Compression's are stored, which "
        "shows what the coder does. All bytes are of one meter. On networks this small, codebooks, names and what "
        "stays float weigh much: the last ratio leaves them out."
    )
    return Table("T5: pruned, quantized, coded", note, headers, lines, claims)


EXTENSION = {
    "inq-5": "5 bits, paper levels, an exponent a layer",
    "inq-5-channel": "5 bits, paper levels, an exponent a channel",
    "inq-4-dense": "4 bits, dense levels, an exponent a layer",
    "inq-4-dense-channel": "4 bits, dense levels, an exponent a channel",
    "inq-2-mse": "2 bits, `mse`, an exponent a layer",
    "inq-2-mse-channel": "2 bits, `mse`, an exponent a channel",
}


def extension(rows: Rows) -> Table:
    """What no table of the paper has: dense levels, exponents a channel."""
    lines, claims = [], []
    for net in rows.networks(*EXTENSION):
        for method, title in EXTENSION.items():
            other = "inq-2-mse" if method.startswith("inq-2") else "inq-5"
            difference = "" if method == other else rows.minus(net, method, other).text(signed=True)
            ratios = [rows.times_smaller(net, method, way) for way in ("packed", "coded")]
            lines.append((_name(net), title, rows.mean(net, method).text(), difference, *ratios))
        dense = rows.minus(net, "inq-4-dense", "inq-5")
        claims.append(Claim("Extension: dense levels at 4 bits are as good as paper levels at 5", net, dense, 0))
        channel = rows.minus(net, "inq-2-mse-channel", "inq-2-mse")
        claims.append(Claim("Extension: an exponent a channel is as good as one a layer, 2 bits", net, channel, 0))
    headers = (
        *("network", "weights", "error", f"{MINUS}an exponent a layer, paper levels"),
        *("smaller, packed", "smaller, entropy coded"),
    )
    note = "5 and 4 bits against 5 bits with paper levels and an exponent a layer, 2 bits against an exponent a layer."
    return Table("Beyond the paper: dense levels, exponents a channel", note, headers, lines, claims)


def methods_of(network: str) -> list[str]:
    """What the tables need of a network."""
    if network == LANGUAGE_MODEL:
        return [*T4_ROWS, "inq-2-mse-random"]
    pruning = set() if NETWORKS[network].pruned else {"dns", "dc-prune", *(method for _, method, _ in T5_METHODS)}
    return [method for method in METHODS if method not in pruning]


TABLES: dict[str, Callable[[Rows], Table]] = {"T1": t1, "T2": t2, "T3": t3, "T4": t4, "T5": t5, "extension": extension}


def made(jobs: Sequence[dict]) -> list[Table]:
    """The tables that the jobs of a results.json have rows for."""
    rows = Rows.of(jobs)
    return [table for make in TABLES.values() if (table := make(rows)).rows]
