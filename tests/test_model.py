"""What products on a GPU should take: the arithmetic, and that docs/performance.md says what it says."""

import pytest
from inq_kernels.bench import bars, model, shapes
from inq_kernels.bench.conv2d import Layer
from inq_kernels.triton_ops import tiles

from inq_kernels import Format

H100, H200 = model.GPUS


@pytest.mark.parametrize(
    ("bits", "dot", "megabytes", "us"),
    [(4, "bf16", 33.6, 7.0), (5, "bf16", 45.1, 9.4), (4, "e4m3", 33.6, 7.0)],
)
def test_few_rows_are_bound_by_reading_the_weights(bits, dot, megabytes, us):
    product = model.Product(8192, 8192, 1, Format(bits), dot)
    assert product.bytes / 1e6 == pytest.approx(megabytes, abs=0.1)
    assert product.floor(H200) * 1e6 == pytest.approx(us, abs=0.05)
    assert product.floor(H100) / product.floor(H200) == pytest.approx(4.8 / 3.35)


def test_many_rows_are_bound_by_the_product():
    product = model.Product(8192, 8192, 4096, Format(4))
    assert product.floor(H100) == product.floor(H200) == pytest.approx(2 * 8192 * 8192 * 4096 / 989e12)
    assert model.Product(8192, 8192, 4096, Format(4), "e4m3").floor(H200) == pytest.approx(
        product.floor(H200) / 2, 1e-3
    )


@pytest.mark.parametrize("m", model.MS)
@pytest.mark.parametrize("dot", ["bf16", "e4m3"])
def test_nothing_is_expected_below_its_floor(m, dot):
    found = model.instructions_a_weight()
    for gpu in model.GPUS:
        product = model.Product(4096, 28672, m, Format(4), dot)
        time, bound = product.expected(gpu, found)
        assert time > product.floor(gpu)
        assert bound


def test_a_convolution_of_one_pixel_s_window_is_a_product():
    """1×1: the same bytes and operations as ``linear`` with a row for each pixel."""
    layer = Layer(256, 1024, 1, 1, 14)
    convolution, product = model.Convolution(layer, 32), model.Product(256, 1024, 32 * 14 * 14, Format(4))
    assert convolution.bytes == product.bytes
    assert convolution.flops == product.flops
    assert convolution.floor(H200) == product.floor(H200)
    # A window of 3×3 reads x once as well, however often it is used.
    wide = model.Convolution(Layer(256, 1024, 3, 1, 14), 32)
    assert wide.flops == 9 * convolution.flops
    assert wide.bytes - wide.weight_bytes == convolution.bytes - convolution.weight_bytes


def test_convolutions_and_movers_are_not_expected_below_their_floors():
    found = model.instructions_an_element()
    assert set(found) == {layer[2] for layer in shapes.RESNET50_GPU}
    for gpu in model.GPUS:
        for layer in shapes.RESNET50_GPU:
            convolution = model.Convolution(Layer(*layer), 32)
            time, bound = convolution.expected(gpu, found)
            assert time > convolution.floor(gpu)
            assert bound
        for each in model.movers():
            assert each.expected(gpu)[0] > each.floor(gpu)


def test_bytes_of_movers():
    k, n = shapes.MAIN_GPU
    found = {(each.name, each.case): each for each in model.movers()}
    assert found["`prepack`", f"{k}×{n}, 4 bits, slices_e4m3"].bytes == n * k // 2 + n * k // 2
    assert found["`exponents`", f"{k}×{n}, float32, a tensor"].bytes == 4 * n * k
    assert found["`quantize_rows`", f"M = 64, K = {k}, bfloat16"].bytes == 64 * k * 3 + 4 * 64
    # KERNELS.md: four reads and one write of VGG-16's weights.
    assert found["`partition`", "VGG-16, float32"].bytes == 5 * 4 * 138_344_128


def test_the_bars_that_the_model_expects_to_be_missed_are_named():
    """Every bar of an H200 that is no other package's speed is judged, by its name and its limit."""
    judged = model.of_bars()
    peers = tuple(bars.H200_PEERS)
    asked = {bar.name: bar for bar in bars.BARS if bar.name.startswith("H200") and not bar.name.endswith(peers)}
    assert set(judged) == set(asked)
    for name, (value, limit, at_least, bound) in judged.items():
        assert (limit, at_least) == (asked[name].limit, asked[name].at_least)
        assert bound
        lines = [line for line in model.missed() if line.startswith(f"- {name}: ")]
        assert len(lines) == (value < limit if at_least else value > limit)


def test_every_column_of_the_instruction_table_is_some_tile_s():
    """A tile is compiled once, under the fewest rows it is for; e4m3 has no end where the library takes over."""
    lines = [line.split(" | ") for line in model.instructions().splitlines() if line.startswith("| ")]
    found = {(cells[0].strip("| "), cells[1]): cells[2:] for cells in lines[1:]}
    assert set(found) >= {("bf16", str(tiles.DENSE_ROWS - 1)), ("e4m3", "any")}
    assert ("e4m3", str(tiles.DENSE_ROWS - 1)) not in found
    assert all("–" not in " ".join(cells) for (dot, _), cells in found.items() if dot != "e4m3")


def test_the_page_has_these_tables():
    text = model.PAGE.read_text()
    assert model.page(text) == text, "python -m inq_kernels.bench.model writes the tables again"
    assert "No GPU figure here has been measured" in text
