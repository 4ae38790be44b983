"""Modules that hooks cannot watch, and who wins where two names of one file mean the same layer."""

import pytest
import torch
from helpers import F64, LAYER, calibrated, linear64, lora, randn, rel, task, task_tokens
from torch import nn

from ssr_core import (
    ConvertOptions,
    KeyTarget,
    LoRALayer,
    SSRMerge,
    SumMerge,
    Target,
    Task,
    build_stacks,
    calibrate,
    convert,
    load_calibration,
    memory_need,
    merge,
    read_adapter,
    save_calibration,
)

OUT, IN, RANK = 6, 8, 3
EMBED, GATE = Target("embed"), Target("gate")
UP, DOWN = randn(1, OUT, RANK), randn(2, RANK, IN)
OK = {"ok.lora_up.weight": UP, "ok.lora_down.weight": DOWN}
LOHA = {f"hada_{n}": randn(i, *s) for i, (n, s) in enumerate(zip(("w1_a", "w1_b"), ((OUT, 2), (2, IN)), strict=True))}


def test_untapped_layers_are_anchored_and_never_hooked():
    """The anchor merges them; no statistics are kept, nothing hangs on the module."""
    tasks = [
        task(name, {LAYER: lora(seed, OUT, IN, 2), EMBED: lora(seed + 1, OUT, IN, 3)}, untapped=frozenset({EMBED}))
        for name, seed in (("a", 1), ("b", 5))
    ]
    stacks = build_stacks(tasks)
    assert {stack.target: stack.tapped for stack in stacks} == {LAYER: True, EMBED: False}
    root, seen = nn.ModuleDict({"layer": linear64(IN, OUT), "embed": nn.Embedding(OUT, IN)}), []

    def run_pass(index, tap):
        seen.append(len(root["embed"]._forward_hooks) + len(root["embed"]._forward_pre_hooks))
        root["layer"](task_tokens(index, 30, IN))

    calibration = calibrate(root, tasks, stacks, run_pass)
    assert seen == [0, 0] and set(calibration.stats) == {LAYER}
    for anchor, share in (("sum", 1.0), ("average", 0.5)):
        result = merge(tasks, SSRMerge(anchor=anchor), calibration)
        expected = share * sum(one.adapter.layers[EMBED].delta() for one in tasks)
        assert rel(result.layers[EMBED].delta(), expected) < 1e-12
        statuses = {layer.target: layer.status for layer in result.report.layers}
        assert statuses == {LAYER: "routed", EMBED: "anchored"}
        assert any("embed" in warning and "never ran" in warning for warning in result.report.warnings)


def test_one_untapped_member_makes_the_stack_untapped():
    tasks = [
        task("a", {EMBED: lora(1, OUT, IN, 2)}, untapped=frozenset({EMBED})),
        task("b", {EMBED: lora(2, OUT, IN, 2)}),
    ]
    assert [stack.tapped for stack in build_stacks(tasks)] == [False]


def test_the_memory_forecast_leaves_out_what_hooks_cannot_watch():
    both = {LAYER: lora(1, OUT, IN, 2), EMBED: lora(2, OUT, IN, 8)}
    untapped = frozenset({EMBED})
    tapped = [task(name, both, untapped=untapped) for name in "ab"]
    only = [task(name, {LAYER: both[LAYER]}) for name in "ab"]
    everything = [task(name, both) for name in "ab"]
    needs = [memory_need(build_stacks(tasks), torch.float32) for tasks in (tapped, only, everything)]
    assert needs[0] == needs[1] and needs[2].device > needs[0].device and needs[2].host > needs[0].host


@pytest.mark.parametrize("kind", ["diff", "set_weight"])
def test_a_difference_of_an_untapped_matrix_is_a_vector_and_a_new_value_a_dense_group(kind):
    keys = {"ok": KeyTarget(Target("ok"), (OUT, IN)), "embed": KeyTarget(EMBED, (OUT, IN), tapped=False)}
    value = randn(3, OUT, IN)
    adapter = read_adapter({**OK, f"embed.{kind}": value}, keys, name="f", fingerprint="h")
    assert adapter.untapped == {EMBED}
    if kind == "diff":
        assert torch.equal(adapter.vectors[(EMBED, "weight")], value) and not adapter.dense
    else:
        adapter = convert(adapter, ConvertOptions(), lambda group: value - 1)
        assert torch.equal(adapter.vectors[(EMBED, "weight")], value - 1)
        assert adapter.conversions[0].error == 0 and "exact difference" in adapter.records[2].reason
    total = merge([Task(adapter, 0.5), Task(adapter, 2.0)], SumMerge()).vectors[(EMBED, "weight")]
    assert rel(total, 2.5 * adapter.vectors[(EMBED, "weight")]) < 1e-12


@pytest.mark.parametrize("form", ["difference", "bias"])
def test_rows_of_a_reordered_name_are_put_in_the_order_of_the_weight(form):
    order = (4, 5, 0, 1, 2, 3)
    keys = {"ok": KeyTarget(Target("ok"), (OUT, IN)), "mod": KeyTarget(GATE, (OUT, IN), order, tapped=False)}
    tensors = {"mod.diff": randn(3, OUT, IN)} if form == "difference" else {"mod.diff_b": randn(3, OUT)}
    adapter = read_adapter({**OK, **tensors}, keys, name="f", fingerprint="h")
    ((_, value),) = adapter.vectors.items()
    assert torch.equal(value, next(iter(tensors.values()))[list(order)])


# ---------------------------------------------------------------- aliases

NAMES = {
    "first": KeyTarget(LAYER, (OUT, IN)),
    "second": KeyTarget(LAYER, (OUT, IN)),
    "ok": KeyTarget(Target("ok"), (OUT, IN)),
}
FORMS = {
    "plain": {".lora_up.weight": UP, ".lora_down.weight": DOWN},
    "dense": {f".{name}": value for name, value in LOHA.items()},
    "difference": {".diff": randn(4, OUT, IN)},
    "replacement": {".set_weight": randn(4, OUT, IN)},
}


def holdings(adapter, target=LAYER):
    """Where a target's weight is kept: exactly one place may have it."""
    return [
        *(["layer"] if target in adapter.layers else []),
        *("dense" for group in adapter.dense if group.target == target),
        *("vector" for key in adapter.vectors if key == (target, "weight")),
    ]


@pytest.mark.parametrize("tapped", [True, False])
@pytest.mark.parametrize("late", FORMS)
@pytest.mark.parametrize("early", FORMS)
def test_the_later_name_wins_whatever_both_are(early, late, tapped):
    """In the order of the model's key map, not of the file; nothing of the loser stays behind."""
    names = {name: KeyTarget(e.target, e.weight_shape, tapped=tapped) for name, e in NAMES.items()}
    loser = {f"first{suffix}": value for suffix, value in FORMS[early].items()}
    winner = {f"second{suffix}": value for suffix, value in FORMS[late].items()}
    for tensors in ({**OK, **loser, **winner}, {**OK, **winner, **loser}):
        adapter = read_adapter(tensors, names, name="f", fingerprint="h")
        records = {record.key: record for record in adapter.records}
        assert all(records[key].status == "shadowed" and "second" in records[key].reason for key in loser)
        wanted = "layer" if late == "plain" else "vector" if late == "difference" and not tapped else "dense"
        assert holdings(adapter) == [wanted]
        statuses = {"layer": "low_rank", "vector": "vector", "dense": "unsupported"}
        assert {records[key].status for key in winner} == {statuses[wanted]}
        assert all(group.keys == tuple(k for k in tensors if k in winner) for group in adapter.dense)


def test_a_later_bias_replaces_a_new_value_of_the_same_bias():
    keys = {**NAMES, "layer.bias": KeyTarget(LAYER, (OUT,), parameter="bias"), "z": KeyTarget(LAYER, (OUT, IN))}
    tensors = {**OK, "layer.bias.set_weight": randn(1, OUT), "z.diff_b": randn(2, OUT)}
    adapter = read_adapter(tensors, keys, name="f", fingerprint="h")
    assert {r.key: r.status for r in adapter.records}["layer.bias.set_weight"] == "shadowed"
    assert not adapter.dense and torch.equal(adapter.vectors[(LAYER, "bias")], tensors["z.diff_b"])


def test_another_parameter_of_the_module_leaves_its_weight_alone():
    keys = {**NAMES, "layer.gain": KeyTarget(LAYER, (OUT,), parameter="gain")}
    tensors = {**OK, "first.lora_up.weight": UP, "first.lora_down.weight": DOWN, "layer.gain.diff": randn(1, OUT)}
    adapter = read_adapter(tensors, keys, name="f", fingerprint="h")
    assert {record.status for record in adapter.records} == {"low_rank", "vector"}
    assert LAYER in adapter.layers and (LAYER, "gain") in adapter.vectors
    (account,) = merge([Task(adapter)], SumMerge()).report.files
    assert account.fates == {"passed_through": 4, "summed": 1}


# ---------------------------------------------------------------- calibrations on disk


def test_a_calibration_keeps_how_its_loras_were_converted(tmp_path):
    change = randn(7, OUT, IN)
    options = ConvertOptions(max_rank=4, tolerance=0.25, rest="drop")
    tensors = {"first.diff": change}
    adapter = convert(read_adapter(tensors, NAMES, name="d", fingerprint="d"), options, lambda group: change)
    tasks = [Task(adapter, prompts=("p",)), task("plain", LoRALayer(DOWN.to(F64), UP.to(F64)))]
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 30, IN)] for k in range(2)])
    save_calibration(calibration, tmp_path / "c")
    loaded = load_calibration(tmp_path / "c")
    assert [record.convert_options for record in loaded.tasks] == [options, None] and loaded.tasks == calibration.tasks
    before, after = (merge(tasks, SSRMerge(), one).layers[LAYER].delta() for one in (calibration, loaded))
    assert rel(after, before) < 1e-6


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_factors_and_a_difference_of_one_weight_become_one_difference(order):
    """Two LoRAs on an embedding, one low-rank, one a full difference: a file has one name for both."""
    keys = {"embed": KeyTarget(EMBED, (OUT, IN), tapped=False)}
    difference = randn(4, OUT, IN)
    plain = read_adapter(
        {"embed.lora_up.weight": UP, "embed.lora_down.weight": DOWN}, keys, name="plain", fingerprint="1"
    )
    full = read_adapter({"embed.diff": difference}, keys, name="full", fingerprint="2")
    tasks = [(Task(plain, 0.5), Task(full, -2.0))[i] for i in order]
    result = merge(tasks, SumMerge(), dtype=F64)
    assert EMBED not in result.layers
    assert rel(result.vectors[(EMBED, "weight")], 0.5 * UP @ DOWN - 2 * difference) < 1e-6


def test_refusing_unseen_layers_does_not_mean_those_that_hooks_cannot_see():
    tasks = [
        task(name, {LAYER: lora(seed, OUT, IN, 2), EMBED: lora(seed + 1, OUT, IN, 3)}, untapped=frozenset({EMBED}))
        for name, seed in (("a", 1), ("b", 5))
    ]
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    run = lambda index, tap: root["layer"](task_tokens(index, 30, IN))  # noqa: E731
    calibration = calibrate(root, tasks, build_stacks(tasks), run)
    result = merge(tasks, SSRMerge(), calibration, unseen="refuse")
    assert {layer.target: layer.status for layer in result.report.layers}[EMBED] == "anchored"
