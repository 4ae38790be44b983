"""LoRAs that leave a calibration, and LoRAs that join it by records."""

from dataclasses import replace

import pytest
import torch
from helpers import randn, rel
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Attention, exact_calibration, record_all, recorded_tasks, smallest_eigenvalue, tokens

from ssr_core import IncompatibleError, RecordOptions, combine, extend, from_records, keep, without
from ssr_core.updates import _completed


def test_what_is_left_is_what_a_run_without_it_gives():
    model, tasks = Attention(), recorded_tasks(3)
    inputs = [[tokens(k)] for k in range(3)]
    whole = exact_calibration(model, tasks, inputs)
    for chosen in ([0, 2], [2, 1]):
        alone = exact_calibration(model, [tasks[i] for i in chosen], [inputs[i] for i in chosen])
        found = keep(whole, chosen)
        assert found.tasks == alone.tasks and found.stack_tasks == alone.stack_tasks
        for target, stats in alone.stats.items():
            assert rel(found.stats[target].gram, stats.gram) < 1e-12
            assert rel(found.signatures[target], alone.signatures[target]) < 1e-15
    assert without(whole, [1]).tasks == keep(whole, [0, 2]).tasks
    assert keep(whole, [1]).stats == {}
    for bad in ([], [0, 0], [3], [-1]):
        with pytest.raises(IncompatibleError, match="cannot be kept"):
            keep(whole, bad)


@pytest.mark.parametrize("columns", [1, 6, 40])
def test_a_lora_joins_by_records_and_what_was_exact_stays(tmp_path, columns):
    model, tasks = Attention(), recorded_tasks(3)
    inputs = [[tokens(k, rate=0.97)] for k in range(3)]
    whole = exact_calibration(model, tasks, inputs)
    old = exact_calibration(model, tasks[:2], inputs[:2])
    shares, _ = record_all(tmp_path, model, tasks, inputs, RecordOptions(columns=columns, exact_limit=0))
    guess = from_records(tasks, shares)
    found = extend(replace(old, model="model-id"), guess)
    gaps = {"guess": [], "found": []}
    for target, truth in whole.stats.items():
        mine = found.stats[target]
        assert rel(mine.gram[:2, :6, :6], truth.gram[:2, :6, :6]) < 1e-12  # as they were calibrated
        assert torch.equal(mine.gram[2], guess.stats[target].gram[2])
        for k in range(2):
            own = slice(3 * k, 3 * k + 3)
            assert rel(mine.gram[k][own], truth.gram[k][own]) < 5e-3  # the guide
            assert smallest_eigenvalue(mine.gram[k]) > -1e-6
            gaps["found"].append(rel(mine.gram[k], truth.gram[k]))
            gaps["guess"].append(rel(guess.stats[target].gram[k], truth.gram[k]))
    assert sum(gaps["found"]) < sum(gaps["guess"])


@given(seed=st.integers(0, 30), old=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_completion_is_the_truth_where_the_estimate_is_and_stays_positive(seed, old):
    z, other = randn(seed, 40, 8), randn(seed + 99, 40, 8)
    truth, guess = z.T @ z, other.T @ other
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:old]
    assert rel(_completed(truth, truth[rows][:, rows], rows), truth) < 1e-9
    mixed = _completed(guess, truth[rows][:, rows], rows)
    assert rel(mixed[rows][:, rows], truth[rows][:, rows]) < 1e-12 and smallest_eigenvalue(mixed) > -1e-12
    # the regression of the other rows on these is the estimate's own
    rest = torch.tensor([i for i in range(8) if i not in rows.tolist()])
    weights = [m[rest][:, rows] @ torch.linalg.inv(m[rows][:, rows]) for m in (mixed, guess)]
    assert rel(*weights) < 1e-9
    left = [m[rest][:, rest] - w @ m[rows][:, rows] @ w.T for m, w in zip((mixed, guess), weights, strict=True)]
    assert rel(*left) < 1e-9  # and so is what they leave over


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_a_calibration_whose_tokens_count_otherwise_is_extended_alike(tmp_path, weight):
    """Twice the tokens, twice the Gram: the new rows as well, and not the records' own weight there."""
    model, tasks = Attention(), recorded_tasks(3)
    inputs = [[tokens(k)] for k in range(3)]
    old = replace(exact_calibration(model, tasks[:2], inputs[:2]), model="model-id")
    heavy = combine([old], [weight])
    guess = from_records(tasks, record_all(tmp_path, model, tasks, inputs, RecordOptions(columns=6, exact_limit=0))[0])
    plain, found = extend(old, guess), extend(heavy, guess)
    for target, stats in plain.stats.items():
        for k in range(2):
            share = float(old.stats[target].tokens[k] / guess.stats[target].tokens[k])
            s, e = old.stats[target].gram[k].double(), guess.stats[target].gram[k].double() * share * weight
            a = e[6:, :6] @ torch.linalg.pinv(e[:6, :6], hermitian=True, rtol=1e-7)
            closed = a @ (weight * s) @ a.T + e[6:, 6:] - a @ e[:6, :6] @ a.T
            assert rel(found.stats[target].gram[k][6:, 6:], closed) < 1e-9
            assert rel(found.stats[target].gram[k], weight * stats.gram[k]) < 1e-9
            assert float(found.stats[target].tokens[k]) == weight * float(stats.tokens[k])


def test_what_cannot_be_extended_is_refused(tmp_path):
    model, tasks = Attention(), recorded_tasks(3)
    inputs = [[tokens(k)] for k in range(3)]
    shares, _ = record_all(tmp_path, model, tasks, inputs)
    old = replace(exact_calibration(model, tasks[:2], inputs[:2]), model="model-id")
    guess = from_records(tasks, shares)
    extend(old, guess)
    with pytest.raises(IncompatibleError, match="differ in: model"):
        extend(replace(old, model="other"), guess)
    with pytest.raises(IncompatibleError, match="seed 7 instead of 8"):
        extend(replace(old, settings={"seed": 8}), guess)
    with pytest.raises(IncompatibleError, match="no such LoRA"):
        extend(old, from_records(tasks[1:], shares[1:]))
    moved_ = replace(old, signatures={t: 2 * s for t, s in old.signatures.items()})
    with pytest.raises(IncompatibleError, match="other coordinates"):
        extend(moved_, guess)
