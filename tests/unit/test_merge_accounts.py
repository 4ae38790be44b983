"""Every key of every file has one fate, and the fates add up."""

import pytest
import torch
from helpers import randn

from ssr_core import (
    Calibration,
    IncompatibleError,
    KeyTarget,
    SSRMerge,
    SumMerge,
    Target,
    Task,
    build_stacks,
    calibrate,
    merge,
    read_adapter,
)
from ssr_core.file_account import FATE_WORDS

OUT, IN, RANK = 6, 6, 2
KEYS = {
    **{name: KeyTarget(Target(name), (OUT, IN)) for name in ("shared", "mine", "blind", "odd")},
    **{f"to_{c}": KeyTarget(Target("qkv", (2 * i, 2)), (OUT, IN)) for i, c in enumerate("qkv")},
    "qkv": KeyTarget(Target("qkv"), (OUT, IN)),
    "norm": KeyTarget(Target("norm"), (OUT,)),
    "te": KeyTarget(Target("te", part="clip"), (OUT, IN)),
}


def pair(base, seed, rows=OUT, alpha=True):
    tensors = {f"{base}.lora_up.weight": randn(seed, rows, RANK), f"{base}.lora_down.weight": randn(seed + 1, RANK, IN)}
    return {**tensors, f"{base}.alpha": torch.tensor(1.0)} if alpha else tensors


FILES = {
    "a": {
        **pair("shared", 1),
        **pair("mine", 3),
        **pair("blind", 5),
        **{k: v for i, c in enumerate("qkv") for k, v in pair(f"to_{c}", 10 + 2 * i, rows=2).items()},
        **pair("te", 7),
        "norm.diff": torch.ones(OUT),
        "odd.hada_w1_a": torch.ones(2, 2),
        "odd.hada_w1_b": torch.ones(2, 2),
        "unknown.lora_up.weight": torch.ones(2, 2),
        "strange": torch.ones(1),
    },
    "b": {**pair("shared", 20), **pair("blind", 22, alpha=False), **pair("qkv", 24), "norm.diff": torch.ones(OUT)},
}


def tasks_with(strengths=(1.0, 1.0), clips=(1.0, 1.0), names=("a", "b")):
    adapters = [read_adapter(FILES[n], KEYS, name=n, fingerprint=n) for n in names]
    return [Task(a, s, c, (a.name,)) for a, s, c in zip(adapters, strengths, clips, strict=True)]


def calibration_of(tasks):
    """Runs shared and qkv, never blind."""
    root = torch.nn.ModuleDict({n: torch.nn.Linear(IN, OUT).double() for n in ("shared", "mine", "blind", "qkv")})
    stacks = [s for s in build_stacks(tasks) if s.target.part == "model"]

    def run_pass(index, tap):
        with torch.no_grad():
            for name in ("shared", "qkv"):
                root[name](randn(90 + index, 40, IN))

    return calibrate(root, tasks, stacks, run_pass)


def fates(result, unfolded=True):
    for account, name in zip(result.report.files, result.report.tasks, strict=True):
        assert sum(account.fates.values()) == account.keys == len(FILES[name])
        assert set(account.fates) <= set(FATE_WORDS)
    return [dict(account.fates) for account in result.report.files]


def test_every_fate_of_a_routed_merge():
    tasks = tasks_with()
    result = merge(tasks, SSRMerge(), calibration_of(tasks), unsupported="pass_through")
    assert fates(result) == [
        {"routed": 12, "passed_through": 6, "anchored": 3, "summed": 1, "host_patch": 2, "unmatched": 2},
        {"routed": 6, "anchored": 2, "summed": 1},
    ]
    reasons = {key: (fate, reason) for key, fate, reason in result.report.files[0].details}
    assert reasons["odd.hada_w1_a"][0] == "host_patch" and "LoHa" in reasons["odd.hada_w1_a"][1]
    assert reasons["strange"][0] == "unmatched" and set(reasons) == {
        "odd.hada_w1_a",
        "odd.hada_w1_b",
        "unknown.lora_up.weight",
        "strange",
    }


def test_without_routing_layers_are_merged():
    result = merge(tasks_with(), SumMerge(), unsupported="pass_through")
    assert fates(result) == [
        {"merged": 15, "passed_through": 6, "summed": 1, "host_patch": 2, "unmatched": 2},
        {"merged": 8, "summed": 1},
    ]


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_strength_zero_is_counted_as_absent_part_by_part(clip):
    result = merge(tasks_with((1.0, 0.0), (clip, 1.0)), SumMerge(), unsupported="pass_through")
    passed = {"passed_through": 21 if clip else 18}
    absent = {} if clip else {"strength_0": 3}
    assert fates(result) == [
        {**passed, "summed": 1, **absent, "host_patch": 2, "unmatched": 2},
        {"strength_0": 9},
    ]


def test_unsupported_keys_of_an_absent_lora_are_absent():
    result = merge(tasks_with((0.0, 1.0), (0.0, 1.0)), SumMerge(), unsupported="pass_through")
    assert fates(result)[0] == {"strength_0": 24, "unmatched": 2}


def test_an_absent_lora_is_never_refused():
    result = merge(tasks_with((0.0, 1.0), (0.0, 1.0)), SumMerge(), unsupported="refuse")
    assert fates(result)[0] == {"strength_0": 24, "unmatched": 2}


def test_refuse_names_file_key_layer_and_remedy():
    with pytest.raises(IncompatibleError, match=r"odd\.hada_w1_a.*LoHa") as caught:
        merge(tasks_with(), SumMerge())
    assert caught.value.file == "a" and caught.value.layer == "odd" and "pass_through" in caught.value.remedy


def test_unseen_layers_can_be_refused():
    tasks = tasks_with()
    calibration = calibration_of(tasks)
    with pytest.raises(Exception, match="blind") as caught:
        merge(tasks, SSRMerge(), calibration, unsupported="pass_through", unseen="refuse")
    assert caught.value.layer == "blind" and type(caught.value).__name__ == "CalibrationError"
    half = Calibration(
        calibration.tasks,
        {target: stats for target, stats in calibration.stats.items() if target.module_path == "qkv"},
        calibration.stack_tasks,
    )
    with pytest.raises(Exception, match="never ran"):
        merge(tasks, SSRMerge(), half, unsupported="pass_through", unseen="refuse")


def test_layers_that_never_ran_are_anchored_and_named_in_a_warning():
    tasks = tasks_with()
    report = merge(tasks, SSRMerge(), calibration_of(tasks), unsupported="pass_through").report
    assert [str(layer.target) for layer in report.layers if layer.status == "anchored"] == ["blind"]
    assert any("1 layer never ran" in w and "blind" in w for w in report.warnings)
    assert any("Not used: 2 of 26 keys of a" in w for w in report.warnings)


def test_markdown_and_json_tell_the_same_counts():
    tasks = tasks_with()
    report = merge(tasks, SSRMerge(), calibration_of(tasks), unsupported="pass_through").report
    text, data = report.to_markdown(), report.to_json()
    assert "- **a**: 26 keys: 12 routed, 6 passed through" in text
    assert data["files"][0]["fates"] == dict(report.files[0].fates) and data["files"][0]["keys"] == 26
    assert [layer["target"] for layer in data["layers"]] == ["blind", "mine", "qkv", "shared", "te"]
    assert all(f"- {warning}" in text for warning in report.warnings)
