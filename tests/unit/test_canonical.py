"""The coordinates that statistics are kept in: unique, orthonormal, independent of the file's order."""

import pytest
import torch
from helpers import F64, linear64, lora, randn, rel, task, task_tokens
from torch import nn

from ssr_core import (
    LoRALayer,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    load_calibration,
    merge,
    save_calibration,
)
from ssr_core.canonical import balance, effective_directions, row_basis


def gram_schmidt(rows):
    basis = []
    for row in rows:
        for one in basis:
            row = row - (row @ one) * one
        for one in basis:  # twice is enough
            row = row - (row @ one) * one
        basis.append(row / row.norm())
    return torch.stack(basis)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_basis_is_that_of_gram_schmidt_and_so_unique(rank):
    down = randn(rank, rank, 9)
    basis, mix = row_basis(down)
    assert rel(basis, gram_schmidt(down)) < 1e-12
    assert rel(mix @ basis, down) < 1e-14
    assert bool((mix.diagonal() > 0).all()) and torch.equal(mix, mix.tril())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e5, 1e8])
def test_coordinates_of_a_float32_file_are_as_good_as_float64_ones_would_be(condition):
    """Below float64 well-conditioned rows take another way; all of it stays far under float32's rounding."""
    left, right = torch.linalg.qr(randn(1, 6, 6)).Q, torch.linalg.qr(randn(2, 40, 6)).Q
    spread = torch.logspace(0, -1, 6, base=condition, dtype=F64)
    down = ((left * spread) @ right.T).float()
    basis, mix = row_basis(down)
    assert rel(mix @ basis, down) < 1e-14
    assert (basis @ basis.T - torch.eye(6, dtype=F64)).abs().max() < 1e-8
    assert rel(basis, gram_schmidt(down.double())) < 1e-8
    assert bool((mix.diagonal() > 0).all()) and torch.equal(mix, mix.tril())


def test_triangular_changes_of_the_rows_keep_the_basis():
    down = randn(1, 4, 9)
    change = randn(2, 4, 4).tril(-1) + torch.diag(torch.tensor([0.1, 2.0, 30.0, 0.5], dtype=F64))
    assert rel(row_basis(change @ down).basis, row_basis(down).basis) < 1e-10


def test_more_rows_than_columns():
    down = randn(3, 7, 4)
    basis, mix = row_basis(down)
    assert basis.shape == (4, 4) and rel(mix @ basis, down) < 1e-13
    assert (basis @ basis.T - torch.eye(4, dtype=F64)).abs().max() < 1e-13


def test_effective_directions_span_what_up_acts_on():
    up = randn(4, 6, 2) @ randn(5, 2, 5)  # rank 2 in five coordinates
    directions = effective_directions(up)
    assert directions.shape == (5, 2)
    assert rel(up @ directions @ directions.T, up) < 1e-12
    assert torch.equal(effective_directions(randn(6, 6, 5)), torch.eye(5, dtype=F64))


def test_balance_of_zero_rows_and_columns():
    down, up = randn(7, 3, 5), randn(8, 4, 3) * 100
    down[0], up[:, 1] = 0, 0
    even_down, even_up = balance(down, up)
    assert rel(even_up @ even_down, up @ down) < 1e-14
    assert torch.equal(even_down[0], down[0]) and torch.equal(even_up[:, 1], up[:, 1])
    assert float(even_down[2].norm()) == pytest.approx(float(even_up[:, 2].norm()), rel=1e-14)


def test_statistics_fit_whatever_the_order_of_the_layers_in_the_file():
    slices = [Target("qkv", (4 * i, 4)) for i in range(3)]
    split = {target: lora(i, 4, 7, 2) for i, target in enumerate(slices)}
    turned = dict(reversed(split.items()))
    fused = task("fused", {Target("qkv"): LoRALayer(randn(8, 2, 7), randn(9, 12, 2))})
    root = nn.ModuleDict({"qkv": linear64(7, 12)})
    first, second = ([task("split", layers), fused] for layers in (split, turned))
    calibration = calibrate(root, first, build_stacks(first), lambda index, tap: root["qkv"](task_tokens(index, 40, 7)))
    answers = [merge(tasks, SSRMerge(), calibration).layers[Target("qkv")].delta() for tasks in (first, second)]
    assert rel(answers[1], answers[0]) < 1e-12


def test_dependent_rows_get_no_coordinate_of_their_own():
    """QR alone fills them with noise, which shifts the rows after them: not the same on two machines."""
    good = randn(11, 3, 9)
    down = torch.stack([good[0], torch.zeros(9, dtype=F64), 2 * good[0], good[1], good[0] - good[1], good[2]])
    basis, mix = row_basis(down)
    assert rel(basis, gram_schmidt(good)) < 1e-12
    assert rel(mix @ basis, down) < 1e-13
    empty = row_basis(torch.zeros(2, 9, dtype=F64))
    assert empty.basis.shape == (0, 9) and empty.mix.shape == (2, 0)


def test_sparse_rows_lose_nothing_beside_a_dependent_one():
    """Axis-aligned rows: QR's arbitrary direction for a dependent row may be a later row's own."""
    axes = torch.eye(5, dtype=F64)
    generator = torch.Generator().manual_seed(5)
    cases = [axes[[0, 0, 1]], torch.cat([torch.zeros(1, 5, dtype=F64), axes[:2]])]
    cases += [torch.randint(-1, 2, (4 + n % 5, 5), generator=generator).to(F64) for n in range(300)]
    for down in cases:
        basis, mix = row_basis(down)
        assert basis.shape[0] == torch.linalg.matrix_rank(down)
        assert (mix @ basis - down).abs().max() < 1e-12
        assert (basis @ basis.T - torch.eye(len(basis), dtype=F64)).norm() < 1e-12


def test_a_layer_of_zeros_merges_and_its_calibration_can_be_kept(tmp_path):
    layers = [lora(1, 5, 8, 2), lora(2, 5, 8, 2), LoRALayer(torch.zeros(2, 8, dtype=F64), randn(3, 5, 2))]
    tasks = [task(f"t{k}", layer) for k, layer in enumerate(layers)]
    model = nn.ModuleDict({"layer": linear64(8, 5)})
    calibration = calibrate(
        model, tasks, build_stacks(tasks), lambda index, tap: model["layer"](task_tokens(index, 30, 8))
    )
    save_calibration(calibration, tmp_path / "c")
    merged = merge(tasks, SSRMerge(), load_calibration(tmp_path / "c")).layers[Target("layer")].delta()
    assert rel(merged, merge(tasks, SSRMerge(), calibration).layers[Target("layer")].delta()) < 1e-12
    assert 0.1 < float(merged.norm() / (layers[0].delta() + layers[1].delta()).norm()) < 2
