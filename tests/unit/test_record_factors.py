"""Factors of second moments against dense float64 references: exact where they claim to be, honest elsewhere."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import F64, randn, rel
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Attention, key_map, recorded_tasks, tokens

from ssr_core import CalibrationError, InputMoments, InputSample, RecordOptions, Target, record
from ssr_core.signals.budget import column_bytes, fit_budget
from ssr_core.signals.factor import InputFactor, factorise

D = 40


def rows(seed, count, width=D):
    return torch.linalg.qr(randn(seed, width, count))[0].T


def sketched(c, own, columns, tokens_=100.0):
    omega = torch.cat([own.T, randn(3, len(c), columns)], dim=1)
    return factorise(InputMoments(c @ omega, float(c.trace()), tokens_), omega, own)


def moments(seed, rate=0.85):
    x = tokens(seed, 120, D, rate)[0]
    return x.T @ x


@given(seed=st.integers(0, 50), columns=st.integers(1, 20), rank=st.integers(1, 6), rate=st.sampled_from([0.6, 0.9, 1]))
@settings(max_examples=40, deadline=None)
def test_own_rows_are_exact_and_the_rest_is_bounded(seed, columns, rank, rate):
    c, own, others = moments(seed, rate), rows(200 + seed, rank), rows(300 + seed, 5)
    factor = sketched(c, own, columns)
    stacked = torch.cat([others, own])
    found, truth = factor.gram_of(stacked, own), stacked @ c @ stacked.T
    assert rel(found[-rank:], truth[-rank:]) < 1e-6  # the guide: exact against rows that came later
    gap = c - factor.dense @ factor.dense.T
    scale = float(c.trace())
    assert float(torch.linalg.eigvalsh(gap).min()) > -1e-9 * scale
    assert float(gap.trace()) == pytest.approx(factor.rest, abs=1e-9 * scale)
    assert float(factor.gram_of(torch.eye(D, dtype=F64), own).trace()) == pytest.approx(scale)  # nothing is lost
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-9 * scale


def test_the_rest_is_spread_evenly_outside_the_own_rows():
    own, others = rows(1, 3), rows(2, 4)
    factor = InputFactor(torch.zeros(D, 0, dtype=F64), torch.zeros(0, dtype=F64), 0, 74.0, 1.0)
    outside = torch.eye(D, dtype=F64) - own.T @ own
    assert rel(factor.gram_of(others, own), 2.0 * others @ outside @ others.T) < 1e-12


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_moments_that_are_exact_stay_exact(rate):
    c, own, others = moments(5, rate), rows(6, 4), rows(7, 6)
    factor = factorise(InputMoments(c, float(c.trace()), 1.0), None, own)
    assert rel(factor.gram_of(others, own), others @ c @ others.T) < 1e-6
    assert factor.unknown < 1e-9


def test_a_sketch_as_wide_as_the_signal_is_exact():
    x = randn(8, 100, 10) @ randn(9, 10, D)
    c, others = x.T @ x, rows(11, 6)
    factor = sketched(c, rows(10, 4), 10)
    assert rel(factor.gram_of(others, rows(10, 4)), others @ c @ others.T) < 1e-6


def test_cutting_keeps_the_own_rows_exact_and_takes_the_least_first():
    c, own, others = moments(12), rows(13, 3), rows(14, 5)
    factor = sketched(c, own, 15)
    cut = factor.cut(factor.own + 4)
    assert rel(own @ cut.dense @ cut.dense.T, own @ c) < 1e-6 and cut.size == factor.own + 4
    later = factor.norms[factor.own :]
    assert bool((later.diff() <= 1e-9).all())
    assert float(cut.gram_of(others, own).trace()) <= float(c.trace())
    assert factor.cut(0).size == factor.own


def test_no_tokens_make_an_empty_factor():
    factor = factorise(InputMoments(torch.zeros(D, D, dtype=F64), 0.0, 0.0), None, rows(1, 2))
    assert factor.size == 0 and factor.unknown == 0
    assert bool((factor.gram_of(rows(2, 3), rows(1, 2)) == 0).all())


# ---------------------------------------------------------------- a budget


def factors(seed, widths=(10, 30)):
    found = {}
    for index, width in enumerate(widths):
        norms = torch.cat([torch.ones(1, dtype=F64), randn(seed + index, 4).abs().sort(descending=True)[0]])
        columns = torch.ones(width, 5, dtype=F64) / width**0.5
        found[Target(f"layer{index}")] = InputFactor(columns, norms, 1, 2 + float(norms.square().sum()), 1.0)
    return found


def kept_energy(layers):
    return sum(1 - one.unknown for one in layers.values())


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_is_spent_as_well_as_brute_force_spends_it(seed):
    layers = factors(seed, (20, 20))
    price = column_bytes(layers[Target("layer0")])
    for count in range(2, 11):
        budget = count * price + price // 2
        best = max(
            kept_energy({t: one.cut(size) for (t, one), size in zip(layers.items(), sizes, strict=True)})
            for sizes in product(range(1, 6), repeat=2)
            if sum(sizes) * price <= budget
        )
        assert kept_energy(fit_budget(layers, budget)) == pytest.approx(best, rel=1e-12)


def test_a_budget_is_kept_and_too_small_a_one_names_what_is_needed():
    layers = factors(3)
    used = {t: one.size for t, one in fit_budget(layers, 200).items()}
    assert sum(size * column_bytes(layers[t]) for t, size in used.items()) <= 200
    with pytest.raises(CalibrationError, match=r"set budget_mb to 8.8e-05") as caught:
        fit_budget(layers, 80)
    assert "own directions" in str(caught.value)
    assert {one.size for one in fit_budget(layers, 88).values()} == {1}
    assert fit_budget(layers, 0) == layers


def test_sampled_tokens_count_in_the_budget():
    sample = InputSample(torch.ones(5, 20), torch.ones(5))
    layers = {t: replace(one, sample=sample) for t, one in factors(3, (20, 20)).items()}
    price, tokens_ = column_bytes(layers[Target("layer0")]), 2 * 5 * (2 * 20 + 12)
    kept = fit_budget(layers, tokens_ + 5 * price)
    assert sum(one.size for one in kept.values()) == 5
    with pytest.raises(CalibrationError, match="sampled tokens"):
        fit_budget(layers, tokens_ + price)


def test_shared_layers_count_their_bytes_once_and_their_worth_for_each():
    a, b = factors(3, (20, 20)).values()
    shared = {Target("q"): a, Target("k"): a, Target("v"): a, Target("o"): b}
    price = column_bytes(a)
    a.norms[1:], b.norms[1:] = torch.tensor([0.5, 0.4, 0.3, 0.2]), torch.tensor([0.6, 0.1, 0.1, 0.1])
    shared = {t: replace(one, trace=2.0) for t, one in shared.items()}
    one = replace(a, trace=2.0)
    shared |= {Target(name): one for name in "qkv"}
    found = fit_budget(shared, 4 * price)
    assert found[Target("q")].size == 3, "worth counts once: o's second column would be taken first"
    assert found[Target("q")] is found[Target("v")]
    assert found[Target("q")].size + found[Target("o")].size == 4


# ---------------------------------------------------------------- from a pass


@pytest.mark.parametrize("limit", [0, 100])
def test_a_pass_is_recorded_with_the_lora_active_alone(limit):
    model, (one,) = Attention(), recorded_tasks(1)
    x = tokens(1)
    options = RecordOptions(columns=12, exact_limit=limit)
    found = record(model, one, key_map(), lambda tap: model(x), options)
    deltas = {target.module_path: layer.up @ layer.down for target, layer in one.adapter.layers.items()}
    seen = x[0].double()
    y = sum(seen @ (getattr(model, n).weight + deltas[n]).T + getattr(model, n).bias for n in "qkv")
    for name, inputs in (("k", seen), ("o", y)):
        own = torch.linalg.qr(one.adapter.layers[Target(name)].down.T)[0].T
        probe = torch.cat([own, rows(4, 3, 60)])
        found_gram, truth = found[Target(name)].gram_of(probe, own), (probe @ inputs.T) @ (probe @ inputs.T).T
        assert rel(found_gram[:3], truth[:3]) < 2e-3  # half precision
        assert rel(found_gram, truth) < (2e-3 if limit else 0.2)
        assert found[Target(name)].tokens == 200
    assert found[Target("q")] is found[Target("k")] is found[Target("v")] is not found[Target("o")]
    assert found[Target("q")].columns.dtype == torch.float16


def test_options_that_leave_nothing_are_refused():
    for bad in (
        {"columns": 0},
        {"exact_limit": -1},
        {"budget_mb": -1.0},
        {"budget_mb": float("nan")},
        {"sampled_tokens": -1},
    ):
        with pytest.raises(CalibrationError, match="no record"):
            RecordOptions(**bad)
