"""Calibrations of several runs, or from records, made again from a merged file's metadata."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from recording import Attention, exact_calibration, identity_of, record_all, recorded_tasks, tokens

from ssr_core import (
    FileError,
    RecordOptions,
    RecordUse,
    SampleOptions,
    Scene,
    Share,
    SSRMerge,
    combine,
    from_records,
    keep,
    merge,
    merge_metadata,
    parse_recipe,
    parse_scenes,
)


def inputs_of(prompt, seed):
    """What the model sees of a prompt, by the noise of a seed."""
    return tokens(sum(map(ord, prompt)) % 97 + 100 * seed)


@functools.cache
def model():
    """One model for all runs: its biases are random."""
    return Attention()


def run_of(tasks, prompts, settings):
    """One run: each LoRA with its prompts."""
    given = [replace(one, prompts=words) for one, words in zip(tasks, prompts, strict=True)]
    passes = [[inputs_of(word, settings["seed"]) for word in words] for words in prompts]
    sample = SampleOptions(settings["sampled_tokens"]) if settings["sampled_tokens"] else None
    return replace(exact_calibration(model(), given, passes, sample), settings=settings)


def recipe_of(tasks, calibration):
    """What the metadata of a merge by a calibration says, and what it reads back as."""
    given = [replace(one, prompts=r.prompts) for one, r in zip(tasks, calibration.tasks, strict=True)]
    text = merge_metadata(given, SSRMerge(), calibration)["ssr_merge"]
    return given, json.loads(text), parse_recipe(json.loads(text), "merged.safetensors", recorded=True)


@pytest.mark.parametrize("kept", [0, 16])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0], [0.25, 0.0, 1.0]])
def test_a_sum_of_runs_is_made_again_from_its_metadata(weights, kept):
    tasks = recorded_tasks(3)
    settings = [{"seed": seed, "padding": "balance", "sampled_tokens": kept} for seed in range(3)]
    prompts = [
        [("a fox",), ("a cat", "two cats"), ("tea",)],
        [("b",), ("c",), ("d", "e")],
        [("a fox",), ("c",), ("d",)],
    ]
    then = combine([run_of(tasks, *one) for one in zip(prompts, settings, strict=True)], weights)
    given, _, recipe = recipe_of(tasks, then)
    assert recipe.remarks == () and recipe.records is None
    assert len(recipe.runs) == (2 if weights and not all(weights) else 3)
    parts = [run_of(tasks, run.prompts, dict(run.settings)) for run in recipe.runs]
    again = combine(parts, [run.weight for run in recipe.runs])
    assert again.settings == then.settings and again.tasks == then.tasks
    for target, stats in then.stats.items():
        assert torch.allclose(again.stats[target].gram, stats.gram, rtol=1e-12)
    first, second = (merge(given, SSRMerge(), one).layers for one in (then, again))
    for target, layer in first.items():
        assert torch.allclose(second[target].delta(), layer.delta(), rtol=1e-10, atol=1e-12)


def test_one_run_that_was_reweighted_and_sums_of_sums_are_runs(tmp_path):
    tasks = recorded_tasks(2)
    runs = [run_of(tasks, [("a",), ("b",)], {"seed": seed, "sampled_tokens": 0}) for seed in range(3)]
    half = recipe_of(tasks, combine(runs[:1], [0.5]))[2]
    assert [(run.settings["seed"], run.weight) for run in half.runs] == [(0, 0.5)]
    nested = recipe_of(tasks, combine([combine(runs[:2], [1.0, 3.0]), runs[2]], [0.5, 1.0]))[2]
    assert sorted((run.settings["seed"], run.weight) for run in nested.runs) == [(0, 0.5), (1, 1.5), (2, 1.0)]
    assert recipe_of(tasks, runs[0])[2].runs == ()


def test_what_a_run_does_not_say_is_as_in_the_nodes_but_in_files_of_the_first_release():
    run = {"settings": {"seed": 1}, "prompts": [["0", ["a"]]], "weight": 1.0}
    value = {"sources": [{"name": "a", "sha256": "0"}], "calibration": {"settings": {"runs": [run]}}}
    (asked,), (then,) = (parse_recipe(value, "m", recorded=recorded).runs for recorded in (False, True))
    assert asked.settings == {"seed": 1} and then.settings == {"seed": 1, "sampled_tokens": 0}


def test_some_loras_of_a_sum_in_another_order_keep_their_prompts():
    tasks = recorded_tasks(3)
    then = combine([run_of(tasks, [("a",), ("b",), ("c",)], {"seed": s, "sampled_tokens": 0}) for s in range(2)])
    some = [replace(tasks[index], prompts=then.tasks[index].prompts) for index in (2, 0)]
    text = merge_metadata(some, SSRMerge(), then)["ssr_merge"]
    recipe = parse_recipe(json.loads(text), "m", recorded=True)
    assert [run.prompts for run in recipe.runs] == [(("c",), ("a",))] * 2


def recorded(tmp_path, options=None):
    tasks = [replace(one, prompts=("p0", "p1")) for one in recorded_tasks(2)]
    inputs = [[tokens(10 * k + j) for j in range(2)] for k in range(2)]
    return tasks, record_all(tmp_path, model(), tasks, inputs, options)[0]


def test_records_and_their_weights_are_found_by_metadata(tmp_path):
    options = RecordOptions(columns=5, exact_limit=0, budget_mb=0.5, sampled_tokens=8)
    tasks, shares = recorded(tmp_path, options)
    weighted = [[Share(one.record, 0.5 + j + 2 * k) for j, one in enumerate(mine)] for k, mine in enumerate(shares)]
    _, _, recipe = recipe_of(tasks, from_records(tasks, weighted))
    assert recipe.records == RecordUse(options, ((0.5, 1.5), (2.5, 3.5))) and recipe.runs == ()
    assert recipe.settings["seed"] == 7 and recipe.remarks == ()


def test_a_record_of_just_that_size_is_found_and_no_larger_one(tmp_path):
    small, large = (RecordOptions(columns=n, exact_limit=0, sampled_tokens=8) for n in (4, 9))
    tasks, shares = recorded(tmp_path, small)
    library = record_all(tmp_path, model(), tasks, [[tokens(9)] * 2] * 2, large)[1]
    identity = identity_of(replace(tasks[0], prompts=("p0",)))
    assert library.find(identity, small).options == large
    assert library.find(identity, small, exactly=True).path == shares[0][0].record.path
    assert library.find(identity, RecordOptions(columns=5, exact_limit=0), exactly=True) is None


def extended(records):
    records["extends"] = True


def of_other_sizes(records):
    records["passes"][1]["options"]["columns"] += 1


def of_an_early_version(records):
    del records["passes"][0]["options"]


def of_other_prompts(records):
    records["passes"][0]["prompts"] = ["else"]


def of_no_size(records):
    for one in records["passes"]:
        one["options"] = {"columns": 0, "exact_limit": 0, "budget_mb": 0.0, "sampled_tokens": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (extended, "was extended by LoRAs"),
        (of_other_sizes, "records of different sizes"),
        (of_an_early_version, "did not say how large"),
        (of_other_prompts, "were of other prompts"),
        (of_no_size, "makes no sense"),
    ],
)
def test_records_that_cannot_be_made_again_are_refused_with_the_reason(tmp_path, change, words):
    tasks, shares = recorded(tmp_path)
    _, value, _ = recipe_of(tasks, from_records(tasks, shares))
    change(value["calibration"]["settings"]["records"])
    refused(value, words)


def refused(value, words):
    with pytest.raises(FileError, match=words) as found:
        parse_recipe(value, "merged.safetensors", recorded=True)
    assert "merged.safetensors" in str(found.value) and "calibration.file" in str(found.value)


def test_runs_that_cannot_be_made_again_are_refused_with_the_reason(tmp_path):
    tasks, shares = recorded(tmp_path)
    refused_text = merge_metadata(tasks, SSRMerge(), combine([from_records(tasks, shares)], [0.5]))["ssr_merge"]
    refused(json.loads(refused_text), "a part of it was put together from records")
    tasks = recorded_tasks(2)
    parts = [run_of(tasks, [("a",), ("b",)], {"seed": seed, "sampled_tokens": 0}) for seed in range(2)]
    _, value, _ = recipe_of(tasks, combine(parts))
    runs = value["calibration"]["settings"]["runs"]
    for change, words in (
        (lambda v, r: v["sources"][0].pop("sha256"), "have no sha256"),
        (lambda v, r: v["sources"].append(v["sources"][0]), "is in it twice"),
        (lambda v, r: r[0]["prompts"].pop(), "do not say the prompts of lora"),
        (lambda v, r: r[0]["prompts"].append(r[0]["prompts"][0]), "is in it twice"),
        (lambda v, r: r[1]["prompts"][0].__setitem__(1, "a"), "are damaged"),
    ):
        broken = json.loads(json.dumps(value))
        change(broken, broken["calibration"]["settings"]["runs"])
        refused(broken, words)
    assert len(runs) == 2


def test_joint_prompts_of_a_run_name_the_same_loras_in_any_order():
    tasks, scenes = recorded_tasks(3), (Scene("two", (0, 2)), Scene("nobody"))
    parts = [run_of(tasks, [("a",), ("b",), ("c",)], {"seed": seed, "sampled_tokens": 0}) for seed in range(2)]
    parts = [replace(one, stats={}, stack_tasks={}, signatures={}) for one in parts]  # what they saw is no matter
    lines = {"joint_prompts": ["[1, 3] two"], "neutral_prompts": ["nobody"]}
    parts[1] = replace(parts[1], scenes=scenes, settings={**parts[1].settings, **lines})
    _, value, recipe = recipe_of(tasks, combine(parts))
    seen = lambda recipe: {run.settings["seed"]: run.settings.get("joint_prompts") for run in recipe.runs}  # noqa: E731
    assert seen(recipe) == {0: None, 1: ["[1, 3] two"]}
    value["sources"] = [value["sources"][index] for index in (1, 2, 0)]
    moved = parse_recipe(value, "m", recorded=True)
    assert seen(moved) == {0: None, 1: ["[2, 3] two"]}
    assert [run.settings["neutral_prompts"] for run in moved.runs if run.settings["seed"]] == [["nobody"]]
    value["sources"] = value["sources"][:2]
    assert seen(parse_recipe(value, "m", recorded=True)) == {0: None, 1: []}, "who is gone takes part in nothing"
    for run in value["calibration"]["settings"]["runs"]:
        run["order"] = [tasks[0].adapter.fingerprint]
    refused(value, "does not say of which LoRAs")


def test_joint_prompts_of_a_run_keep_their_loras_where_a_sum_puts_these_in_another_order():
    """The numbers that a person wrote are about the order of then, and of LoRAs of which some may be gone."""
    tasks, parts = recorded_tasks(3), []
    contents = [one.adapter.fingerprint for one in tasks]
    for seed, (order, line) in enumerate((((2, 0, 1), "[2, 3] two"), ((0, 1, 2), "[lora0, lora1] two"))):
        mine = [tasks[index] for index in order]
        settings = {"seed": seed, "sampled_tokens": 0, "joint_prompts": [line], "neutral_prompts": []}
        one = replace(run_of(mine, [("a",)] * 3, settings), stats={}, stack_tasks={}, signatures={})
        parts.append(replace(one, scenes=parse_scenes([line], [], [one.name for one in mine])))
    for whole, left in ((combine(parts), contents), (combine([keep(parts[1], [2, 1])]), contents[:0:-1])):
        assert sorted(record.fingerprint for record in whole.tasks) == sorted(left)
        names = [record.name for record in whole.tasks]
        for run in whole.settings["runs"]:
            lines = run["settings"]["joint_prompts"], run["settings"]["neutral_prompts"]
            assert parse_scenes(*lines, names) == whole.scenes
            assert not whole.scenes or run["order"] == [record.fingerprint for record in whole.tasks]


def test_a_latent_with_content_is_refused_in_any_run():
    tasks = recorded_tasks(2)
    latent = {"custom_latent": True, "latent": [1, 4, 8, 8], "sampled_tokens": 0}
    parts = [run_of(tasks, [("a",), ("b",)], {"seed": n, **latent, "latent_fill": 0.5 * n}) for n in range(2)]
    _, value, recipe = recipe_of(tasks, combine(parts))
    assert [run.settings["latent_fill"] for run in recipe.runs] == [0.0, 0.5], "fills that differ are no content"
    value["calibration"]["settings"]["runs"][1]["settings"]["latent_fill"] = None
    with pytest.raises(FileError, match="LATENT with content"):
        parse_recipe(value, "m", recorded=True)
