"""One calibration serves subsets of its tasks, other ridges and, approximately, other strengths."""

import pytest
import torch
from helpers import (
    LAYER,
    calibrated,
    conflicting_tasks,
    dense_by_module,
    linear64,
    lora,
    reference_delta,
    rel,
    svd_coordinates,
    task,
    task_tokens,
)
from torch import nn

from demo.loras import SIGMA, noise, plant_loras, write_lora
from demo.model import StubTransformer, key_map
from ssr_core import (
    Adapter,
    Calibration,
    GramStats,
    IncompatibleError,
    SSRMerge,
    SumMerge,
    Target,
    Task,
    build_stacks,
    calibrate,
    merge,
    read_adapter,
    read_safetensors,
)

OUT, IN, RANK = 8, 11, 3
TASKS = conflicting_tasks(4, OUT, IN, RANK, seed=1)
TOKENS = [task_tokens(k, 30 + 7 * k, IN) for k in range(4)]


def calibration_of(indices):
    return calibrated(linear64(IN, OUT), [TASKS[i] for i in indices], [[TOKENS[i]] for i in indices])


@pytest.mark.parametrize("subset", [(0, 1), (3, 1), (2, 0, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("method", [SSRMerge(ridge=0.05), SSRMerge(ridge=0.05, balance=False, anchor="gains")])
def test_a_subset_equals_calibrating_only_the_subset(subset, method):
    tasks = [TASKS[i] for i in subset]
    everything, alone = calibration_of(range(4)), calibration_of(subset)
    a, b = merge(tasks, method, everything), merge(tasks, method, alone)
    assert rel(a.layers[LAYER].delta(), b.layers[LAYER].delta()) < 1e-12
    assert a.report.layers[0].errors == pytest.approx(b.report.layers[0].errors, rel=1e-9)


def test_subset_of_the_statistics_by_index():
    ranks = (2, 1, 3)
    gram = torch.arange(3 * 36, dtype=torch.float64).reshape(3, 6, 6)
    stats = GramStats(gram, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 5, 6]), ranks)
    picked = stats.subset([2, 0])
    rows = [3, 4, 5, 0, 1]
    assert picked.ranks == (3, 2) and picked.tokens.tolist() == [3.0, 1.0] and picked.nonfinite.tolist() == [6, 4]
    for new, old in enumerate((2, 0)):
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                assert picked.gram[new, i, j] == gram[old, a, b]


def test_the_same_lora_under_two_prompts_finds_its_own_statistics():
    layer = lora(5, OUT, IN, RANK)
    twice = [Task(task("x", layer).adapter, prompts=(p,)) for p in ("dog", "cat")]
    calibration = calibrated(linear64(IN, OUT), twice, [[TOKENS[0]], [TOKENS[1]]])
    assert calibration.match(twice[::-1]) == [1, 0]
    same = [twice[0], twice[0]]
    with pytest.raises(IncompatibleError):
        calibration.match(same)


def test_a_layer_that_was_off_in_calibration_cannot_be_routed_later():
    tasks = [TASKS[0], TASKS[1], Task(TASKS[2].adapter, 0.0, 1.0, TASKS[2].prompts)]
    calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in TOKENS[:3]])
    now = [*tasks[:2], TASKS[2]]
    with pytest.raises(IncompatibleError, match="strength 0") as caught:
        merge(now, SSRMerge(), calibration)
    assert caught.value.layer == "layer"


def test_ranks_that_do_not_fit_the_loras_are_refused():
    calibration = calibration_of((0, 1))
    forged = [task(t.name, lora(9, OUT, IN, RANK + 1)) for t in TASKS[:2]]
    with pytest.raises(IncompatibleError, match="ranks"):
        merge(forged, SSRMerge(), calibration)


SLICES = [Target("qkv", (4 * i, 4)) for i in range(3)]


def mixed_calibration():
    """Two files with split rows and one with fused rows share one stack."""
    split = [task(f"s{k}", {t: lora(10 * k + i, 4, IN, 2) for i, t in enumerate(SLICES)}) for k in range(2)]
    tasks = [*split, task("fused", {Target("qkv"): lora(50, 12, IN, 2)})]
    root = nn.ModuleDict({"qkv": linear64(IN, 12)})
    return split, calibrate(root, tasks, build_stacks(tasks), lambda index, tap: root["qkv"](TOKENS[index]))


def test_dropping_a_fused_file_keeps_the_split_ones_routed():
    split, calibration = mixed_calibration()
    result = merge(split, SSRMerge(ridge=0.02), calibration)
    assert {layer.status for layer in result.report.layers} == {"routed"}
    dense = [dense_by_module(t.adapter.layers, {"qkv": 12})["qkv"] for t in split]
    pairs = [svd_coordinates(torch.eye(IN, dtype=torch.float64), delta) for delta in dense]
    expected = reference_delta(pairs, TOKENS[:2], ridge=0.02)
    assert rel(dense_by_module(result.layers, {"qkv": 12})["qkv"], expected) < 1e-9


def test_the_only_lora_that_is_left_passes_through_bit_for_bit():
    split, calibration = mixed_calibration()
    result = merge(split[:1], SSRMerge(), calibration)
    assert set(result.layers) == set(SLICES)
    for target in SLICES:
        assert torch.equal(result.layers[target].down, split[0].adapter.layers[target].down)
        assert torch.equal(result.layers[target].up, split[0].adapter.layers[target].up)


def demo_tasks(folder, strength):
    model = StubTransformer(d=48, depth=2)
    prompts = ("photo of a zwx dog", "painting of my qrt teapot on grass", "the bvn robot at night")
    tasks = []
    for k, planted in enumerate(plant_loras(model, prompts, rank=4)):
        path = folder / f"{k}-{strength}.safetensors"
        write_lora(model, planted, path, "kohya")
        adapter = read_adapter(read_safetensors(path)[0], key_map(model), name=f"lora{k}", fingerprint=str(k))
        tasks.append(Task(adapter, strength, 1.0, (prompts[k],)))
    return model, tasks


@pytest.mark.parametrize(("strength", "bound"), [(0.7, 0.2), (1.3, 0.2)])
def test_another_strength_is_approximated_far_better_than_by_the_sum(tmp_path, strength, bound):
    """Distance of the re-solved merge and of the plain sum to a fresh calibration, over the fresh one's norm."""

    def run(model, tasks):
        def run_pass(index, tap):
            for seed in (10, 11):
                model(noise(seed), SIGMA, list(tasks[index].prompts))

        return calibrate(model, tasks, build_stacks(tasks), run_pass)

    model, now = demo_tasks(tmp_path, strength)
    old = run(*demo_tasks(tmp_path, 1.0))
    fresh = merge(now, SSRMerge(), run(model, now)).layers

    def distance(layers):
        apart = sum(float((layers[t].delta() - fresh[t].delta()).norm() ** 2) for t in fresh)
        return (apart / sum(float(fresh[t].delta().norm() ** 2) for t in fresh)) ** 0.5

    resolved, plain = distance(merge(now, SSRMerge(), old).layers), distance(merge(now, SumMerge()).layers)
    assert resolved < bound * plain, (resolved, plain)


def test_other_strengths_on_fixed_inputs_are_exact():
    """Where the inputs do not depend on the LoRA, re-solving is no approximation."""
    calibration = calibration_of((0, 1))
    now = [Task(t.adapter, s, 1.0, t.prompts) for t, s in zip(TASKS[:2], (0.4, -2.0), strict=True)]
    fresh = calibrated(linear64(IN, OUT), now, [[x] for x in TOKENS[:2]])
    a, b = merge(now, SSRMerge(), calibration), merge(now, SSRMerge(), fresh)
    assert rel(a.layers[LAYER].delta(), b.layers[LAYER].delta()) < 1e-12
    assert isinstance(fresh, Calibration)


def test_statistics_of_another_basis_are_refused_even_under_the_same_name_and_rank():
    """A forged hash, or coordinates that came out differently on another machine."""
    calibration = calibration_of((0, 1))
    assert merge(TASKS[:2], SSRMerge(), calibration).report.layers[0].status == "routed"
    forged = Adapter(TASKS[1].name, TASKS[1].adapter.fingerprint, {LAYER: lora(77, OUT, IN, RANK)})
    other = [TASKS[0], Task(forged, prompts=TASKS[1].prompts)]
    with pytest.raises(IncompatibleError, match="coordinates") as caught:
        merge(other, SSRMerge(), calibration)
    assert caught.value.layer == "layer"


@pytest.mark.parametrize("method", [SumMerge(), SSRMerge()], ids=lambda method: method.name)
def test_a_part_that_nobody_calibrated_is_merged_by_the_anchor(method):
    """CLIP connected only after calibration: nothing is refused, and nothing pretends to be routed."""
    te = Target("te", None, "clip")
    layers = [{LAYER: TASKS[k].adapter.layers[LAYER], te: lora(60 + k, 5, 7, 2)} for k in range(2)]
    now = [task(f"t{k}", layers[k]) for k in range(2)]
    then = [Task(one.adapter, 1.0, 0.0, one.prompts) for one in now]
    calibration = calibrated(linear64(IN, OUT), then, [[x] for x in TOKENS[:2]])
    result = merge(now, method, calibration)
    expected = sum(one[te].delta() for one in layers)
    assert rel(result.layers[te].delta(), expected) < 1e-12
    if method.needs_calibration:
        assert {str(r.target): r.status for r in result.report.layers} == {"layer": "routed", "te": "anchored"}
        assert any("te" in warning and "CLIP" in warning for warning in result.report.warnings)
