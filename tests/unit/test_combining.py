"""Sums of calibrations, and LoRAs that leave or join: properties of the algebra, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers import F64, LAYER, conflicting_tasks, randn, rel
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import (
    Attention,
    exact_calibration,
    recorded_tasks,
    tokens,
)

from ssr_core import (
    Calibration,
    GramStats,
    HeldOut,
    IncompatibleError,
    InputSample,
    SampleOptions,
    SSRMerge,
    Target,
    build_stacks,
    combine,
    keep,
    load_calibration,
    merge,
    records_of,
    save_calibration,
)
from ssr_core.triangles import pack

OUT, IN, RANK = 7, 12, 3
TASKS = conflicting_tasks(3, OUT, IN, RANK)
(STACK,) = build_stacks(TASKS)


def made(seed, order=(0, 1, 2), prompts=None, model="m", dtype=F64):
    """A calibration of the three LoRAs with random statistics, the LoRAs in any order."""
    tasks = [replace(TASKS[i], prompts=(prompts or "p",)) for i in order]
    (stack,) = build_stacks(tasks)
    grams, held = [], []
    for i in order:
        index = torch.cat([torch.arange(RANK * j, RANK * (j + 1)) for j in order])
        z = (randn(100 * seed + i, 30, 3 * RANK) * (1 + seed))[:, index]
        grams.append(z.T @ z)
        held.append(z[: 4 + i].T @ z[: 4 + i])
    counts = torch.tensor([30.0 + i + seed for i in order], dtype=F64)
    bad = torch.tensor([seed * (i + 1) for i in order])
    samples = tuple(InputSample(randn(900 * seed + i, 4, IN), torch.ones(4, dtype=F64)) for i in order)
    apart = HeldOut(pack(torch.stack(held).to(dtype)), torch.tensor([4.0 + i for i in order], dtype=F64))
    stats = GramStats(torch.stack(grams).to(dtype), counts, bad, stack.basis_ranks, samples, apart)
    return Calibration(
        records_of(tasks),
        {LAYER: stats},
        {LAYER: stack.tasks},
        model,
        {"seed": seed, "padding": "balance", "width": 64},
        {LAYER: stack.signature},
    )


def close(a, b, tolerance=1e-12):
    assert a.tasks == b.tasks and a.settings == b.settings and dict(a.stack_tasks) == dict(b.stack_tasks)
    for target in a.stats:
        x, y = a.stats[target], b.stats[target]
        assert x.gram.dtype == y.gram.dtype == F64 and rel(x.gram, y.gram) < tolerance
        assert rel(x.tokens, y.tokens) < tolerance and torch.equal(x.nonfinite, y.nonfinite)
        assert x.held is not None and y.held is not None and x.held.packed.dtype == F64
        assert rel(x.held.packed, y.held.packed) < tolerance and rel(x.held.tokens, y.held.tokens) < tolerance
        assert x.samples is not None and y.samples is not None
        for mine, theirs in zip(x.samples, y.samples, strict=True):
            assert torch.equal(mine.rows, theirs.rows) and rel(mine.weights, theirs.weights) < tolerance


ORDERS = st.permutations([0, 1, 2]).map(tuple)
WORDS = st.sampled_from(["p", "a", "z"])


@given(orders=st.lists(ORDERS, min_size=3, max_size=3), words=st.lists(WORDS, min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_combining_is_associative_and_commutative(orders, words):
    a, b, c = (made(i + 1, order, word) for i, (order, word) in enumerate(zip(orders, words, strict=True)))
    flat = combine([a, b, c])
    close(flat, combine([combine([a, b]), c]))
    close(flat, combine([a, combine([b, c])]))
    close(flat, combine([c, a, b]))
    close(combine([a, b]), combine([b, a]))


@given(weights=st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=2, max_size=2), outer=st.sampled_from([0.5, 2.0]))
@settings(max_examples=20, deadline=None)
def test_weights_multiply(weights, outer):
    a, b = made(1), made(2)
    inner = combine([a, b], weights)
    found = combine([inner, made(3)], [outer, 1.0])
    close(found, combine([a, b, made(3)], [outer * weights[0], outer * weights[1], 1.0]))
    assert float(inner.stats[LAYER].tokens[0]) == 31 * weights[0] + 32 * weights[1]
    for part in (lambda stats: stats.gram, lambda stats: stats.held_out().gram, lambda stats: stats.fitted().gram):
        grams = [part(one.stats[LAYER]) for one in (a, b)]
        assert rel(part(inner.stats[LAYER]), weights[0] * grams[0] + weights[1] * grams[1]) < 1e-12


def test_float32_statistics_add_up_in_float64():
    parts = [made(i, dtype=torch.float32) for i in (1, 2, 3)]
    close(combine([combine(parts[:2]), parts[2]]), combine([parts[0], combine(parts[1:])]))


def test_runs_made_apart_equal_one_run_over_all_tokens(tmp_path):
    model, tasks = Attention(), recorded_tasks(2)
    apart = [[[tokens(10 * run + k)] for k in range(2)] for run in range(2)]
    together = exact_calibration(model, tasks, [apart[0][k] + apart[1][k] for k in range(2)])
    runs = []
    for number, inputs in enumerate(apart):
        path = tmp_path / f"{number}.calibration.safetensors"
        save_calibration(replace(exact_calibration(model, tasks, inputs), settings={"seed": number}), path)
        runs.append(load_calibration(path))
    whole = combine(runs)
    assert whole.stats[Target("q")].samples is None
    for target, stats in together.stats.items():
        assert rel(whole.stats[target].gram, stats.gram) < 1e-12
    save_calibration(whole, tmp_path / "whole.calibration.safetensors")
    again = load_calibration(tmp_path / "whole.calibration.safetensors")
    results = [merge(tasks, SSRMerge(), one).layers for one in (together, again)]
    for target, layer in results[0].items():
        assert rel(results[1][target].delta(), layer.delta()) < 1e-9


def test_a_saved_run_keeps_its_prompts_and_joins_a_sum_with_them(tmp_path):
    """One file after another: each run's own prompts are known afterwards, not only all of them together."""
    words, loaded = ("a fox", "tea | two cups", "größer"), []
    for seed, word in enumerate(words):
        save_calibration(made(seed, prompts=word), tmp_path / f"{seed}")
        loaded.append(load_calibration(tmp_path / f"{seed}"))
        assert [one.prompts for one in loaded[-1].tasks] == [(word,)] * 3
    save_calibration(combine(loaded), tmp_path / "whole")
    whole = load_calibration(tmp_path / "whole")
    assert [one.prompts for one in whole.tasks] == [tuple(sorted(words))] * 3
    close(whole, combine([made(seed, prompts=word) for seed, word in enumerate(words)]))
    found = {
        run["settings"]["seed"]: {tuple(prompts) for _, prompts in run["prompts"]} for run in whole.settings["runs"]
    }
    assert found == {seed: {(word,)} for seed, word in enumerate(words)}


def test_sampled_inputs_stay_with_their_runs_and_weights(tmp_path):
    model, tasks = Attention(), recorded_tasks(2)
    runs = []
    for run in range(2):
        inputs = [[tokens(10 * run + k)] for k in range(2)]
        runs.append(replace(exact_calibration(model, tasks, inputs, SampleOptions(16)), settings={"seed": run}))
    whole = combine(runs, [1.0, 3.0])
    save_calibration(whole, tmp_path / "c")
    loaded = load_calibration(tmp_path / "c")
    for target, stats in whole.stats.items():
        for k in range(2):
            parts = [one.stats[target].samples[k] for one in runs]
            x, both = stats.samples[k], torch.cat([one.rows for one in parts])
            shares = [one.weights * 200 / one.weights.sum() for one in parts]  # 200 tokens each
            weights = torch.cat([shares[0], 3 * shares[1]])
            assert len(x.rows) == 32 and rel(x.weights.sum(), torch.tensor(200.0 + 3 * 200)) < 1e-6
            assert rel(x.rows.T * x.weights @ x.rows, both.T * weights @ both) < 1e-12
            assert torch.equal(loaded.stats[target].samples[k].rows, x.rows)
        apart, whole_held = [one.stats[target].held_out() for one in runs], stats.held_out()
        assert rel(whole_held.gram, apart[0].gram + 3 * apart[1].gram) < 1e-12
        assert rel(whole_held.tokens, apart[0].tokens + 3 * apart[1].tokens) < 1e-12
        fitted = [one.stats[target].fitted() for one in runs]
        assert rel(stats.fitted().gram, fitted[0].gram + 3 * fitted[1].gram) < 1e-12
        assert [len(one.rows) for one in stats.fitted().samples] == [
            sum(len(one.samples[k].rows) for one in fitted) for k in range(2)
        ]
    unheld = replace(runs[1], stats={t: replace(s, held=None) for t, s in runs[1].stats.items()})
    assert all(stats.held is None for stats in combine([runs[0], unheld]).stats.values())
    mixed = combine([runs[0], replace(runs[1], stats={t: replace(s, samples=None) for t, s in runs[1].stats.items()})])
    assert all(stats.samples is None for stats in mixed.stats.values())


def test_a_prompt_leaves_by_weight_and_comes_by_a_run_of_its_own():
    one, other = made(1, prompts="a"), made(2, prompts="b")
    both = combine([one, other])
    assert both.tasks[0].prompts == ("a", "b")
    left = combine([one, other], [1.0, 0.0])
    assert left.tasks[0].prompts == ("a",)
    assert rel(left.stats[LAYER].gram, one.stats[LAYER].gram) < 1e-15


def test_a_run_of_one_lora_only_adds_its_prompt():
    """The others have no tokens and no prompts in it."""
    extra = made(2, prompts="b")
    stats, only = extra.stats[LAYER], torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    stats = replace(stats, gram=stats.gram * only[:, None, None], tokens=stats.tokens * only)
    tasks = (extra.tasks[0], *(replace(one, prompts=()) for one in extra.tasks[1:]))
    whole = combine([made(1), replace(extra, stats={LAYER: stats}, tasks=tasks)])
    assert [one.prompts for one in whole.tasks] == [("b", "p"), ("p",), ("p",)]
    assert rel(whole.stats[LAYER].gram[1:], made(1).stats[LAYER].gram[1:]) < 1e-15
    assert rel(whole.stats[LAYER].gram[0], made(1).stats[LAYER].gram[0] + extra.stats[LAYER].gram[0]) < 1e-12


def stronger(calibration):
    return replace(calibration, tasks=(replace(calibration.tasks[0], strength_model=0.5), *calibration.tasks[1:]))


def moved(calibration):
    return replace(calibration, signatures={LAYER: calibration.signatures[LAYER] * 1.5})


def elsewhere(calibration):
    stats = calibration.stats[LAYER]
    return replace(calibration, stats={Target("x"): stats}, stack_tasks={Target("x"): calibration.stack_tasks[LAYER]})


def narrower(calibration):
    stats = calibration.stats[LAYER]
    return replace(calibration, stats={LAYER: replace(stats, ranks=(RANK - 1, RANK, RANK + 1))})


MISMATCHED = {
    "model": (lambda: made(2, model="other"), "the model"),
    "strength": (lambda: stronger(made(2)), "task0 is only in the first; task0 is only in number 2"),
    "fewer": (lambda: keep(made(2), [0, 1]), "task2 is only in the first"),
    "basis": (lambda: moved(made(2)), "other coordinates"),
    "layers": (lambda: elsewhere(made(2)), "the layers that the LoRAs share"),
    "ranks": (lambda: narrower(made(2)), "other ranks"),
    "twice": (lambda: made(1), r"same run is in it twice \(seed 1\)"),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_what_does_not_fit_is_refused_with_what_differs(name):
    make, words = MISMATCHED[name]
    with pytest.raises(IncompatibleError, match=words):
        combine([made(1), make()])
    if name not in ("twice", "ranks"):
        with pytest.raises(IncompatibleError):
            combine([make(), made(1)])


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(IncompatibleError, match="weights"):
        combine([made(1), made(2)], weights)
    with pytest.raises(IncompatibleError, match="at least one"):
        combine([])
