"""Comparisons have the numbers of each method alone; methods are read from lines as people write them."""

import math

import pytest
from helpers import LAYER, calibrated, conflicting_tasks, deltas_of, linear64, lora, output_error, task, task_tokens
from torch import nn

from ssr_core import (
    METHODS,
    AverageMerge,
    IncompatibleError,
    NPLoRAMerge,
    PaperMerge,
    SSRMerge,
    SumMerge,
    Target,
    build_stacks,
    calibrate,
    compare,
    merge,
    parse_method,
)
from ssr_core.compare import Comparison, Row

OUT, IN = 7, 10
TASKS = conflicting_tasks(2, OUT, IN, 3, seed=12)
TOKENS = [task_tokens(k, 70, IN) for k in range(2)]
CALIBRATION = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS])


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("ssr", SSRMerge()),
        ("SSR ridge=0.5 anchor=gains balance=off", SSRMerge(0.5, "gains", False)),
        ("ssr balance=Yes", SSRMerge()),
        ("paper ridge=1e-3", PaperMerge(1e-3)),
        ("np_lora mu=2 hard=on protected=0,1 count=3", NPLoRAMerge(2.0, True, (0, 1), count=3)),
        ("np_lora directions=activations", NPLoRAMerge(directions="activations")),
        ("  average  ", AverageMerge()),
    ],
)
def test_lines(line, method):
    assert parse_method(line) == method


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "no method"),
        ("ties", "ssr, paper"),
        ("ssr mu=1", "ridge=0.01"),
        ("ssr ridge", "'ridge'"),
        ("ssr ridge=much", "ridge=0.01"),
        ("ssr balance=2", "balance=True"),
        ("np_lora protected=x", "protected"),
        ("np_lora energy=2", "energy"),
        ("sum ridge=1", "it has none"),
        ("osrm_refit", "before SSR Calibrate"),
        ("OSRM Refit", "before SSR Calibrate"),
        ("osrm-refit mode=contrast", "before SSR Calibrate"),
    ],
)
def test_lines_that_mean_nothing_say_what_would(line, word):
    with pytest.raises(IncompatibleError) as caught:
        parse_method(line)
    assert word in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_written_as_a_line(name):
    assert parse_method(name) == METHODS[name]()


def test_rows_are_the_reports_of_the_methods():
    lines = ["ssr ridge=0.3", "sum", "np_lora mu=1", "osrm"]
    comparison = compare(TASKS, lines, CALIBRATION)
    rows = comparison.rows
    assert [row.label for row in rows] == lines
    for row, method in zip(rows, (SSRMerge(0.3), SumMerge(), NPLoRAMerge(1.0)), strict=False):
        result = merge(TASKS, method, CALIBRATION)
        delta = result.layers[LAYER].delta()
        assert row.error == pytest.approx(output_error(delta, deltas_of(TASKS), TOKENS), rel=1e-8)
        assert row.held_error == result.report.reconstruction_error(held_out=True)
        assert math.isfinite(row.seconds) and not row.refused
    assert rows[3].refused and compare(TASKS, lines, CALIBRATION).score(3) == math.inf


def test_what_is_kept_and_what_leaks_against_branches():
    energies = [[float((x @ d.T).square().sum()) / len(x) for d in deltas_of(TASKS)] for x in TOKENS]
    own, other = energies[0][0] + energies[1][1], energies[0][1] + energies[1][0]
    total, half = compare(TASKS, ["sum", "average"], CALIBRATION).rows
    assert (total.kept, total.leak) == (pytest.approx(1.0), pytest.approx(other / own))
    assert (half.kept, half.leak) == (pytest.approx(0.25), pytest.approx(other / own / 4))


def test_the_best_is_judged_on_held_out_tokens():
    rows = (Row("a", "a", 0.1, 0.9), Row("b", "b", 0.5, 0.6), Row("c", refused="No."))
    comparison = Comparison(("x", "y"), rows)
    assert comparison.best == 1
    assert Comparison(("x",), (Row("a", "a", 0.3), Row("b", "b", 0.2))).best == 1  # none held out
    with pytest.raises(IncompatibleError, match="none of the methods"):
        _ = Comparison(("x",), rows[2:]).best
    text = comparison.to_markdown(0)
    assert "set choose to 2" in text.splitlines()[-1] and "- c: not applicable. No." in text
    assert "no other has a smaller held-out error (0.600)" in comparison.to_markdown(1)


def test_what_ranks_is_named_and_marked():
    rows = (Row("a", "a", 0.1, 0.9), Row("b", "b", 0.5, 0.6))
    text = Comparison(("x", "y"), rows).to_markdown(0)
    assert "| 1 | **a** | 0.900 | 0.100 |" in text and "| 2 | b | 0.600 (best) | 0.500 |" in text
    assert "Ranked by held-out error" in text and "You use a (held-out error 0.900); b has 0.600" in text
    text = Comparison(("x", "y"), (Row("a", "a", 0.1), Row("b", "b", 0.5))).to_markdown(1)
    assert "| 1 | a | - | 0.100 (best) |" in text and "Ranked by calibration error" in text
    assert "You use b (calibration error 0.500); a has 0.100" in text


def test_a_row_without_a_held_out_figure_does_not_win_by_the_other_one():
    """It could not be solved without the held-out tokens; its error on the fitted ones is no match for theirs."""
    rows = (Row("fits", "fits", 0.01), Row("honest", "honest", 0.3, 0.4), Row("worse", "worse", 0.3, 0.5))
    comparison = Comparison(("x", "y"), rows, 5, 5)
    assert comparison.best == 1 and comparison.score(0) == math.inf
    assert "- fits: its answer cannot be measured on held-out tokens" in comparison.to_markdown(1)
    assert "You use fits (no held-out error); honest has 0.400: set choose to 2" in comparison.to_markdown(0)


def test_rows_without_a_held_out_error_are_not_ranked_against_others():
    """Without a ridge eight tokens are fitted to the letter at rank eight, and six leave no answer."""
    tasks = conflicting_tasks(2, OUT, IN, 4, seed=3)
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(5, 4, IN)], [task_tokens(6, 4, IN)]])
    comparison = compare(tasks, ["ssr ridge=0", "sum"], calibration)
    fitted, total = comparison.rows
    assert fitted.error < 1e-4 < total.held_error and math.isnan(fitted.held_error) and not fitted.refused
    assert comparison.best == 1
    text = comparison.to_markdown(0)
    assert "- ssr ridge=0: its answer cannot be measured on held-out tokens" in text
    assert f"You use ssr ridge=0 (no held-out error); sum has {total.held_error:.3f}: set choose to 2" in text


def test_the_table_says_how_many_layers_held_out_errors_are_about():
    rows = (Row("a", "a", 0.3, 0.4), Row("b", "b", 0.2, 0.5))
    assert "of 3 layers. Held-out errors are about 2 of them." in Comparison(("x",), rows, 3, 3, 2).to_markdown(1)
    for rest in ((rows, 3, 3, 3), ((Row("a", "a", 0.3),), 3, 3, 0)):
        assert "Held-out errors are about" not in Comparison(("x",), *rest).to_markdown(0)
    assert compare(TASKS, ["sum"], CALIBRATION).judged == 1


def test_without_statistics_nothing_can_be_told_apart():
    alone = [TASKS[0], task("other", {}, prompts=("y",))]
    calibration = calibrated(linear64(IN, OUT), [TASKS[0]], [[TOKENS[0]]])
    comparison = compare(alone[:1], ["sum", "ssr"], calibration)
    assert comparison.best == 0 and "without one the methods cannot be told apart" in comparison.to_markdown(0)


def split_and_fused():
    """One module that one LoRA has as q, k, v and the other in one, and one that both have alike."""
    whole, plain = Target("qkv"), Target("plain")
    parts = {Target("qkv", (at, 6)): lora(30 + at, 6, IN, 3) for at in (0, 6, 12)}
    tasks = [task("split", {**parts, plain: lora(1, OUT, IN, 3)}), task("fused", {whole: lora(2, 18, IN, 3)})]
    tasks[1].adapter.layers[plain] = lora(3, OUT, IN, 3)
    root = nn.ModuleDict({"qkv": linear64(IN, 18), "plain": linear64(IN, OUT)})

    def run_pass(index, tap):
        for module in root.values():
            module(TOKENS[index])

    return tasks, calibrate(root, tasks, build_stacks(tasks), run_pass)


def test_rows_are_about_the_same_layers():
    """NP-LoRA has no single router where rows are divided; a vanishing mu must score as mu = 0, the sum."""
    tasks, calibration = split_and_fused()
    comparison = compare(tasks, ["sum", "np_lora mu=0", "np_lora mu=1e-9"], calibration)
    total, zero, tiny = comparison.rows
    for name in ("error", "held_error", "kept", "leak"):
        assert getattr(zero, name) == pytest.approx(getattr(total, name), rel=1e-9)
        assert getattr(tiny, name) == pytest.approx(getattr(total, name), rel=1e-6)
    assert (comparison.measured, comparison.known) == (1, 2)
    assert "Measured by every method: 1 of 2 layers. The others" in comparison.to_markdown(0)
    both = compare(tasks, ["sum", "ssr"], calibration)
    assert (both.measured, both.known) == (2, 2) and "of 2 layers.\n" in both.to_markdown(0)
    assert both.rows[0].error == merge(tasks, SumMerge(), calibration).report.reconstruction_error()
    assert both.rows[0].error != pytest.approx(total.error, rel=1e-3)


def test_a_method_that_measures_nothing_does_not_blind_the_others():
    tasks, _ = split_and_fused()
    for one in tasks:
        del one.adapter.layers[Target("plain")]
    root = nn.ModuleDict({"qkv": linear64(IN, 18)})
    calibration = calibrate(root, tasks, build_stacks(tasks), lambda index, tap: root["qkv"](TOKENS[index]))
    comparison = compare(tasks, ["np_lora", "sum"], calibration)
    assert comparison.best == 1 and math.isfinite(comparison.score(1))
    assert "- np_lora: its answer cannot be measured" in comparison.to_markdown(1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ssr ridg=0.1", ("'ssr ridg=0.1'", "no setting 'ridg=0.1'", "ridge=0.01")),
        ("nonsense", ("'nonsense'", "use one of ssr")),
        ("np_lora energy=2", ("'np_lora energy=2'", "energy")),
    ],
)
def test_a_line_that_means_nothing_stops_before_any_solve(line, words):
    ticks = []
    with pytest.raises(IncompatibleError) as caught:
        compare(TASKS, ["sum", line], CALIBRATION, tick=lambda done, total: ticks.append(done))
    assert not ticks and all(word in str(caught.value) for word in words)


def test_a_method_that_reads_well_and_does_not_apply_is_a_row_of_its_own():
    comparison = compare(TASKS[:1], ["sum", "np_lora", "osrm"], CALIBRATION)
    assert [bool(row.refused) for row in comparison.rows] == [False, True, True]
    assert "before SSR Calibrate" in comparison.to_markdown(0)


def test_an_empty_list_is_refused_and_ticks_may_cancel():
    with pytest.raises(IncompatibleError, match="nothing to compare"):
        compare(TASKS, [], CALIBRATION)
    ticks = []
    compare(TASKS, ["sum", "osrm_refit", "average"], CALIBRATION, tick=lambda done, total: ticks.append((done, total)))
    assert ticks == [(0, 3), (1, 3), (2, 3), (3, 3)]
