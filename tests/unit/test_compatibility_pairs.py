"""Which LoRAs fight, where, and how loud they are: against the outputs of dense deltas."""

import math

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, deltas_of, linear64, lora, output_error, task, task_tokens
from torch import nn

from ssr_core import SSRMerge, SumMerge, Target, Task, build_stacks, calibrate, merge
from ssr_core.compatibility import find_pairs, loudness
from ssr_core.layer_report import LayerReport
from ssr_core.layout import Place, natural, place_of
from ssr_core.modelmap import by_kind, model_map

OUT, IN, RANK = 7, 10, 3
TASKS = conflicting_tasks(3, OUT, IN, RANK, seed=8)
TOKENS = [task_tokens(k, 60, IN) for k in range(3)]


def report_of(tasks=TASKS, tokens=TOKENS, method=None):
    calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens])
    return merge(tasks, method or SSRMerge(), calibration).report


def test_the_error_of_a_pair_is_that_of_adding_the_two():
    deltas = deltas_of(TASKS)
    for pair in report_of().pairs():
        i, j = pair.first, pair.second
        both, x = [deltas[i], deltas[j]], [TOKENS[i], TOKENS[j]]
        assert pair.error == pytest.approx(output_error(deltas[i] + deltas[j], both, x), rel=1e-9)
        energies = [[float((y @ d.T).square().sum()) / len(y) for d in both] for y in x]
        assert pair.heard[0] == pytest.approx(energies[0][1] / energies[0][0], rel=1e-9)
        assert pair.heard[1] == pytest.approx(energies[1][0] / energies[1][1], rel=1e-9)
    assert [(p.first, p.second) for p in report_of().pairs()] == [(0, 1), (0, 2), (1, 2)]


def test_pairs_do_not_depend_on_the_method():
    for one, other in zip(report_of().pairs(), report_of(method=SumMerge()).pairs(), strict=True):
        assert one.error == other.error and one.overlap == other.overlap


def layers_of_two():
    """Two layers; what the pair does is worse in the second."""
    tasks = [
        task(f"t{k}", {Target("a.0.proj"): lora(20 + k, OUT, IN, 2), Target("b.5.mlp"): lora(30 + k, OUT, IN, 2)})
        for k in range(2)
    ]
    root = nn.ModuleDict({"a": nn.ModuleList([nn.ModuleDict({"proj": linear64(IN, OUT)})])})
    root["b"] = nn.ModuleList([nn.Identity()] * 5 + [nn.ModuleDict({"mlp": linear64(IN, OUT)})])

    def run(index, tap):
        for path in ("a.0.proj", "b.5.mlp"):
            root.get_submodule(path)(TOKENS[index])

    return tasks, merge(tasks, SSRMerge(), calibrate(root, tasks, build_stacks(tasks), run)).report


def test_layers_count_by_their_own_energy_and_the_worst_is_named():
    tasks, report = layers_of_two()
    errors = {}
    for target in tasks[0].adapter.layers:
        deltas = deltas_of(tasks, target)
        energies = [[float((x @ d.T).square().sum()) / len(x) for d in deltas] for x in TOKENS[:2]]
        own = energies[0][0] + energies[1][1]
        errors[str(place_of(target))] = math.sqrt((energies[0][1] + energies[1][0]) / own)
    (pair,) = report.pairs()
    assert pair.error == pytest.approx(math.sqrt(sum(e**2 for e in errors.values()) / 2), rel=1e-9)
    assert pair.worst[0][0] == max(errors, key=errors.get) and set(dict(pair.worst)) == {"a.0 proj", "b.5 mlp"}
    for name, error in pair.worst:
        assert error == pytest.approx(errors[name], rel=1e-9)


@pytest.mark.parametrize(
    ("error", "words"), [(0.1, "hardly meet"), (0.3, "in part"), (0.8, "they fight:"), (1.2, "fight hard")]
)
def test_verdicts(error, words):
    x = [[1.0, error**2], [error**2, 1.0]]
    layer = LayerReport(LAYER, "routed", (0, 1), 2, crosstalk={"sum": x}, overlap=[[1, 0]] * 2, closest=[[1, 0]] * 2)
    (pair,) = find_pairs(2, [layer])
    assert pair.error == pytest.approx(error) and words in pair.verdict and pair.angle == pytest.approx(90)


def test_pairs_without_statistics_know_only_the_angles():
    report = merge(TASKS, SumMerge()).report
    (first, *_) = report.pairs()
    assert math.isnan(first.error) and 0 < first.overlap < 1 and "not known" in first.verdict
    assert report.to_json()["pairs"][0]["error"] is None


def test_loudness_and_the_strength_that_undoes_it():
    """The second path: at the balancing strength the energies really are equal."""
    tasks = [TASKS[0], Task(TASKS[1].adapter, 3.0, 1.0, TASKS[1].prompts)]
    loud = report_of(tasks, TOKENS[:2]).loudness()
    energies = [float((x @ d.T).square().sum()) / len(x) for x, d in zip(TOKENS, deltas_of(tasks), strict=False)]
    assert loud[1] / loud[0] == pytest.approx(energies[1] / energies[0], rel=1e-9)
    balanced = Task(TASKS[1].adapter, 3.0 * (loud[0] / loud[1]) ** 0.5, 1.0, TASKS[1].prompts)
    again = report_of([TASKS[0], balanced], TOKENS[:2]).loudness()
    assert again == pytest.approx([1.0, 1.0], rel=1e-9)


def test_loudness_of_a_lora_that_shares_nothing_is_unknown():
    layer = LayerReport(LAYER, "routed", (0, 2), 2, crosstalk={"sum": [[4.0, 0.0], [0.0, 1.0]]})
    found = loudness(3, [layer])
    assert found[0] == pytest.approx(2.0) and math.isnan(found[1]) and found[2] == pytest.approx(0.5)


PLACES = {
    "double_blocks.7.img_attn.qkv": ("double_blocks.7", "img_attn.qkv"),
    "double_blocks.7.img_mlp.2": ("double_blocks.7", "img_mlp.2"),
    "single_blocks.3.linear1": ("single_blocks.3", "linear1"),
    "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0": ("input_blocks.4", "attn1.to_out.0"),
    "input_blocks.4.0.in_layers.2": ("input_blocks.4", "in_layers.2"),
    "middle_block.1.proj_in": ("middle_block.1", "proj_in"),
    "output_blocks.0.1.transformer_blocks.9.ff.net.0.proj": ("output_blocks.0", "ff.proj"),
    "joint_blocks.2.x_block.attn.qkv": ("joint_blocks.2", "x_block.attn.qkv"),
    "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1": (
        "clip_l.transformer.text_model.encoder.layers.3",
        "mlp.fc1",
    ),
    "t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo": (
        "t5xxl.transformer.encoder.block.0",
        "DenseReluDense.wo",
    ),
    "final_layer.linear": ("", "final_layer.linear"),
    "time_embed.0": ("", "time_embed.0"),
    "img_in": ("", "img_in"),
}


@pytest.mark.parametrize("path", PLACES)
def test_places_in_unets_and_dits(path):
    block, kind = PLACES[path]
    assert place_of(Target(path, (0, 4), "clip")) == Place("clip", block, kind)


def test_blocks_are_sorted_by_number():
    names = ["blocks.10", "blocks.9", "a", "blocks.1.x2"]
    assert sorted(names, key=natural) == ["a", "blocks.1.x2", "blocks.9", "blocks.10"]


def layer(path, errors, held, status="routed", tokens=(30.0, 20.0), condition=math.nan, overlap=0.5):
    square = [[1.0, overlap], [overlap, 1.0]]
    return LayerReport(
        Target(path),
        status,
        (0, 1),
        10,
        tokens,
        condition=condition,
        errors=errors and {"sum": errors[0], "result": errors[1]},
        held_errors=held and {"result": held},
        overlap=square,
        closest=square,
    )


def test_cells_of_the_map_by_hand():
    layers = [
        layer("b.10.q", (0.6, 0.3), 0.5, condition=10.0),
        layer("b.2.q", (0.8, 0.4), None, tokens=(5.0, 30.0), condition=7.0, overlap=0.1),
        layer("b.2.0.q", (0.6, 0.0), 0.2),
        layer("b.2.k", None, None, "passed_through", ()),
    ]
    cells = model_map(layers)
    assert [str(cell.place) for cell in cells] == ["b.2 k", "b.2 q", "b.10 q"]
    cell = cells[1]
    assert dict(cell.statuses) == {"routed": 2} and cell.held_error == 0.2 and cell.condition == 7.0
    assert cell.interference == pytest.approx(math.sqrt((0.64 + 0.36) / 2)) and cell.coverage == 0.5
    assert cell.error == pytest.approx(0.4 / math.sqrt(2)) and cell.overlap == pytest.approx(0.3)
    assert math.isnan(cells[0].error) and cells[0].to_json()["error"] is None
    (k, q) = by_kind(layers)
    assert k.place.kind == "k" and sum(q.statuses.values()) == 3 and q.condition == 10.0


def test_reports_by_lora_are_root_mean_squares_over_its_layers():
    tasks, report = layers_of_two()
    for held, name in ((False, "task_errors"), (True, "held_task_errors")):
        for k in range(len(tasks)):
            values = [getattr(one, name)["result"][k] for one in report.layers]
            expected = math.sqrt(sum(v**2 for v in values) / 2)
            assert report.reconstruction_error(held_out=held, task=k) == pytest.approx(expected, rel=1e-12)
    assert torch.tensor(report.to_json()["reconstruction_error_by_lora"][1]["held_out"]["sum"]).isfinite()
