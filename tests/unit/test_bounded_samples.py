"""Samples of combined runs: whole while they are summed, bounded where they are solved with."""

import pytest
import torch
from helpers import randn, rel

from ssr_core import InputSample, SampleOptions
from ssr_core.refinement import refine
from ssr_core.sampling import bounded, joined

ROOM = SampleOptions().room(6)


@pytest.mark.parametrize(("width", "room"), [(1280, 4 * 1280), (1281, 1280)])
def test_wide_layers_keep_as_many_tokens_as_equations_and_narrow_ones_more(width, room):
    """In a layer of few inputs the equations are as many as these, whatever the number of tokens."""
    options = SampleOptions()
    assert options.room(width) == room
    assert options.shared_by(9, width).tokens == min(256, room // 9)
    assert [len(one.rows) for one in bounded([sample(0, room + 1, width)])] == [room]


def sample(seed, count, width=6):
    return InputSample(randn(seed, count, width), 1.0 + 4 * randn(seed + 50, count).abs().double())


def moment(one):
    return (one.rows * one.weights[:, None]).T @ one.rows / one.weights.sum()


def test_what_fits_is_untouched_and_what_does_not_stands_for_all():
    small, large = sample(0, 40), sample(1, ROOM)
    found = bounded([small, large])
    assert found[0] is small and len(found[1].rows) == ROOM // 2
    assert abs(float(found[1].weights.sum() / large.weights.sum()) - 1) < 1e-12
    assert rel(moment(found[1]), moment(large)) < 0.08  # the sampling error of 2560 tokens


def test_bounds_do_not_depend_on_the_order_of_the_runs():
    runs = [(sample(seed, ROOM // 2), 1.0 + seed) for seed in range(3)]
    one = bounded([joined(runs)])[0]
    nested = bounded([joined([(joined(runs[1:]), 1.0), runs[0]])])[0]
    assert torch.equal(one.rows, nested.rows) and rel(one.weights, nested.weights) < 1e-12


def test_refinement_solves_with_no_more_than_the_bound():
    samples = [sample(seed, ROOM) for seed in range(2)]
    basis, router, gram = randn(7, 4, 6), 0.5 * torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    found = refine(samples, basis, (2, 2), router, gram)
    expected = refine(bounded(samples), basis, (2, 2), router, gram)
    assert torch.equal(found.down, expected.down) and found.left_out == expected.left_out
