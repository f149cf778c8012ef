"""What products on a GPU should take: the arithmetic, and that docs/performance.md says what it says."""

import pytest
from inq_kernels.bench import model

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


def test_the_page_has_these_tables():
    text = model.PAGE.read_text()
    assert model.page(text) == text, "python -m inq_kernels.bench.model writes the tables again"
    assert "No GPU figure here has been measured" in text
