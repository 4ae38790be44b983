"""Each suggestion with a merge in which it appears and one in which it does not."""

import math
from dataclasses import replace

import pytest
from helpers import LAYER, calibrated, conflicting_tasks, linear64, task_tokens

from ssr_core import METHODS, NPLoRAMerge, PaperMerge, Scene, SSRMerge, SumMerge, Target, Task, merge
from ssr_core.layer_report import LayerReport
from ssr_core.report import MergeReport
from ssr_core.suggestions import suggestions

SETTINGS = {"steps": 1, "width": 512, "height": 384, "rounds": 2}


def layer(result=0.3, total=1.0, *, held=0.32, own=(1.0, 1.0), tokens=(400.0, 400.0), condition=10.0, path="b.0.q"):
    """A layer of two LoRAs; `total` is the error of their sum, whose energy lies evenly on both prompts."""
    cross = total**2 * sum(own) / 2
    errors = {"result": result, "sum": total, "average": 0.7, "gains": 0.65}
    return LayerReport(
        Target(path),
        "routed",
        (0, 1),
        64,
        tokens,
        condition=condition,
        errors=errors,
        crosstalk={"sum": [[own[0], cross], [cross, own[1]]]},
        held_errors={} if held is None else {**errors, "result": held},
        overlap=[[1.0, 0.2], [0.2, 1.0]],
        closest=[[1.0, 0.9], [0.9, 1.0]],
    )


def found(*layers, settings=SETTINGS, method=None, strengths=(1.0, 0.8), apart=0.6):
    report = MergeReport("m", ("dog", "cat"), layers, (), strengths=strengths, apart={(0, 1): apart})
    return suggestions(report, settings, method or SSRMerge())


def test_a_good_merge_needs_nothing_but_a_prompt_for_pictures_of_both():
    assert found(layer()) == []
    tasks, module = conflicting_tasks(2, 7, 10, 3), linear64(10, 7)
    tokens = [[task_tokens(k, 80, 10)] for k in range(2)]
    (sentence,) = merge(tasks, SSRMerge(), calibrated(module, tasks, tokens)).report.advice
    assert "joint_prompts" in sentence
    more = {"scenes": (Scene("both", (0, 1)),), "run_scene": lambda number, tap: module(task_tokens(7, 80, 10))}
    assert merge(tasks, SSRMerge(), calibrated(module, tasks, tokens, **more)).report.advice == ()
    neutral = {**more, "scenes": (Scene("nobody"),)}
    assert merge(tasks, SSRMerge(), calibrated(module, tasks, tokens, **neutral)).report.advice == (sentence,)


def test_a_lora_that_the_others_drown_is_named():
    drowned = {"result": [0.2, 2.2], "sum": [1.0, 2.1], "average": [0.7, 1.1], "gains": [0.7, 1.1]}
    one = replace(layer(), held_task_errors=drowned, task_errors=drowned)
    (sentence,) = [s for s in found(one) if "no better than in a plain sum" in s]
    assert sentence.startswith("cat ") and "2.20 against 2.10" in sentence and "now 0.8" in sentence
    fine = {**drowned, "result": [0.2, 2.0]}
    assert not [s for s in found(replace(one, held_task_errors=fine)) if "no better" in s]


@pytest.mark.parametrize(("own", "appears"), [((1.0, 8.0), True), ((8.0, 1.0), True), ((1.0, 3.5), False)])
def test_a_loud_lora_and_the_strength_that_balances_it(own, appears):
    sentences = [s for s in found(layer(own=own)) if "carries" in s]
    assert bool(sentences) == appears
    if appears and own[1] > 1:
        # 0.8 / sqrt(8)
        assert sentences[0].startswith(
            "cat carries 8x the energy of dog. If dog is too weak in your pictures, set strength_model of cat to 0.28 "
            "(now 0.8), or that of dog to 2.8 (now 1): either balances"
        )


def test_a_loud_lora_is_named_for_every_method():
    assert any("carries" in s for s in found(layer(own=(1.0, 9.0)), method=NPLoRAMerge()))


def several(*energies, strengths=None):
    """The loudness advice for LoRAs with these energies, and their names by it."""
    k = len(energies)
    cross = [[energies[i] if i == j else 1.0 for j in range(k)] for i in range(k)]
    one = replace(
        layer(), tasks=tuple(range(k)), crosstalk={"sum": cross}, overlap=[[1.0] * k] * k, closest=[[1.0] * k] * k
    )
    names = tuple(["dog", "cat", "hat", "bow", "sea"][:k])
    report = MergeReport("m", names, (one,), (), strengths=strengths or (1.0,) * k)
    return [s for s in suggestions(report, SETTINGS, SSRMerge()) if "carr" in s]


def test_among_several_the_one_that_differs_is_named_be_it_loud_or_quiet():
    (loud,) = several(1.0, 25.0, 1.0)
    assert (
        loud.startswith("cat carries 25x the energy of the others") and "strength_model of cat to 0.2 (now 1)" in loud
    )
    (quiet,) = several(4.0, 4.0, 4.0, 4.0, 0.04, strengths=(1.0, 1.0, 1.0, 1.0, 0.5))
    assert quiet.startswith("The others carry 100x the energy of sea")
    assert "strength_model of sea to 5 (now 0.5), or multiply theirs by 0.1:" in quiet
    assert several(4.0, 2.0, 1.0) == []  # 2.8x the mean of the others


def test_strengths_of_the_model_come_from_its_layers_alone():
    loud_text = replace(layer(own=(1.0, 100.0)), target=Target("t", part="clip"))
    assert not [s for s in found(layer(), loud_text) if "carries" in s]
    assert any("of cat to 0.2 (now 0.8)" in s for s in found(layer(own=(1.0, 16.0)), loud_text))


def test_the_strength_of_a_real_merge_is_the_one_that_makes_energies_equal():
    base = conflicting_tasks(2, 7, 10, 3)
    tasks = [base[0], Task(base[1].adapter, 6.0, 1.0, base[1].prompts)]
    x = [task_tokens(k, 80, 10) for k in range(2)]
    report = merge(tasks, SSRMerge(), calibrated(linear64(10, 7), tasks, [[one] for one in x])).report
    (sentence,) = [s for s in report.advice if "carries" in s]
    strength = float(sentence.split(" to ")[1].split(" ")[0])
    energies = [
        float((one @ t.adapter.layers[LAYER].delta().T * s).square().sum())
        for one, t, s in zip(x, tasks, (1.0, strength), strict=True)
    ]
    assert energies[0] == pytest.approx(energies[1], rel=0.1)  # two digits are said


@pytest.mark.parametrize(("total", "appears"), [(0.1, True), (0.2, False)])
def test_loras_that_hardly_meet(total, appears):
    sentences = found(layer(0.05, total, held=0.06))
    assert any("hardly meet" in s and "Mode sum" in s for s in sentences) == appears
    assert not found(layer(0.1, 0.1, held=0.1), method=SumMerge())


@pytest.mark.parametrize(("result", "appears"), [(0.62, True), (0.5, False)])
def test_routing_that_gains_little_names_the_prompts_that_are_alike(result, appears):
    report = MergeReport(
        "m", ("dog", "cat", "hat"), (layer(result),), (), apart={(0, 1): 0.4, (0, 2): 0.02, (1, 2): 0.5}
    )
    sentences = [s for s in suggestions(report, SETTINGS, SSRMerge()) if "Routing gains little" in s]
    assert bool(sentences) == appears
    if appears:
        assert "dog and hat look most alike" in sentences[0] and "0.020" in sentences[0]


def test_prompts_that_look_the_same_are_left_to_the_warning():
    assert any("Routing gains little" in s for s in found(layer(0.64), apart=0.002))
    assert not any("Routing gains little" in s for s in found(layer(0.64), apart=0.0005))


@pytest.mark.parametrize("name", ["sum", "average", "gains"])
def test_modes_that_do_not_route_name_the_one_that_does(name):
    (sentence,) = found(layer(0.66), method=METHODS[name]())
    assert "error of 0.66" in sentence and "Set mode to ssr" in sentence
    assert found(layer(0.4), method=METHODS[name]()) == []


def test_a_method_with_parts_given_to_it_is_not_told_about_routing():
    assert found(layer(0.66), method=NPLoRAMerge()) == []


@pytest.mark.parametrize(("held", "appears"), [(0.6, True), (0.4, False), (None, False)])
def test_too_few_tokens_show_as_a_gap(held, appears):
    sentences = [s for s in found(layer(held=held)) if "held-out" in s]
    assert bool(sentences) == appears
    if appears:
        assert "Set steps to 4, or width and height to 1024 x 768." in sentences[0]


def test_one_text_layer_with_a_gap_is_not_typical():
    assert not found(layer(path="b.0.a"), layer(path="b.0.b"), layer(held=1.4, path="b.0.txt"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "more prompts for each LoRA"),
        ({**SETTINGS, "custom_latent": True}, "a larger LATENT"),
        ({**SETTINGS, "steps": 4}, "Set steps to 16"),
        ({**SETTINGS, "steps": 40}, "Set steps to 100, or"),
        ({**SETTINGS, "steps": 100}, "Set width and height to 1024 x 768."),
        ({**SETTINGS, "width": 8192}, "Set steps to 4."),
        ({**SETTINGS, "steps": 100, "height": 8192}, "Give each LoRA more prompts."),
    ],
)
def test_how_to_get_more_tokens_depends_on_the_calibration(settings, words):
    assert any(words in s for s in found(layer(held=0.9), settings=settings))


@pytest.mark.parametrize(("tokens", "appears"), [((40.0, 40.0), True), ((80.0, 80.0), False)])
def test_layers_that_saw_fewer_tokens_than_they_route(tokens, appears):
    short = [layer(tokens=tokens, path=f"b.{i}.q") for i in range(2)]
    modulation = layer(tokens=(1.0, 1.0), path="b.0.mod")  # one token a pass is as it should be
    sentences = [s for s in found(*short, modulation) if "fewer than two tokens" in s]
    assert bool(sentences) == appears
    if appears:
        assert sentences[0].startswith("2 of 2 layers") and "b.0.q (80 for rank 64)" in sentences[0]
        short = [layer(tokens=tokens, path=f"b.{i}.q", held=0.9) for i in range(2)]
        assert sum("Set steps to" in s for s in found(*short)) == 1  # the consequence says it already


@pytest.mark.parametrize(("condition", "appears"), [(1e9, True), (1e6, False), (math.nan, False)])
def test_nearly_singular_layers(condition, appears):
    assert any("Set ridge to 0.01" in s for s in found(layer(condition=condition))) == appears


@pytest.mark.parametrize(("result", "total", "appears"), [(0.64, 1.2, True), (0.4, 1.2, False), (0.64, 0.45, False)])
def test_much_that_is_lost_names_who_fights_and_where(result, total, appears):
    sentences = [s for s in found(layer(result, total, held=0.65)) if "Much is lost" in s]
    assert bool(sentences) == appears
    if appears:
        assert "dog and cat fight most, most of all in b.0 q: put OSRM Refit" in sentences[0]


@pytest.mark.parametrize(
    ("method", "tokens", "appears"),
    [(None, 0, True), (None, 64, False), (SSRMerge(refine=False), 0, False), (PaperMerge(), 0, False)],
)
def test_sampled_tokens_are_named_where_they_would_count(method, tokens, appears):
    sentences = found(layer(0.64, 1.2), settings={**SETTINGS, "sampled_tokens": tokens}, method=method)
    assert any("calibrate with sampled_tokens 256" in s for s in sentences) == appears


@pytest.mark.parametrize(("method", "rounds", "appears"), [(None, 1, True), (None, 2, False), (PaperMerge(), 1, False)])
def test_a_second_round_is_named_where_there_was_one(method, rounds, appears):
    sentences = found(layer(0.64, 1.2), settings={**SETTINGS, "rounds": rounds}, method=method)
    assert any("calibrate in 2 rounds" in s for s in sentences) == appears


def test_a_third_lora_can_be_left_out():
    layers = [replace(layer(0.64, 1.2, held=0.65), tasks=pair) for pair in ((0, 1), (0, 2), (1, 2))]
    report = MergeReport("m", ("dog", "cat", "hat"), tuple(layers), ())
    assert any("merge without one of the two, or put" in s for s in suggestions(report, SETTINGS, SSRMerge()))


def test_nothing_is_said_without_statistics():
    assert merge(conflicting_tasks(2, 7, 10, 3), SumMerge()).report.advice == ()


def test_what_to_do_next_is_the_end_of_the_report():
    report = MergeReport("m", ("dog", "cat"), (layer(),), (), strengths=(1.0, 1.0))
    assert report.to_markdown().endswith("## What to do next\n\n- Nothing: use the merge.\n")
    told = replace(report, warnings=("Careful.",), advice=("Try that.",), notes=("By the way.",))
    assert told.to_markdown().endswith("## What to do next\n\n- Careful.\n- Try that.\n")
    assert told.to_json()["advice"] == ["Try that."]
