"""LoHa, LoKr, DoRA and the like as factors: the same merge as the plain LoRA of the same delta, every key accounted."""

import json
import math

import pytest
import torch
from helpers import F64, LAYER, calibrated, linear64, lora, randn, rel, task, task_tokens

from ssr_core import (
    METHODS,
    Adapter,
    ConvertOptions,
    IncompatibleError,
    KeyTarget,
    LoRALayer,
    SumMerge,
    Target,
    Task,
    convert,
    converted_groups,
    merge,
    merge_metadata,
    read_adapter,
)
from ssr_core.file_account import FATE_WORDS

OUT, IN, RANK = 24, 20, 3
EXACT = ConvertOptions(max_rank=1024, tolerance=1e-12)
NORM, CLIP = Target("norm"), Target("te", part="clip")
KEYS = {
    "layer": KeyTarget(LAYER, (OUT, IN)),
    "conv": KeyTarget(Target("conv"), (OUT, 4, 3, 3)),
    "rows": KeyTarget(Target("fused", (4, 8)), (OUT, IN)),
    "norm": KeyTarget(NORM, (OUT,)),
    "embed": KeyTarget(Target("embed"), (OUT, IN), tapped=False),
    "te": KeyTarget(CLIP, (OUT, IN)),
    "ok": KeyTarget(Target("ok"), (OUT, IN)),
}
GOOD = {"ok.lora_up.weight": randn(1, OUT, RANK), "ok.lora_down.weight": randn(2, RANK, IN)}


def loha(base, shape=(OUT, IN), seed=5):
    """Four factors, and the matrix that they mean."""
    width = math.prod(shape[1:])
    w = {name: randn(seed + i, *size) for i, (name, size) in enumerate(_sizes(shape[0], width).items())}
    dense = (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
    return {f"{base}.hada_{name}": value for name, value in w.items()}, dense.reshape(shape)


def _sizes(out, width):
    return {"w1_a": (out, 2), "w1_b": (2, width), "w2_a": (out, 2), "w2_b": (2, width)}


def file_of(*bases):
    """A file of LoHas beside one plain layer; its dense changes by target and parameter."""
    tensors, truth = dict(GOOD), {}
    for base in bases:
        entry = KEYS[base]
        shape = (entry.out_features, *entry.weight_shape[1:])
        keys, dense = loha(base, shape, seed=len(base))
        tensors |= keys
        truth[(entry.target, entry.parameter)] = dense
    return tensors, truth


def converted(tensors, truth, options=EXACT, **more):
    adapter = read_adapter(tensors, KEYS, name="file", fingerprint="hash")
    return convert(adapter, options, lambda group: truth[(group.target, group.parameter)], **more)


@pytest.mark.parametrize("base", ["layer", "conv", "rows", "te", "embed"])
def test_the_factors_mean_the_change(base):
    tensors, truth = file_of(base)
    adapter = converted(tensors, truth)
    target = KEYS[base].target
    ((_, dense),) = truth.items()
    records = {record.key: record for record in adapter.records}
    assert list(records) == list(tensors) and not adapter.dense
    for key in tensors.keys() - GOOD.keys():
        assert records[key].status == "converted" and "LoHa" in records[key].reason and records[key].target == target
    if base == "embed":  # hooks cannot watch it: added as it is
        assert torch.equal(adapter.vectors[(target, "weight")], dense) and target not in adapter.layers
    else:
        assert rel(adapter.layers[target].delta(), dense.flatten(1)) < 1e-10
        assert adapter.layers[target].kernel == KEYS[base].kernel and adapter.conversions[0].rank == 4
    assert adapter.conversions[0].error < 1e-10 and adapter.convert_options == EXACT


def plain_and_converted(method):
    """The same delta as an ordinary LoRA and as dense; for the paper's formula in the converted coordinates, turned."""
    plain = lora(3, OUT, IN, RANK, alpha=1.5)
    tensors = {**GOOD, "layer.diff": plain.delta()}
    dense = converted(tensors, {(LAYER, "weight"): plain.delta()})
    if method == "paper":  # it depends on how up and down share the scale, but not on a rotation
        balanced, turn = dense.layers[LAYER], torch.linalg.qr(randn(9, RANK, RANK)).Q
        plain = LoRALayer(turn @ balanced.down, balanced.up @ turn.T)
    return Adapter("plain", "plain", {LAYER: plain}), dense


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_it_like_the_plain_lora_of_the_same_delta(method, strength, dtype):
    plain, dense = plain_and_converted(method)
    if dtype == torch.float32:
        layer = dense.layers[LAYER]
        dense = Adapter("d", "d", {LAYER: LoRALayer(layer.down.float(), layer.up.float())})
    tokens, answers = [task_tokens(k, 50, IN) for k in range(2)], []
    for adapter in (plain, Adapter("dense", "dense", {LAYER: dense.layers[LAYER]})):
        tasks = [Task(adapter, strength, 1.0, ("p",)), task("other", lora(4, OUT, IN, 4), strength=0.8)]
        calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens])
        answers.append(merge(tasks, METHODS[method](), calibration, dtype=F64).layers[LAYER].delta())
    assert rel(answers[1], answers[0]) < (1e-6 if dtype == F64 else 1e-4)


@pytest.mark.parametrize("rest", ["pass_through", "drop"])
def test_what_the_cap_leaves_is_reported_and_advised(rest):
    tensors, truth = file_of("layer")
    options = ConvertOptions(max_rank=2, tolerance=1e-3, rest=rest)
    adapter = converted(tensors, truth, options)
    (one,) = adapter.conversions
    left = truth[(LAYER, "weight")] - adapter.layers[LAYER].delta()
    values = torch.linalg.svdvals(truth[(LAYER, "weight")])
    assert one.rank == 2 and one.error == pytest.approx(float(left.norm() / values.norm()), rel=1e-6)
    assert one.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-6)
    assert one.rest_kept == (rest == "pass_through")
    report = merge([Task(adapter)], SumMerge()).report
    (warning,) = (w for w in report.warnings if "convert_rank" in w)
    assert ("is lost" in warning) == (rest == "drop") and ("not in the saved file" in warning) == one.rest_kept
    assert f"{one.error:.0%}" in warning and "layer" in warning and "rank 2" in warning
    data = json.loads(json.dumps(report.to_json()))["files"][0]
    assert data["conversion_error"] == one.error and data["fates"] == {"passed_through": 2, "converted": 4}
    assert f"largest relative error {one.error:.1e}" in report.files[0].summary()


@pytest.mark.parametrize("tolerance", [0.0, 1e-12, 1e-3])
def test_no_warning_where_nothing_but_rounding_is_left(tolerance):
    tensors, truth = file_of("layer", "conv")
    exact = {key: value.float() for key, value in truth.items()}
    for rank in (12, 1024):
        adapter = converted(tensors, exact, ConvertOptions(max_rank=rank, tolerance=tolerance))
        report = merge([Task(adapter)], SumMerge()).report
        short = [one for one in adapter.conversions if one.rest_kept]
        assert bool(short) == any("convert_rank" in warning for warning in report.warnings)
        assert max(one.error for one in adapter.conversions) <= max(tolerance, 1e-6)
    assert not short


def test_accounts_add_up_to_the_keys_of_the_file():
    tensors, truth = file_of("layer", "conv", "rows", "embed", "te")
    tensors |= {"norm.diff": randn(3, OUT), "nobody.hada_w1_a": randn(4, 2, 2), "strange": randn(5, 1)}
    tensors |= {"layer.alpha": torch.tensor(2.0), "norm.alpha": torch.tensor(2.0)}
    adapter = converted(tensors, truth)
    for strengths in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0)):
        (account,) = merge([Task(adapter, *strengths)], SumMerge()).report.files
        assert sum(account.fates.values()) == account.keys == len(tensors) and set(account.fates) <= set(FATE_WORDS)
    (account,) = merge([Task(adapter)], SumMerge()).report.files
    assert account.fates == {"passed_through": 2, "converted": 21, "summed": 1, "unmatched": 3}
    assert {key for key, fate, _ in account.details if fate == "converted"} == {
        key for key in tensors if "hada" in key and "nobody" not in key
    } | {"layer.alpha"}


def test_only_the_wanted_parts_are_converted_and_rank_zero_converts_nothing():
    tensors, truth = file_of("layer", "te")
    model = converted(tensors, truth, parts=["model"])
    assert [group.target for group in model.dense] == [CLIP] and CLIP not in model.layers and LAYER in model.layers
    assert {r.key for r in model.keys_with("unsupported")} == {key for key in tensors if key.startswith("te")}
    both = convert(model, EXACT, lambda group: truth[(group.target, group.parameter)])
    assert not both.dense and len(both.conversions) == 2 and not both.keys_with("unsupported")
    adapter = read_adapter(tensors, KEYS, name="file", fingerprint="hash")
    assert convert(adapter, ConvertOptions(max_rank=0), _never) is adapter
    assert convert(adapter, EXACT, _never, parts=[]) is adapter


def _never(group):
    raise AssertionError(f"{group.target} was computed again")


def test_known_groups_are_taken_over_without_computing_them():
    tensors, truth = file_of("layer", "conv", "embed")
    first = converted(tensors, truth)
    read = read_adapter(tensors, KEYS, name="file", fingerprint="hash")
    again = convert(read, EXACT, _never, known=converted_groups(first))
    assert again.records == first.records and again.conversions == first.conversions
    for target, layer in first.layers.items():
        assert again.layers[target].down is layer.down or target == Target("ok")
    some = {group: one for group, one in converted_groups(first).items() if group.target != LAYER}
    seen = []

    def change(group):
        seen.append(group.target)
        return truth[(group.target, group.parameter)]

    partly = convert(read, EXACT, change, known=some)
    assert seen == [LAYER] and torch.equal(partly.layers[LAYER].down, first.layers[LAYER].down)


@pytest.mark.parametrize("base", ["layer", "conv", "rows", "embed"])
@pytest.mark.parametrize("damage", ["transposed", "flat", "nan", "inf", "one value"])
def test_changes_of_another_shape_or_not_finite_are_refused_by_name(base, damage):
    tensors, truth = file_of(base)
    ((key, dense),) = truth.items()
    bad = {
        "transposed": dense.transpose(0, 1),
        "flat": dense.flatten(),
        "nan": dense.clone().index_fill_(0, torch.tensor(1), math.nan),
        "inf": dense * math.inf,
        "one value": dense[:1],
    }[damage]
    with pytest.raises(IncompatibleError) as caught:
        converted(tensors, {key: bad})
    assert caught.value.file == "file" and caught.value.layer == str(KEYS[base].target)
    assert f"{base}.hada_" in str(caught.value) and "LoHa" in str(caught.value) and caught.value.remedy


def test_cancel_between_two_groups():
    tensors, truth = file_of("layer", "conv")
    calls = []

    def tick():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(tensors, truth, tick=tick)


def test_the_file_dtype_of_plain_layers_decides_the_merged_one():
    tensors, truth = file_of("layer")
    halves = {key: value.half() if key in GOOD else value for key, value in tensors.items()}
    single = {key: value.float() for key, value in truth.items()}
    assert merge([Task(converted(halves, single))], SumMerge()).layers[LAYER].down.dtype == torch.float16
    alone = {key: value for key, value in tensors.items() if key not in GOOD}
    assert merge([Task(converted(alone, single))], SumMerge()).layers[LAYER].down.dtype == torch.float32


def test_metadata_names_the_conversion():
    tensors, truth = file_of("layer")
    text = merge_metadata([Task(converted(tensors, truth)), task("p", lora(1, OUT, IN, 2))], SumMerge(), None)
    sources = json.loads(text["ssr_merge"])["sources"]
    assert sources[0]["convert"] == {"max_rank": 1024, "tolerance": 1e-12, "rest": "pass_through"}
    assert sources[1]["convert"] is None


def test_no_tolerance_at_all_still_ends_at_the_rank_that_the_change_has():
    """On the randomised path float32 leaves a few 1e-7 of any matrix: that is rounding, not a rest."""
    keys = {"layer": KeyTarget(LAYER, (700, 640))}
    adapter = read_adapter({"layer.diff": torch.zeros(700, 640)}, keys, name="file", fingerprint="1")
    change = (randn(1, 700, 16) @ randn(2, 16, 640)).float()
    found = convert(adapter, ConvertOptions(max_rank=64, tolerance=0.0), lambda group: change)
    (one,) = found.conversions
    assert (one.rank, one.rest_kept) == (16, False) and one.error < 2e-6
