"""Truncation by outputs: against Eckart and Young on the inputs themselves, and against every other choice of ranks."""

from itertools import product

import pytest
import torch
from helpers import F64, LAYER, calibrated, conflicting_tasks, linear64, lora, randn, rel, task, task_tokens
from torch import nn

from ssr_core import (
    METHODS,
    CompressOptions,
    IncompatibleError,
    NPLoRAMerge,
    SampleOptions,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    compress,
    merge,
)
from ssr_core.allocation import allocate
from ssr_core.compression import plain_bytes

INP, OUT, COUNT = 24, 20, 3


def world(rank=4, tokens=50, method=None, count=COUNT):
    """A merge of LoRAs on one layer, and each task's inputs."""
    tasks = conflicting_tasks(count, OUT, INP, rank)
    x = [task_tokens(7 + k, tokens, INP) for k in range(count)]
    calibration = calibrated(linear64(INP, OUT), tasks, [[one] for one in x])
    return tasks, x, calibration, merge(tasks, method or SSRMerge(), calibration)


def balanced(x):
    """All tokens as columns, every task of the same weight: (in, N)."""
    return torch.cat([one / len(one) ** 0.5 for one in x]).T


def truncated_outputs(delta, inputs, rank):
    """Eckart and Young: the error that the best matrix of this rank leaves on these inputs."""
    values = torch.linalg.svdvals(delta @ inputs)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 7, 11])
def test_the_error_is_the_smallest_there_is(name, rank):
    method = NPLoRAMerge(mu=1.0) if name == "np_lora" else METHODS[name]()
    tasks, x, calibration, result = world(method=method)
    small, report = compress(result, CompressOptions("rank", rank), tasks, calibration)
    delta, inputs = result.layers[LAYER].delta(), balanced(x)
    best = truncated_outputs(delta, inputs, rank)
    assert small.layers[LAYER].rank == rank and report.layers[0].measured_on == "outputs"
    assert rel(small.layers[LAYER].delta() @ inputs, delta @ inputs) == pytest.approx(best, rel=1e-9)
    assert report.layers[0].error == pytest.approx(best, rel=1e-9)
    assert report.layers[0].stored_error == pytest.approx(best, rel=1e-7)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_without_statistics_it_is_the_truncated_svd(rank):
    tasks, _, _, result = world()
    small, report = compress(result, CompressOptions("rank", rank))
    delta = result.layers[LAYER].delta()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    assert rel(small.layers[LAYER].delta(), (u[:, :rank] * s[:rank]) @ vh[:rank]) < 1e-9
    assert report.layers[0].error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-9)
    assert report.layers[0].reason == "no calibration"
    assert tasks


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_on_calibrated_outputs_than_the_plain_svd(seed):
    tasks = conflicting_tasks(3, OUT, INP, 3, seed=seed)
    x = [task_tokens(50 * seed + k, 40, INP) * (1 + k) for k in range(3)]
    calibration = calibrated(linear64(INP, OUT), tasks, [[one] for one in x])
    result = merge(tasks, SSRMerge(), calibration)
    delta, inputs = result.layers[LAYER].delta() @ balanced(x), balanced(x)
    for rank in range(1, 9):
        ours, _ = compress(result, CompressOptions("rank", rank), tasks, calibration)
        plain, _ = compress(result, CompressOptions("rank", rank))
        errors = [rel(one.layers[LAYER].delta() @ inputs, delta) for one in (ours, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-9)
        assert rank > 6 or errors[0] < 0.99 * errors[1]  # and not just the same thing


def test_ranks_that_no_token_needs_go_to_the_weights():
    """Two tokens a task: six directions make calibrated outputs exact, the rest keep most of the weights."""
    tasks, x, calibration, result = world(tokens=2)
    delta, inputs, rank = result.layers[LAYER].delta(), balanced(x), 9
    small, report = compress(result, CompressOptions("rank", rank), tasks, calibration)
    found = small.layers[LAYER].delta()
    assert rel(found @ inputs, delta @ inputs) < 1e-9
    seen = torch.linalg.svd(delta @ inputs).U[:, :6]
    unseen = delta - seen @ seen.T @ delta
    values = torch.linalg.svdvals(unseen)
    assert float((found - delta).norm()) == pytest.approx(float(values[rank - 6 :].norm()), rel=1e-8)
    assert report.layers[0].weight_error == pytest.approx(rel(found, delta), rel=1e-8)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_ridge_adds_inputs_of_every_direction(ridge):
    """`G + ridge * mean * I`: as if white inputs of that energy had been seen as well."""
    tasks, x, calibration, result = world()
    basis, stats = build_stacks(tasks)[0].basis, calibration.stats[LAYER]
    level = float((stats.gram / stats.tokens[:, None, None]).sum(0).diagonal().mean())
    assert level == pytest.approx(float((basis @ balanced(x)).square().sum(1).mean()), rel=1e-9)
    inputs = torch.cat([balanced(x), (ridge * level) ** 0.5 * torch.eye(INP, dtype=F64)], dim=1)
    small, _ = compress(result, CompressOptions("rank", 5, ridge), tasks, calibration)
    delta = result.layers[LAYER].delta()
    best = truncated_outputs(delta, inputs, 5)
    assert rel(small.layers[LAYER].delta() @ inputs, delta @ inputs) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01, 1e-6])
def test_an_error_budget_takes_the_smallest_rank_within_it(bound):
    tasks, x, calibration, result = world()
    small, report = compress(result, CompressOptions("error", bound), tasks, calibration)
    delta, inputs = result.layers[LAYER].delta(), balanced(x)
    rank = small.layers[LAYER].rank
    assert truncated_outputs(delta, inputs, rank) <= bound * (1 + 1e-9)
    assert rank == 1 or truncated_outputs(delta, inputs, rank - 1) > bound
    assert report.layers[0].error <= bound


def test_nothing_cut_off_leaves_the_very_tensors():
    tasks, _, calibration, result = world()
    small, report = compress(result, CompressOptions("rank", 99), tasks, calibration)
    assert small.layers[LAYER] is result.layers[LAYER]
    assert report.bytes_after == report.bytes_before and report.layers[0].error == 0


def refined(tokens, kept, seed=0):
    """A merge whose downs read beside the LoRAs' rows, and the inputs."""
    tasks = conflicting_tasks(2, OUT, 60, 3, seed=seed)
    x = [task_tokens(7 + k + 10 * seed, tokens, 60) for k in range(2)]
    calibration = calibrated(linear64(60, OUT), tasks, [[one] for one in x], sample=SampleOptions(kept))
    result = merge(tasks, SSRMerge(), calibration)
    own = torch.linalg.svd(build_stacks(tasks)[0].basis, full_matrices=False).Vh
    down = result.layers[LAYER].down
    assert rel(down @ own.T @ own, down) > 0.02
    return tasks, x, calibration, result


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_refined_downs_where_every_token_was_kept(rank):
    """Sampled tokens then are the calibrated inputs: the error is the smallest there is on them."""
    tasks, x, calibration, result = refined(90, 200)
    small, report = compress(result, CompressOptions("rank", rank), tasks, calibration)
    delta, inputs = result.layers[LAYER].delta(), balanced(x)
    assert report.layers[0].measured_on == "outputs"
    best = truncated_outputs(delta, inputs, rank)
    assert rel(small.layers[LAYER].delta() @ inputs, delta @ inputs) == pytest.approx(best, rel=1e-4)
    assert report.layers[0].error == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_refined_downs_from_a_sample_stay_better_than_the_plain_svd(seed):
    tasks, x, calibration, result = refined(400, 40, seed)
    delta, inputs = result.layers[LAYER].delta() @ balanced(x), balanced(x)
    for rank in range(1, 6):
        ours, report = compress(result, CompressOptions("rank", rank), tasks, calibration)
        plain, _ = compress(result, CompressOptions("rank", rank))
        errors = [rel(one.layers[LAYER].delta() @ inputs, delta) for one in (ours, plain)]
        assert errors[0] < errors[1]
        assert report.layers[0].error == pytest.approx(errors[0], rel=0.1)


def test_convolutions_and_slices():
    conv, fused = nn.Conv2d(5, 16, 3, stride=2).double(), nn.Linear(12, 18).double()
    root = nn.ModuleDict({"conv": conv, "fused": fused}).requires_grad_(False)
    q, k = Target("fused", (0, 6)), Target("fused", (6, 12))

    def layers(seed):
        return {
            Target("conv"): lora(seed, 16, 45, 4, kernel=(3, 3)),
            q: lora(seed + 1, 6, 12, 3),
            k: lora(seed + 2, 12, 12, 3),
        }

    tasks = [task("a", layers(1)), task("b", layers(50))]
    images, tokens = [randn(s, 2, 5, 9, 9) for s in (3, 4)], [task_tokens(s, 30, 12) for s in (5, 6)]

    def run(index, tap):
        conv(images[index])
        fused(tokens[index])

    calibration = calibrate(root, tasks, build_stacks(tasks), run)
    result = merge(tasks, SSRMerge(), calibration)
    small, _ = compress(result, CompressOptions("rank", 2), tasks, calibration)
    unfolded = [nn.functional.unfold(one, 3, stride=2).transpose(1, 2).reshape(-1, 45) for one in images]
    for target, inputs in ((Target("conv"), unfolded), (q, tokens), (k, tokens)):
        delta, x = result.layers[target].delta(), balanced(inputs)
        best = truncated_outputs(delta, x, 2)
        assert rel(small.layers[target].delta() @ x, delta @ x) == pytest.approx(best, rel=1e-9)
        assert small.layers[target].kernel == result.layers[target].kernel


def test_a_layer_of_one_lora_and_foreign_rows_are_cut_by_their_weights_and_say_so():
    alone = Target("alone")
    tasks = [task("a", {LAYER: lora(1, OUT, INP, 4), alone: lora(2, OUT, INP, 4)}), task("b", lora(3, OUT, INP, 4))]
    x = [task_tokens(7 + k, 50, INP) for k in range(2)]
    module = linear64(INP, OUT)
    root = nn.ModuleDict({"layer": module, "alone": linear64(INP, OUT)})

    def run(index, tap):
        for one in root.values():
            one(x[index])

    calibration = calibrate(root, tasks, build_stacks(tasks), run)
    result = merge(tasks, SSRMerge(), calibration)
    _, report = compress(result, CompressOptions("rank", 2), tasks, calibration)
    by_target = {one.target: one for one in report.layers}
    assert by_target[alone].measured_on == "weights" and "only one LoRA" in by_target[alone].reason
    stranger = merge(conflicting_tasks(2, OUT, INP, 4, seed=9), METHODS["sum"]())
    _, report = compress(stranger, CompressOptions("rank", 2), tasks, calibration)
    assert report.layers[0].measured_on == "weights" and "outside" in report.layers[0].reason


def spend(gains, costs, ranks):
    left = sum(sum(gain[0] for gain in layer[rank:]) for layer, rank in zip(gains, ranks, strict=True))
    return left, sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_ranks_of_as_many_bytes_leave_less(seed):
    generator = torch.Generator().manual_seed(seed)
    gains = [
        [(float(v), 0.0) for v in torch.rand(5, generator=generator, dtype=F64).sort(descending=True).values]
        for _ in range(4)
    ]
    costs = torch.randint(3, 9, (4,), generator=generator).tolist()
    every = [spend(gains, costs, ranks) for ranks in product(range(1, 6), repeat=4)]
    largest = max(gain[0] for layer in gains for gain in layer)
    exact = 0
    for budget in range(sum(costs), 5 * sum(costs) + 1):
        left, used = spend(gains, costs, allocate(gains, costs, budget))
        assert used <= budget
        best = min(error for error, size in every if size <= budget)
        assert left <= best + largest
        exact += left <= best + 1e-12
        same_cost = allocate(gains, [1] * 4, 4 + (budget - sum(costs)) % 16)
        sizes = [spend(gains, [1] * 4, ranks) for ranks in product(range(1, 6), repeat=4)]
        found = spend(gains, [1] * 4, same_cost)
        assert found[0] <= min(error for error, size in sizes if size <= found[1]) + 1e-12
    assert exact > 0.5 * (4 * sum(costs))


def test_a_size_budget_is_kept_and_beats_equal_ranks():
    layers = {Target(f"layer{i}"): lora(10 * i, OUT, INP, 6) for i in range(4)}
    other = {Target(f"layer{i}"): lora(10 * i + 5, OUT, INP, 6) for i in range(4)}
    tasks = [task("a", layers), task("b", other)]
    root = nn.ModuleDict({f"layer{i}": linear64(INP, OUT) for i in range(4)})
    decay = [0.2, 0.5, 0.8, 0.99]
    x = [[randn(k * 10 + i, 60, INP) * decay[i] ** torch.arange(INP, dtype=F64) for i in range(4)] for k in range(2)]

    def run(index, tap):
        for i, module in enumerate(root.values()):
            module(x[index][i])

    calibration = calibrate(root, tasks, build_stacks(tasks), run)
    result = merge(tasks, SSRMerge(), calibration)
    share = 4 / 12
    small, report = compress(result, CompressOptions("share", share), tasks, calibration)
    _, other_report = compress(result, CompressOptions("rank", 4), tasks, calibration)
    size = sum(plain_bytes(t, layer) * layer.rank for t, layer in small.layers.items())
    assert size == report.bytes_after <= share * report.bytes_before and other_report.bytes_after <= report.bytes_after
    assert report.error("outputs") < 0.8 * other_report.error("outputs")
    ranks = [small.layers[Target(f"layer{i}")].rank for i in range(4)]
    assert ranks == sorted(ranks) and ranks[0] < ranks[3]


def test_half_precision_is_rounded_and_the_rounding_reported():
    tasks, x, calibration, _ = world()
    result = merge(tasks, SSRMerge(), calibration, dtype=torch.float16)
    small, report = compress(result, CompressOptions("rank", 10), tasks, calibration)
    layer, inputs = small.layers[LAYER], balanced(x)
    delta = result.layers[LAYER].delta()
    assert layer.down.dtype == layer.up.dtype == torch.float16
    true = rel(layer.delta() @ inputs, delta @ inputs)
    assert report.layers[0].stored_error == pytest.approx(true, rel=0.1)
    assert report.layers[0].stored_error > report.layers[0].error


@pytest.mark.parametrize(
    ("limit", "value"),
    [("rank", 0), ("rank", 2.5), ("error", 1.5), ("share", -1), ("megabytes", float("nan")), ("x", 1)],
)
def test_values_out_of_range_are_refused(limit, value):
    with pytest.raises(IncompatibleError, match="compression"):
        CompressOptions(limit, value)


def test_a_budget_below_rank_one_says_how_much_it_takes():
    tasks, _, calibration, result = world()
    with pytest.raises(IncompatibleError, match=r"rank 1 in every layer takes 0\.000 MB"):
        compress(result, CompressOptions("megabytes", 1e-5), tasks, calibration)
