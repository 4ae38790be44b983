"""Degraded merges say so, in words that name the LoRAs; good ones stay silent."""

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, linear64, lora, task, task_tokens

from ssr_core import Calibration, GramStats, PaperMerge, SSRMerge, SumMerge, Task, merge, prompt_warnings
from ssr_core.advice import silent_warnings

OUT, IN, RANK = 7, 10, 3


def warnings_of(tasks, tokens=None, method=None):
    tokens = tokens or [task_tokens(k, 40, IN) for k in range(len(tasks))]
    calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens])
    return merge(tasks, method or SSRMerge(), calibration).report.warnings


def test_a_good_merge_has_no_warnings():
    assert warnings_of(conflicting_tasks(3, OUT, IN, RANK)) == ()


def test_the_same_content_twice():
    layer = lora(1, OUT, IN, RANK)
    tasks = [Task(task("x", layer).adapter, prompts=(p,)) for p in ("a dog", "a cat")]
    (warning,) = warnings_of(tasks)
    assert "same content" in warning


@pytest.mark.parametrize("method", [SSRMerge(), PaperMerge()])
def test_empty_and_equal_prompts(method):
    a, b, c, d = (t.adapter for t in conflicting_tasks(4, OUT, IN, RANK))
    tasks = [Task(a, prompts=(" ",)), Task(b, prompts=("a dog",)), Task(c, prompts=("a dog ",)), Task(d)]
    found = warnings_of(tasks, method=method)
    assert len(found) == 2
    assert found[0].startswith("task0 and task3 have no calibration prompt")
    assert found[1].startswith("task1 and task2 have the same prompt")


def test_methods_without_routing_do_not_ask_for_prompts():
    tasks = [Task(t.adapter) for t in conflicting_tasks(2, OUT, IN, RANK)]
    assert merge(tasks, SumMerge()).report.warnings == ()


def test_a_lora_that_is_alone_is_a_note_and_is_what_comes_out():
    first, second = conflicting_tasks(2, OUT, IN, RANK)
    off = Task(second.adapter, 0.0, 0.0)
    for tasks in ([first], [first, off]):
        result = merge(tasks, SSRMerge())
        (note,) = result.report.notes
        assert note.startswith("task0 alone is active")
        torch.testing.assert_close(result.layers[LAYER].delta(), first.adapter.layers[LAYER].delta())
    assert merge([first, second], SumMerge()).report.notes == ()


def test_a_single_lora_needs_no_prompt():
    assert merge([Task(conflicting_tasks(1, OUT, IN, RANK)[0].adapter)], SSRMerge()).report.warnings == ()


def test_prompt_warnings_by_name():
    found = prompt_warnings(["x", "y", "z"], [["", ""], ["p", "q"], ["p ", " q"]])
    assert len(found) == 2 and found[0].startswith("x has no calibration prompt") and found[1].startswith("y and z")
    assert prompt_warnings(["x", "y"], [["p"], ["p", "q"]]) == []
    assert silent_warnings(["x", "y", "z"], [[" ", "p"], [" "], []])[0].startswith("y and z have no calibration")
    assert silent_warnings(["x"], [["p"]]) == []
    (one,) = prompt_warnings(list("vwxyz"), [["p"]] * 5)  # one sentence, not one for each pair
    assert one.startswith("v, w, x, y and z have the same prompt")


def test_tasks_that_look_the_same_to_the_model():
    tasks = conflicting_tasks(3, OUT, IN, RANK)
    x = task_tokens(1, 60, IN)
    (warning,) = warnings_of(tasks, [x, task_tokens(2, 60, IN), x * 1.0001])
    assert "task0 and task2 look the same" in warning
    (warning,) = warnings_of(tasks, [x, x * 1.0001, x])
    assert "task0, task1 and task2 look the same" in warning
    # equal prompts are named once, and methods that do not route average nothing
    same = [Task(t.adapter, prompts=("a dog",)) for t in tasks]
    (warning,) = warnings_of(same, [x, x, x])
    assert "same prompt" in warning
    assert warnings_of(tasks, [x, task_tokens(2, 60, IN), x], SumMerge()) == ()


def test_too_few_tokens_to_judge_raise_no_such_warning():
    tasks = conflicting_tasks(2, OUT, IN, RANK)
    x = task_tokens(1, 3, IN)
    assert warnings_of(tasks, [x, x]) == ()


def test_other_strengths_and_dropped_tasks_are_notes():
    tasks = conflicting_tasks(3, OUT, IN, RANK)
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 40, IN)] for k in range(3)])
    changed = [Task(tasks[0].adapter, 0.5, 1.0, tasks[0].prompts), tasks[2]]
    notes = merge(changed, SSRMerge(), calibration).report.notes
    assert len(notes) == 2
    assert "task0 was calibrated at strength 1 (CLIP 1) and is merged at 0.5" in notes[0]
    assert notes[1] == "Calibrated but not merged: task1."
    assert merge(tasks, SSRMerge(), calibration).report.notes == ()


def test_a_disabled_lora_does_not_need_a_prompt():
    tasks = conflicting_tasks(2, OUT, IN, RANK)
    off = task("off", lora(99, OUT, IN, RANK), strength=0.0, clip=0.0, prompts=())
    assert warnings_of([*tasks, off], [*(task_tokens(k, 40, IN) for k in range(2)), task_tokens(3, 1, IN)]) == ()


def test_a_disabled_lora_does_not_need_to_be_calibrated():
    tasks = conflicting_tasks(2, OUT, IN, RANK)
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 40, IN)] for k in range(2)])
    off = task("off", lora(99, OUT, IN, RANK), strength=0.0, clip=0.0)
    result = merge([*tasks, off], SSRMerge(), calibration)
    assert result.report.layers[0].tasks == (0, 1)


def test_a_layer_that_never_ran_for_one_lora_is_not_passed_off_as_routed():
    """Nothing is known about the second LoRA here: it must not be deleted in silence."""
    tasks = conflicting_tasks(2, OUT, IN, RANK)
    seen = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 40, IN)] for k in range(2)])
    stats = seen.stats[LAYER]
    gram, tokens = stats.gram.clone(), stats.tokens.clone()
    gram[1], tokens[1] = 0, 0
    half = Calibration(seen.tasks, {LAYER: GramStats(gram, tokens, stats.nonfinite, stats.ranks)}, seen.stack_tasks)
    report = merge(tasks, SSRMerge(), half).report
    assert report.layers[0].status == "anchored" or any("layer" in warning for warning in report.warnings)
