"""Stacks: slices apart, overlaps together, odd ranks, and the dense computation behind all of them."""

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    calibrated,
    dense_by_module,
    linear64,
    lora,
    output_error,
    randn,
    reference_delta,
    rel,
    svd_coordinates,
    task,
    task_tokens,
)
from torch import nn

from ssr_core import IncompatibleError, LoRALayer, SSRMerge, SumMerge, Target, build_stacks, calibrate, merge

IN = 9
Q, K, V = (Target("qkv", (4 * i, 4)) for i in range(3))
WHOLE = Target("qkv")


def split_layers(seed, slices=(Q, K, V), rank=2):
    return {target: lora(seed + i, 4, IN, rank, alpha=1.0) for i, target in enumerate(slices)}


def run(tasks, tokens, method=None, **more):
    root = nn.ModuleDict({"qkv": linear64(IN, 12)})
    stacks = build_stacks(tasks, **more)
    calibration = calibrate(root, tasks, stacks, lambda index, tap: root["qkv"](tokens[index]))
    return stacks, calibration


TOKENS = [task_tokens(k, 50 + 9 * k, IN) for k in range(3)]


def test_disjoint_slices_stay_apart_and_are_solved_apart():
    tasks = [task(f"t{k}", split_layers(10 * k)) for k in range(2)]
    stacks, calibration = run(tasks, TOKENS)
    assert [stack.target for stack in stacks] == [Q, K, V]
    result = merge(tasks, SSRMerge(ridge=0.01), calibration)
    for target in (Q, K, V):
        pairs = [(t.adapter.layers[target].down, t.adapter.layers[target].up * 0.5) for t in tasks]
        assert rel(result.layers[target].delta(), reference_delta(pairs, TOKENS[:2], ridge=0.01)) < 1e-9


def test_fused_and_split_files_form_one_stack_with_the_dense_answer():
    fused = task("fused", {WHOLE: lora(1, 12, IN, 3)}, strength=0.8)
    split = task("split", split_layers(10), strength=1.2)
    tasks = [fused, split]
    stacks, calibration = run(tasks, TOKENS)
    assert [(s.target, s.tasks, s.rank) for s in stacks] == [(WHOLE, (0, 1), 9)]
    dense = [
        0.8 * dense_by_module(fused.adapter.layers, {"qkv": 12})["qkv"],
        1.2 * dense_by_module(split.adapter.layers, {"qkv": 12})["qkv"],
    ]
    # The dense change of the split file in factors of its own: any factorisation must do.
    pairs = [svd_coordinates(torch.eye(IN, dtype=F64), delta) for delta in dense]
    result = merge(tasks, SSRMerge(ridge=0.02), calibration)
    assert rel(result.layers[WHOLE].delta(), reference_delta(pairs, TOKENS[:2], ridge=0.02)) < 1e-9
    total = merge(tasks, SumMerge()).layers[WHOLE].delta()
    assert rel(total, sum(dense)) < 1e-12


def test_partly_overlapping_rows_merge_into_their_union():
    wide, narrow = Target("qkv", (2, 6)), Target("qkv", (6, 4))
    tasks = [
        task("a", {wide: lora(1, 6, IN, 2)}),
        task("b", {narrow: lora(2, 4, IN, 2), Target("qkv", (0, 2)): lora(3, 2, IN, 1)}),
    ]
    stacks = build_stacks(tasks)
    assert [(s.target.out_slice, s.tasks) for s in stacks] == [((0, 2), (1,)), ((2, 8), (0, 1))]
    result = merge(tasks, SumMerge())
    dense = [dense_by_module(t.adapter.layers, {"qkv": 12})["qkv"] for t in tasks]
    assert rel(dense_by_module(result.layers, {"qkv": 12})["qkv"], sum(dense)) < 1e-12


def test_fusing_slices_never_fits_the_calibration_tokens_worse():
    tasks = [task(f"t{k}", split_layers(10 * k)) for k in range(3)]
    method = SSRMerge(ridge=1e-9)
    _, apart = run(tasks, TOKENS)
    stacks, fused = run(tasks, TOKENS, fuse_slices=True)
    assert [s.target for s in stacks] == [Target("qkv", (0, 12))]
    separate = dense_by_module(merge(tasks, method, apart).layers, {"qkv": 12})["qkv"]
    answer = method.merge(stacks, [fused.stats_for(stacks[0], [0, 1, 2])], torch.device("cpu"))[0]
    together = answer.up @ answer.down
    alone = [dense_by_module(t.adapter.layers, {"qkv": 12})["qkv"] for t in tasks]
    errors = [output_error(delta, alone, TOKENS) for delta in (together, separate)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert errors[0] < 0.9 * errors[1]  # here the other slices' coordinates do help


def test_absent_tasks_leave_the_stack():
    tasks = [task("a", lora(1, 5, IN, 2)), task("b", lora(2, 5, IN, 2), strength=0.0), task("c", lora(3, 5, IN, 2))]
    (stack,) = build_stacks(tasks)
    assert stack.tasks == (0, 2)


def test_parts_of_the_model_are_told_apart():
    clip = Target("layer", part="clip")
    tasks = [task("a", {LAYER: lora(1, 5, IN, 2)}), task("b", {clip: lora(2, 5, IN, 2)})]
    assert [stack.tasks for stack in build_stacks(tasks)] in ([(0,), (1,)], [(1,), (0,)])


def test_different_widths_name_file_and_layer():
    with pytest.raises(IncompatibleError) as caught:
        build_stacks([task("a", lora(1, 5, 8, 2)), task("b", lora(2, 5, 9, 2))])
    assert caught.value.file == "b" and caught.value.layer == "layer"


def solved(pairs, tokens, inp, out, ridge=0.01):
    tasks = [task(f"t{k}", LoRALayer(*pair)) for k, pair in enumerate(pairs)]
    calibration = calibrated(linear64(inp, out), tasks, [[x] for x in tokens])
    return merge(tasks, SSRMerge(ridge=ridge), calibration)


def test_ranks_above_the_number_of_inputs():
    pairs = [(randn(k, 9, 5), randn(k + 9, 7, 9)) for k in range(2)]
    tokens = [task_tokens(k, 40, 5) for k in range(2)]
    result = solved(pairs, tokens, 5, 7)
    assert rel(result.layers[LAYER].delta(), reference_delta(pairs, tokens, ridge=0.01)) < 1e-9
    assert result.layers[LAYER].rank == 10


@pytest.mark.parametrize("where", ["down", "up", "both", "zero rows"])
def test_rank_deficient_factors(where):
    pairs = []
    for k in range(2):
        down, up = randn(k, 4, IN), randn(k + 9, 7, 4)
        if where in ("down", "both"):
            down[3] = down[0] - 2 * down[1]
        if where in ("up", "both"):
            up[:, 0] = 0.5 * up[:, 2]
        if where == "zero rows":
            down[1] = 0
            up[:, 3] = 0
        pairs.append((down, up))
    tokens = [task_tokens(k, 40, IN) for k in range(2)]
    result = solved(pairs, tokens, IN, 7)
    assert rel(result.layers[LAYER].delta(), reference_delta(pairs, tokens, ridge=0.01)) < 1e-8


def test_more_rank_than_outputs():
    pairs = [(randn(k, 6, IN), randn(k + 9, 2, 6)) for k in range(2)]
    tokens = [task_tokens(k, 40, IN) for k in range(2)]
    result = solved(pairs, tokens, IN, 2)
    assert rel(result.layers[LAYER].delta(), reference_delta(pairs, tokens, ridge=0.01)) < 1e-8


def test_an_untrained_lora_neither_acts_nor_disturbs():
    layer = lora(1, 7, IN, 3)
    pairs = [(layer.down, layer.up), (randn(5, 4, IN), torch.zeros(7, 4, dtype=F64))]
    tokens = [task_tokens(k, 40, IN) for k in range(2)]
    merged = solved(pairs, tokens, IN, 7, ridge=1e-9).layers[LAYER].delta()
    # Task 1 wants 0 on its tokens, task 0 its own LoRA: one block against two sets of tokens.
    z0, z1 = (x @ torch.linalg.svd(layer.down, full_matrices=False).Vh.T for x in tokens)
    s0, s1 = z0.T @ z0 / 40, z1.T @ z1 / 40
    vh = torch.linalg.svd(layer.down, full_matrices=False).Vh
    expected = layer.delta() @ vh.T @ s0 @ torch.linalg.inv(s0 + s1) @ vh
    assert rel(merged, expected) < 1e-6


def test_all_loras_untrained_give_zero():
    pairs = [(randn(k, 3, IN), torch.zeros(7, 3, dtype=F64)) for k in range(2)]
    result = solved(pairs, [task_tokens(k, 40, IN) for k in range(2)], IN, 7)
    assert torch.equal(result.layers[LAYER].delta(), torch.zeros(7, IN, dtype=F64))
