"""NP-LoRA from factors equals the dense formula with its d x d projector, layer by layer and row by row."""

from itertools import pairwise

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    conflicting_tasks,
    deltas_of,
    dense_by_module,
    lora,
    np_lora_delta,
    protected_directions,
    randn,
    rel,
    task,
)

from ssr_core import IncompatibleError, LoRALayer, NPLoRAMerge, SumMerge, Target, merge

OUT, IN, RANK = 14, 20, 4
KERNELS = {"linear": (), "conv2d": (2, 2), "conv1d": (5,), "pointwise": (1, 1)}


def overlapping(count=2, *, kernel=(), seed=5, **more):
    """Tasks whose downs share directions, so that a projection has much to remove."""
    shared = randn(seed + 900, RANK, IN)
    tasks = []
    for k in range(count):
        own = lora(seed + k, OUT, IN, RANK, kernel=kernel, **more)
        down = own.down.double() + 0.5 * randn(seed + 50 + k, RANK, RANK) @ shared
        tasks.append(
            task(f"task{k}", LoRALayer(down.to(own.down), own.up, own.alpha, own.kernel), strength=1 - 0.3 * k)
        )
    return tasks


def merged(tasks, *args, **more):
    return merge(tasks, NPLoRAMerge(*args, **more)).layers[LAYER].delta()


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("mu", [0.1, 0.5, 7.0])
def test_equals_the_dense_formula(kind, mu):
    tasks = overlapping(kernel=KERNELS[kind], alpha=1.5)
    content, style = deltas_of(tasks)
    result = merge(tasks, NPLoRAMerge(mu)).layers[LAYER]
    expected = np_lora_delta([content], [style], mu / (1 + mu), protected_directions(style))
    assert rel(result.delta(), expected) < 1e-13
    assert rel(content + style, expected) > 1e-2
    assert result.kernel == KERNELS[kind] and result.rank == 2 * RANK


def test_mu_zero_is_the_plain_sum():
    tasks = overlapping(3)
    assert rel(merged(tasks, 0.0), sum(deltas_of(tasks))) < 1e-14


def test_hard_leaves_nothing_of_the_content_in_the_styles_row_space():
    tasks = overlapping()
    content, style = deltas_of(tasks)
    v = protected_directions(style)
    rest = merged(tasks, hard=True) - style
    assert (content @ v).norm() > 0.3 * content.norm()
    assert (rest @ v).norm() < 1e-14 * content.norm()
    assert rel(rest, content - content @ v @ v.T) < 1e-13
    assert rel(merged(tasks, 1e12) - style, rest) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_in_the_dtypes_of_files_leaves_only_their_rounding(dtype):
    tasks = overlapping(dtype=dtype)
    content, style = deltas_of(tasks)
    layer = merge(tasks, NPLoRAMerge(hard=True)).layers[LAYER]
    assert layer.down.dtype == dtype
    leak = (layer.delta() - style) @ protected_directions(style)
    assert leak.norm() < 4 * torch.finfo(dtype).eps * (content.norm() + style.norm())


def test_what_is_left_in_the_protected_directions_falls_with_mu():
    tasks = overlapping()
    content, style = deltas_of(tasks)
    v = protected_directions(style)
    mus = [0.0, 0.1, 0.5, 1.0, 3.0, 100.0]
    rests = [merged(tasks, mu) - style for mu in mus] + [merged(tasks, hard=True) - style]
    inside = [float((rest @ v).norm() / (content @ v).norm()) for rest in rests]
    assert inside[:-1] == pytest.approx([1 / (1 + mu) for mu in mus], rel=1e-11)
    assert all(a > b for a, b in pairwise(inside))
    outside = [rest - rest @ v @ v.T for rest in rests]
    assert all(rel(one, outside[0]) < 1e-13 for one in outside)


@pytest.mark.parametrize("index", [0, 1])
def test_invariant_under_refactoring(index):
    tasks = overlapping()
    layer = tasks[index].adapter.layers[LAYER]
    mix = randn(77, RANK, RANK) + 2 * torch.eye(RANK, dtype=F64)
    other = list(tasks)
    factors = LoRALayer(1e3 * mix @ layer.down, layer.up @ torch.linalg.inv(mix) / 1e3, layer.alpha)
    other[index] = task(tasks[index].name, factors, strength=tasks[index].strength_model)
    for options in ({}, {"energy": 0.8}, {"hard": True, "count": 2}):
        assert rel(merged(other, **options), merged(tasks, **options)) < 1e-11


@pytest.mark.parametrize("factor", [0.01, -1.0, 30.0])
def test_the_styles_strength_does_not_change_what_is_protected(factor):
    content, style = overlapping()
    stronger = type(style)(style.adapter, factor * style.strength_model, 1.0, style.prompts)
    difference = merged([content, stronger]) - merged([content, style])
    assert rel(difference, (factor - 1) * deltas_of([style])[0]) < 1e-12


@pytest.mark.parametrize("count", [1, 2, 3, RANK, 50])
def test_directions_by_count(count):
    tasks = overlapping()
    content, style = deltas_of(tasks)
    v = protected_directions(style, count=count)
    assert v.shape[1] == min(count, RANK)
    assert rel(merged(tasks, hard=True, count=count), np_lora_delta([content], [style], 1.0, v)) < 1e-12


@pytest.mark.parametrize("energy", [1e-6, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_directions_by_energy_are_the_fewest_that_hold_it(energy):
    tasks = overlapping()
    content, style = deltas_of(tasks)
    v = protected_directions(style, energy)
    assert (style @ v).norm() ** 2 >= (energy - 1e-12) * style.norm() ** 2
    assert v.shape[1] == 1 or (style @ v[:, :-1]).norm() ** 2 < energy * style.norm() ** 2
    assert rel(merged(tasks, hard=True, energy=energy), np_lora_delta([content], [style], 1.0, v)) < 1e-12


def test_count_and_energy_limit_each_other():
    tasks = overlapping()
    content, style = deltas_of(tasks)
    for energy, count in ((1e-6, 3), (1.0, 1)):
        v = protected_directions(style, count=1)
        expected = np_lora_delta([content], [style], 1.0, v)
        assert rel(merged(tasks, hard=True, energy=energy, count=count), expected) < 1e-12


@pytest.mark.parametrize("position", [0, 1, 2, -1, -3])
def test_several_contents_are_projected_each_and_summed(position):
    tasks = overlapping(3)
    deltas = deltas_of(tasks)
    style = deltas.pop(position)
    expected = np_lora_delta(deltas, [style], 1 / 3, protected_directions(style))
    assert rel(merged(tasks, protected=(position,)), expected) < 1e-13
    assert rel(merged(tasks, protected=(position,)), sum(deltas) + style) > 1e-2


@pytest.mark.parametrize("twice", [False, True])
def test_several_protected_loras_are_protected_together(twice):
    tasks = overlapping(4)
    if twice:  # the same row space two times must not be projected twice
        tasks[2] = task("again", tasks[1].adapter.layers[LAYER])
    a, b, c, d = deltas_of(tasks)
    directions = torch.cat([protected_directions(one) for one in (b, c)], dim=1)
    v = torch.linalg.svd(directions, full_matrices=False).U[:, : RANK if twice else 2 * RANK]
    assert rel(merged(tasks, protected=(1, 2)), np_lora_delta([a, d], [b, c], 1 / 3, v)) < 1e-11


def test_a_layer_without_the_protected_lora_is_a_plain_sum():
    a, b, c = conflicting_tasks(3, OUT, IN, RANK, seed=3)
    style = task("style", {Target("other"): c.adapter.layers[LAYER]})
    result = merge([a, b, style], NPLoRAMerge(hard=True))
    assert rel(result.layers[LAYER].delta(), sum(deltas_of([a, b]))) < 1e-13
    assert torch.equal(result.layers[Target("other")].delta(), c.adapter.layers[LAYER].delta())


def test_a_style_of_zeros_protects_nothing():
    content, style = overlapping()
    zeros = task("zeros", LoRALayer(style.adapter.layers[LAYER].down, torch.zeros(OUT, RANK, dtype=F64)))
    assert rel(merged([content, zeros], hard=True), deltas_of([content])[0]) < 1e-13


Q, K, V = ((at, 6) for at in (0, 6, 12))
SPLITS = {
    "style split": ([None], [Q, K, V]),
    "content split": ([Q, K, V], [None]),
    "both split": ([Q, K, V], [Q, K, V]),
    "neither split": ([None], [None]),
    "style has q alone": ([None], [Q]),
    "content has k alone": ([K], [None]),
    "rows that overlap in part": ([(0, 12)], [(6, 12)]),
}


def sliced(name, slices, seed, width=30):
    layers = {
        Target("qkv", rows): lora(seed + at, 18 if rows is None else rows[1], width, 3, alpha=2.0)
        for at, rows in enumerate(slices)
    }
    return task(name, layers)


@pytest.mark.parametrize("case", SPLITS)
def test_rows_that_a_file_names_apart_are_projected_by_the_styles_same_rows(case):
    tasks = [sliced("content", SPLITS[case][0], 40), sliced("style", SPLITS[case][1], 60)]
    content, style = (dense_by_module(one.adapter.layers, {"qkv": 18})["qkv"] for one in tasks)
    edges = {0, 18} | {row for side in SPLITS[case] for s in side if s for row in (s[0], s[0] + s[1])}
    expected = torch.zeros(18, 30, dtype=F64)
    for start, end in pairwise(sorted(edges)):
        rows = slice(start, end)
        v = protected_directions(style[rows]) if style[rows].any() else torch.zeros(30, 0, dtype=F64)
        expected[rows] = np_lora_delta([content[rows]], [style[rows]], 1.0, v)
    found = merge(tasks, NPLoRAMerge(hard=True)).layers
    assert rel(dense_by_module(found, {"qkv": 18})["qkv"], expected) < 1e-12
    assert rel(content + style, expected) > 0.1


def test_mu_zero_keeps_the_rank_of_rows_apart():
    tasks = [sliced("content", [None], 40), sliced("style", [Q, K, V], 60)]
    by_sum = merge(tasks, SumMerge()).layers[Target("qkv")]
    assert merge(tasks, NPLoRAMerge(0.0)).layers[Target("qkv")].rank == by_sum.rank == 12
    assert merge(tasks, NPLoRAMerge(0.5)).layers[Target("qkv")].rank == 9 + 3 * 3


def test_the_report_says_what_was_removed():
    tasks = overlapping()
    content, style = deltas_of(tasks)
    result = merge(tasks, NPLoRAMerge(0.5, energy=0.9))
    v = protected_directions(style, 0.9)
    left = content - content @ v @ v.T / 3
    measures = result.report.layers[0].measures
    assert measures["protected directions"] == v.shape[1]
    expected = 1 - float(left.norm() / content.norm()) ** 2
    assert measures["share of the others' energy removed"] == pytest.approx(expected, rel=1e-11)
    assert f"energy removed: {expected:.3g} on average" in result.report.to_markdown()
    assert "1 merged without routing" in result.report.to_markdown()
    assert result.report.warnings == ()
    assert result.report.notes == ("Protected: task1. Kept out of its directions: task0.",)


@pytest.mark.parametrize(
    ("options", "count", "word"),
    [
        ({}, 1, "at least two"),
        ({"protected": (2,)}, 2, "from 0 to 1"),
        ({"protected": (-3,)}, 2, "to -2"),
        ({"protected": ()}, 2, "indices"),
        ({"protected": (0, 1)}, 2, "unprotected"),
    ],
)
def test_parts_that_are_not_taken_are_refused(options, count, word):
    with pytest.raises(IncompatibleError, match=word):
        merge(overlapping(count), NPLoRAMerge(**options))


@pytest.mark.parametrize(("off", "word"), [(1, "protected LoRA has strength 0"), (0, "is protected")])
def test_a_part_of_strength_0_is_refused(off, word):
    tasks = overlapping()
    tasks[off] = type(tasks[off])(tasks[off].adapter, 0.0, 0.0)
    with pytest.raises(IncompatibleError, match=word):
        merge(tasks, NPLoRAMerge())


@pytest.mark.parametrize(
    "options",
    [
        {"mu": -0.1},
        {"mu": float("nan")},
        {"mu": float("inf")},
        {"energy": 0.0},
        {"energy": 1.1},
        {"count": -1},
        {"directions": "wishes"},
    ],
)
def test_parameters_out_of_range_are_refused(options):
    with pytest.raises(IncompatibleError, match="NP-LoRA"):
        NPLoRAMerge(**options)
