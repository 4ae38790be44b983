"""Products that are known to be symmetric, computed by halves."""

import pytest
from helpers import randn, rel

from ssr_core.triangles import symmetric_product


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300, 513])
def test_symmetric_products_equal_whole_ones(size):
    a = randn(size, 40, size)
    form = randn(3, 40, 40)
    form = form + form.T
    assert rel(symmetric_product(a, a), a.T @ a) < 1e-14
    assert rel(symmetric_product(a, form @ a), a.T @ form @ a) < 1e-13


def test_nothing_is_symmetric_too():
    assert symmetric_product(randn(1, 4, 0), randn(1, 4, 0)).shape == (0, 0)
