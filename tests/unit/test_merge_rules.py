"""Strengths, vectors, dtypes, refusals of merge()."""

import json

import pytest
import torch
from helpers import F64, LAYER, calibrated, conflicting_tasks, deltas_of, linear64, lora, randn, rel, task, task_tokens

from ssr_core import (
    AverageMerge,
    CalibrationError,
    IncompatibleError,
    LoRALayer,
    SolveError,
    SSRMerge,
    SumMerge,
    Target,
    build_stacks,
    merge,
    merge_metadata,
)
from ssr_core.memory import bytes_to_solve, layers_at_once

OUT, IN, RANK = 7, 10, 3
CLIP = Target("te", part="clip")
NORM = (Target("norm"), "weight")
TE_BIAS = (CLIP, "bias")


def two(strengths, clips=(1.0, 1.0)):
    return [
        task(
            f"t{k}",
            {LAYER: lora(10 * k, OUT, IN, RANK), CLIP: lora(10 * k + 5, OUT, IN, RANK)},
            strength=strengths[k],
            clip=clips[k],
            vectors={NORM: randn(70 + k, OUT, dtype=torch.float32), TE_BIAS: randn(80 + k, OUT, dtype=torch.float32)},
        )
        for k in range(2)
    ]


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.3, -1.7), (2.0, 0.0)])
@pytest.mark.parametrize("clips", [(1.0, 1.0), (-0.5, 0.25), (0.0, 3.0)])
def test_sum_with_strengths_of_both_parts(strengths, clips):
    tasks = two(strengths, clips)
    result = merge(tasks, SumMerge())
    for target, by in ((LAYER, strengths), (CLIP, clips)):
        expected = sum(s * t.adapter.layers[target].delta() for s, t in zip(by, tasks, strict=True))
        assert rel(result.layers[target].delta(), expected) < 1e-12


@pytest.mark.parametrize(("strengths", "clips"), [((1.0, 1.0), (1.0, 1.0)), ((0.3, -1.7), (0.5, 2.0))])
def test_vectors_are_summed_by_strength(strengths, clips):
    tasks = two(strengths, clips)
    vectors = merge(tasks, SumMerge()).vectors
    for key, by in ((NORM, strengths), (TE_BIAS, clips)):
        expected = sum(s * t.adapter.vectors[key].double() for s, t in zip(by, tasks, strict=True))
        assert rel(vectors[key], expected) < 1e-6


def test_float64_vectors_keep_their_precision():
    vectors = [{NORM: randn(k, OUT)} for k in range(2)]
    tasks = [task(f"t{k}", lora(k, OUT, IN, RANK), vectors=vectors[k]) for k in range(2)]
    assert rel(merge(tasks, SumMerge()).vectors[NORM], vectors[0][NORM] + vectors[1][NORM]) < 1e-14


def test_strength_zero_is_the_same_as_not_being_there():
    tasks = two((0.8, 0.0), (0.0, 1.0))
    result = merge(tasks, AverageMerge())
    assert rel(result.layers[LAYER].delta(), 0.8 * tasks[0].adapter.layers[LAYER].delta()) < 1e-15
    assert torch.equal(result.layers[CLIP].delta(), tasks[1].adapter.layers[CLIP].delta())
    assert rel(result.vectors[NORM], 0.8 * tasks[0].adapter.vectors[NORM]) < 1e-7
    assert torch.equal(result.vectors[TE_BIAS].float(), tasks[1].adapter.vectors[TE_BIAS])


@pytest.mark.parametrize("tasks", [[], [0.0]])
def test_no_enabled_lora_is_an_error(tasks):
    loras = [task("t", lora(1, OUT, IN, RANK), strength=s, clip=0.0) for s in tasks]
    with pytest.raises(IncompatibleError, match="no LoRA is enabled"):
        merge(loras, SumMerge())


def test_a_method_that_needs_statistics_says_so():
    with pytest.raises(CalibrationError, match="ssr needs a calibration"):
        merge(conflicting_tasks(2, OUT, IN, RANK), SSRMerge())


def test_a_calibration_of_other_loras_or_prompts_is_refused():
    tasks = conflicting_tasks(2, OUT, IN, RANK)
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 30, IN)] for k in range(2)])
    stranger = task("stranger", lora(77, OUT, IN, RANK))
    with pytest.raises(IncompatibleError, match="stranger"):
        merge([tasks[0], stranger], SSRMerge(), calibration)
    other_prompt = type(tasks[1])(tasks[1].adapter, 1.0, 1.0, ("something else",))
    with pytest.raises(IncompatibleError, match="task1"):
        merge([tasks[0], other_prompt], SSRMerge(), calibration)


@pytest.mark.parametrize(
    ("inputs", "asked", "expected"),
    [
        ((torch.float16, torch.float16), None, torch.float16),
        ((torch.bfloat16, torch.bfloat16), None, torch.bfloat16),
        ((torch.float16, torch.bfloat16), None, torch.float32),
        ((torch.float16, torch.float32), None, torch.float32),
        ((torch.float32, torch.float64), None, torch.float64),
        ((torch.float32, torch.float32), torch.bfloat16, torch.bfloat16),
        ((torch.float16, torch.float16), torch.float32, torch.float32),
    ],
)
def test_dtype_of_the_result(inputs, asked, expected):
    tasks = [task(f"t{k}", lora(k, OUT, IN, RANK, dtype=d)) for k, d in enumerate(inputs)]
    layer = merge(tasks, SumMerge(), dtype=asked).layers[LAYER]
    assert layer.down.dtype == layer.up.dtype == expected
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[expected]
    assert rel(layer.delta(), sum(deltas_of(tasks))) < tolerance


def test_the_dtype_of_up_counts_too():
    """A file whose downs are float16 and whose ups are float32 must not lose its ups' precision."""
    layer = lora(1, OUT, IN, RANK)
    mixed = LoRALayer(layer.down.half(), layer.up.float())
    merged = merge([task("a", mixed)], SumMerge()).layers[LAYER]
    assert merged.up.dtype == torch.float32 and torch.equal(merged.up, mixed.up)


def overflowing(factor=1e9):
    layers = [lora(k, OUT, IN, RANK, dtype=torch.float32) for k in range(2)]
    return [LoRALayer(layer.down * factor, layer.up * factor) for layer in layers]


def test_float16_overflow_of_a_merged_layer_names_it():
    tasks = [task(f"t{k}", layer) for k, layer in enumerate(overflowing())]
    with pytest.raises(SolveError, match="float16") as caught:
        merge(tasks, SumMerge(), dtype=torch.float16)
    assert caught.value.layer == "layer"
    assert rel(merge(tasks, SumMerge(), dtype=torch.float32).layers[LAYER].delta(), sum(deltas_of(tasks))) < 1e-5


def test_float16_overflow_of_a_layer_that_passes_through_names_it():
    with pytest.raises(SolveError, match="float16") as caught:
        merge([task("a", overflowing()[0])], SumMerge(), dtype=torch.float16)
    assert caught.value.layer == "layer"


def test_float16_overflow_of_a_vector_names_it():
    vectors = {NORM: torch.full((OUT,), 1e6)}
    with pytest.raises(SolveError, match="norm"):
        merge([task("a", lora(1, OUT, IN, RANK), vectors=vectors)], SumMerge(), dtype=torch.float16)


@pytest.mark.parametrize("c", [1e-4, 1e4])
def test_unbalanced_files_still_fit_into_float16(c):
    """1e4-fold factors would overflow or vanish in float16 if they left as they came."""
    layers = [lora(k, OUT, IN, RANK, dtype=torch.float32) for k in range(2)]
    tasks = [task(f"t{k}", LoRALayer(y.down * c, y.up / c)) for k, y in enumerate(layers)]
    merged = merge(tasks, SumMerge(), dtype=torch.float16).layers[LAYER]
    assert rel(merged.delta(), sum(layer.delta() for layer in layers)) < 2e-3
    assert torch.allclose(merged.down.double().norm(dim=1), merged.up.double().norm(dim=0), rtol=2e-3)


def test_input_tensors_are_not_changed():
    tasks = two((0.3, -1.7))
    before = [(t.adapter.layers[LAYER].down.clone(), t.adapter.layers[LAYER].up.clone()) for t in tasks]
    merge(tasks, SumMerge())
    for t, (down, up) in zip(tasks, before, strict=True):
        assert torch.equal(t.adapter.layers[LAYER].down, down) and torch.equal(t.adapter.layers[LAYER].up, up)


def test_metadata_holds_the_recipe():
    tasks = conflicting_tasks(2, OUT, IN, RANK)
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 30, IN)] for k in range(2)])
    metadata = merge_metadata(tasks, SSRMerge(ridge=0.25, anchor="gains"), calibration, {"dtype": "bf16"})
    recipe = json.loads(metadata["ssr_merge"])
    assert recipe["method"] == "ssr" and recipe["dtype"] == "bf16"
    defaults = {"balance": True, "refine": True, "joint_weight": 1.0, "refine_ridge": 0.1}
    assert recipe["parameters"] == {"ridge": 0.25, "anchor": "gains", "neutral_weight": 0.05, **defaults}
    assert [s["sha256"] for s in recipe["sources"]] == ["task0", "task1"]
    assert recipe["sources"][0]["prompts"] == ["task0"] and recipe["calibration"]["strengths"] == [[1.0, 1.0]] * 2
    assert metadata["modelspec.title"] == "task0 + task1" and all(isinstance(v, str) for v in metadata.values())


def test_merged_tensors_are_plain_and_own_their_memory():
    layer = merge(conflicting_tasks(2, OUT, IN, RANK), SumMerge()).layers[LAYER]
    for tensor in (layer.down, layer.up):
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * 8
    assert layer.delta().dtype == F64


def test_a_chunk_never_holds_more_than_its_largest_layer_allows():
    """Small layers first would let one chunk take dozens of large ones."""
    layers = {Target(f"l{i}"): lora(i, 5, 600, 300 if i > 3 else 2) for i in range(8)}
    stacks = build_stacks([task(f"t{k}", layers) for k in range(3)])
    order = sorted(stacks, key=bytes_to_solve, reverse=True)
    assert [max(stack.rank_bounds) for stack in order] == [300] * 4 + [2] * 4
    largest = bytes_to_solve(order[0])
    assert layers_at_once(largest, torch.device("cuda")) * largest <= 1 << 27
    assert layers_at_once(largest, torch.device("cpu")) == 1 < layers_at_once(1 << 20, torch.device("cpu")) == 16
    seen = []
    small = [task(f"t{k}", {Target(f"l{i}"): lora(i, 5, 6, 2) for i in range(3)}) for k in range(2)]
    merge(small, SumMerge(), tick=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (3, 3)]
