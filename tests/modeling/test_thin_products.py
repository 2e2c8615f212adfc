"""Products with few rows on the CPU: every way gives the same, and the fastest is taken."""

import time
from contextlib import nullcontext

import pytest
import torch

from ett.modeling_ett import thin_products
from ett.modeling_ett.thin_products import ThinProducts


@pytest.fixture
def layer():
    torch.manual_seed(0)
    for known in (ThinProducts.fastest, ThinProducts._seconds):
        known.clear()
    yield torch.nn.Linear(512, 1024).requires_grad_(False)
    for known in (ThinProducts.fastest, ThinProducts._seconds):
        known.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 8])
def test_every_way_to_multiply_gives_the_same(layer, num_rows, dtype):
    rows, weight = torch.randn(num_rows, 512).to(dtype), layer.weight.to(dtype)
    expected = rows.float() @ weight.float().T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for way in thin_products.ways_for(num_rows, dtype):
        torch.testing.assert_close(way(rows, weight).float(), expected, rtol=tolerance, atol=tolerance)


def test_after_trying_each_the_fastest_way_is_taken(layer, monkeypatch):
    taken = []

    def make_way(name, seconds):
        def way(rows, weight):
            time.sleep(seconds)
            taken.append(name)
            return rows @ weight.T

        return way

    ways = make_way("slow", 0.02), make_way("fast", 0.0)
    monkeypatch.setattr(thin_products, "ways_for", lambda num_rows, dtype: ways)
    x = torch.randn(2, 1, 512)
    with torch.no_grad(), ThinProducts():
        products = [layer(x) for _ in range(10)]
    assert taken == ["slow", "fast"] * 3 + ["fast"] * 4
    for product in products:
        torch.testing.assert_close(product, x @ layer.weight.T + layer.bias, rtol=0, atol=1e-5)


def test_where_results_have_to_be_reproducible_nothing_is_tried(layer):
    torch.use_deterministic_algorithms(True)
    try:
        assert isinstance(thin_products.thin_products(2, layer.weight), nullcontext)
    finally:
        torch.use_deterministic_algorithms(False)
    assert isinstance(thin_products.thin_products(2, layer.weight), ThinProducts)


def test_where_the_usual_way_is_the_fastest_functions_are_not_looked_at(layer):
    key = (2, *layer.weight.shape, layer.weight.dtype, torch.get_num_threads())
    ThinProducts.fastest[key] = torch.nn.functional.linear
    assert isinstance(thin_products.thin_products(2, layer.weight), nullcontext)
    assert isinstance(thin_products.thin_products(8, layer.weight), ThinProducts)
    ThinProducts.fastest[key] = thin_products.weight_first
    assert isinstance(thin_products.thin_products(2, layer.weight), ThinProducts)


def test_a_module_of_small_matrices_has_nothing_to_choose_for(layer):
    assert thin_products.has_large_matrices(torch.nn.Sequential(torch.nn.Linear(24, 40), layer))
    assert not thin_products.has_large_matrices(torch.nn.Linear(24, 40))


def test_small_matrices_and_many_rows_are_multiplied_as_always(layer):
    with torch.no_grad(), ThinProducts():
        for _ in range(20):
            torch.nn.Linear(24, 40)(torch.randn(2, 24))
            layer(torch.randn(33, 512))
    assert not ThinProducts.fastest and not ThinProducts._seconds
