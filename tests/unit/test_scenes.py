"""Joint and neutral prompts: their passes, what they add to router and correction, and where they stay."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    conflicting_tasks,
    factors_of,
    linear64,
    lora,
    randn,
    rel,
    svd_coordinates,
    task,
    task_tokens,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ssr_core import (
    CalibrationError,
    CompressOptions,
    FileError,
    IncompatibleError,
    PaperMerge,
    SampleOptions,
    Scene,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    combine,
    compress,
    keep,
    load_calibration,
    merge,
    merge_metadata,
    parse_scenes,
    save_calibration,
)
from ssr_core.calibration_io import FORMAT
from ssr_core.lookup import Statistics
from ssr_core.methods.ssr import JOINT, NEUTRAL
from ssr_core.scenes import scene_lines

IN, OUT, RANK, K = 14, 9, 2, 3
TASKS = conflicting_tasks(K, OUT, IN, RANK)
SCENES = (Scene("both", (0, 1)), Scene("everyone", (0, 1, 2)), Scene("nobody"))
TOKENS = [task_tokens(k, 30 + k, IN) for k in range(K)]
SEEN = [task_tokens(50 + j, 20 + 3 * j, IN) for j in range(len(SCENES))]


def calibrated(tokens=TOKENS, seen=SEEN, scenes=SCENES, tasks=TASKS, **more):
    module = linear64(IN, OUT)
    return calibrate(
        nn.ModuleDict({"layer": module}),
        tasks,
        build_stacks(tasks),
        lambda index, tap: module(tokens[index]),
        scenes=scenes,
        run_scene=lambda number, tap: module(seen[number]),
        **more,
    )


def merged(calibration, method=None, tasks=TASKS):
    result = merge(tasks, method or SSRMerge(refine=False), calibration, dtype=F64)
    return result.layers[LAYER].delta(F64), result.report


def least_squares(tokens, seen, scenes, ridge=0.01, tasks=TASKS):
    """The router by lstsq: every pass weighs 1, `ridge` of the mean signal pulls toward the plain sum."""
    coordinates = [svd_coordinates(*pair) for pair in factors_of(tasks)]
    basis, ups = torch.cat([v for v, _ in coordinates]), torch.cat([b for _, b in coordinates], dim=1)
    owner = torch.cat([torch.full((len(v),), k) for k, (v, _) in enumerate(coordinates)])
    passes = [(x, (k,)) for k, x in enumerate(tokens)]
    passes += [(x, scene.tasks) for x, scene in zip(seen, scenes, strict=True)]
    left, right = [], []
    for x, acting in passes:
        z = x @ basis.T / len(x) ** 0.5
        left.append(z)
        right.append(z * torch.isin(owner, torch.tensor(acting, dtype=torch.int64)))
    mu = ridge * sum(z.square().sum() for z in left) / len(basis)
    left.append(mu.sqrt() * torch.eye(len(basis), dtype=F64))
    right.append(left[-1])
    router = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    return ups @ router @ basis


def test_router_is_the_least_squares_answer_over_all_passes():
    found, _ = merged(calibrated())
    assert rel(found, least_squares(TOKENS, SEEN, SCENES)) < 1e-10
    assert rel(found, least_squares(TOKENS, [], ())) > 1e-2


@pytest.mark.parametrize("number", range(len(SCENES)))
def test_a_scenes_pass_adds_exactly_its_loras(number):
    module, given = linear64(IN, OUT), []

    def run_scene(index, tap):
        given.append(module(SEEN[index]))

    calibrate(
        nn.ModuleDict({"layer": module}),
        TASKS,
        build_stacks(TASKS),
        lambda index, tap: module(TOKENS[index]),
        scenes=SCENES,
        run_scene=run_scene,
    )
    pairs = factors_of(TASKS)
    expected = module(SEEN[number]) + sum(
        (SEEN[number] @ pairs[k][0].T @ pairs[k][1].T for k in SCENES[number].tasks), torch.zeros(1, dtype=F64)
    )
    assert rel(given[number], expected) < 1e-12
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_layer_of_other_loras_is_watched_and_should_stay_silent():
    two = [task("a", lora(1, OUT, IN, RANK)), task("b", lora(2, OUT, IN, RANK))]
    alone = task("c", {Target("other"): lora(3, OUT, IN, RANK)})
    tasks, scenes = [*two, alone], (Scene("a and c", (0, 2)),)
    root = nn.ModuleDict({"layer": linear64(IN, OUT), "other": linear64(IN, OUT)})

    def run(x):
        for module in root.values():
            module(x)

    found = calibrate(
        root,
        tasks,
        build_stacks(tasks),
        lambda k, tap: run(TOKENS[k]),
        scenes=scenes,
        run_scene=lambda j, tap: run(SEEN[j]),
    )
    seen = found.stats[LAYER].scenes
    assert seen.active.tolist() == [[True, False]]
    assert float(seen.tokens) == len(SEEN[0])


def test_refinement_learns_the_scenes_targets():
    """Sampled whole inputs tell a joint prompt from the LoRAs' own where their coordinates cannot."""
    options = SampleOptions(1000, most=10_000)
    plain, refined = (merged(calibrated(sample=options), SSRMerge(refine=refine)) for refine in (False, True))
    name = JOINT
    before, after = (report.layers[0].measures[name] for _, report in (plain, refined))
    assert after < 0.9 * before
    pairs = factors_of(TASKS)
    deltas = [up @ down for down, up in pairs]
    errors = energy = 0.0
    for x, scene in list(zip(SEEN, SCENES, strict=True))[:2]:
        wanted = x @ sum(deltas[k] for k in scene.tasks).T
        errors += float((x @ refined[0].T - wanted).square().sum()) / len(x)
        energy += float(wanted.square().sum()) / len(x)
    assert after == pytest.approx((errors / energy) ** 0.5, rel=1e-9)


def test_measures_of_a_plain_router_are_those_of_its_answers():
    found, report = merged(calibrated())
    deltas = [up @ down for down, up in factors_of(TASKS)]
    x = SEEN[2]
    left = (x @ found.T).norm() / (x @ sum(deltas).T).norm()
    assert report.layers[0].measures[NEUTRAL] == pytest.approx(float(left), rel=1e-9)
    without = merged(calibrated(scenes=(), seen=[]))[1].layers[0].measures
    assert JOINT not in without
    assert NEUTRAL not in without


def test_the_published_formula_knows_no_scenes():
    found, bare = merged(calibrated(), PaperMerge())[0], merged(calibrated(scenes=(), seen=[]), PaperMerge())[0]
    assert rel(found, bare) < 1e-12


def test_the_report_of_a_subset_says_that_joint_prompts_take_no_part():
    def said(tasks, scenes):
        report = merged(calibrated(scenes=scenes, seen=SEEN[: len(scenes)]), tasks=tasks)[1]
        notes = [note for note in report.notes if "joint prompts take no part" in note]
        return [note.split()[0] for note in notes], any("joint_prompts" in line for line in report.advice)

    assert said(TASKS, SCENES) == ([], False)
    assert said(TASKS[:2], SCENES) == (["1"], False)
    assert said(TASKS[1:], SCENES) == (["2"], True)


def test_scenes_of_a_dropped_lora_go_and_the_others_stay():
    left = keep(calibrated(), [2, 1])
    assert left.scenes == (Scene("nobody"),)
    found, _ = merged(left, tasks=[TASKS[2], TASKS[1]])
    expected = least_squares([TOKENS[2], TOKENS[1]], [SEEN[2]], [SCENES[2]], tasks=[TASKS[2], TASKS[1]])
    assert rel(found, expected) < 1e-10
    again, _ = merged(calibrated(), tasks=[TASKS[2], TASKS[1]])  # a subset chosen by the merge itself
    assert rel(again, expected) < 1e-10
    swapped = keep(calibrated(), [1, 0, 2])
    assert swapped.scenes[0] == SCENES[0]
    assert rel(merged(swapped)[0], merged(calibrated())[0]) < 1e-10


@pytest.mark.parametrize("sample", [None, SampleOptions(8)])
def test_files_keep_scenes(tmp_path, sample):
    calibration = calibrated(sample=sample)
    save_calibration(calibration, tmp_path / "c.safetensors")
    again = load_calibration(tmp_path / "c.safetensors")
    assert again.scenes == SCENES
    assert torch.equal(merged(again, SSRMerge())[0], merged(calibration, SSRMerge())[0])


def test_damaged_scenes_are_refused(tmp_path):
    save_calibration(calibrated(), tmp_path / "c.safetensors")
    tensors = load_file(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata = file.metadata()
    for name, value in (
        ("0.scene_gram", torch.full_like(tensors["0.scene_gram"], float("nan"))),
        ("0.scene_gram", tensors["0.scene_gram"][:, :-1].contiguous()),
        ("0.scene_tokens", -tensors["0.scene_tokens"]),
        ("0.scene_tokens", None),
        ("0.scene_nonfinite", -1 - tensors["0.scene_nonfinite"]),
    ):
        kept = {key: one for key, one in {**tensors, name: value}.items() if one is not None}
        save_file(kept, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(FileError, match="damaged"):
            load_calibration(tmp_path / "bad.safetensors")
    header = json.loads(metadata[FORMAT])
    header["scenes"][1]["tasks"] = [0, 1, 9]
    metadata = {FORMAT: json.dumps(header)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(FileError, match="damaged"):
        load_calibration(tmp_path / "bad.safetensors")


def test_tokens_of_scenes_that_are_not_finite_are_counted_and_said(tmp_path):
    """Several LoRAs at once may overflow where each alone did not."""
    spoiled = [x.clone() for x in SEEN]
    spoiled[0][:] = float("nan")
    spoiled[1][[2, 5]] = float("inf")
    calibration = calibrated(seen=spoiled, sample=SampleOptions(8))
    save_calibration(calibration, tmp_path / "c.safetensors")
    for found, factor in (
        (load_calibration(tmp_path / "c.safetensors"), 1),
        (combine([replace(calibration, settings={})] * 2), 2),
    ):
        lost = found.stats[LAYER].scenes.nonfinite
        assert dict(zip(found.scenes, lost.tolist(), strict=True)) == {
            one: factor * count for one, count in zip(SCENES, (20, 2, 0), strict=True)
        }
        warning = next(line for line in merged(found)[1].warnings if "NaN" in line)
        assert warning.startswith(f"{22 * factor} tokens were NaN or infinite")
    assert [float(one) for one in keep(calibration, [0, 1]).stats[LAYER].scenes.nonfinite] == [20, 0]


def test_runs_add_up_scene_by_scene():
    more, seen = [task_tokens(20 + k, 25, IN) for k in range(K)], [task_tokens(90 + j, 11, IN) for j in range(2)]
    first, second = calibrated(), calibrated(more, seen, (SCENES[2], SCENES[0]))
    total = combine([first, second])
    both = [torch.cat([SEEN[0], seen[1]]), SEEN[1], torch.cat([SEEN[2], seen[0]])]
    tokens = [torch.cat(pair) for pair in zip(TOKENS, more, strict=True)]
    assert rel(merged(total)[0], least_squares(tokens, both, SCENES)) < 1e-10
    assert rel(merged(combine([second, first]))[0], merged(total)[0]) < 1e-12


def test_a_prompt_given_twice_counts_twice_in_sums_too():
    twice, seen = (SCENES[0], SCENES[0], SCENES[2]), [SEEN[0], SEEN[1], SEEN[2]]
    once = calibrated(scenes=twice, seen=seen)
    assert rel(merged(combine([once]))[0], least_squares(TOKENS, seen, twice)) < 1e-10
    more, other = [task_tokens(20 + k, 25, IN) for k in range(K)], [task_tokens(90, 11, IN)]
    total = combine([calibrated(more, other, SCENES[:1]), once])
    tokens = [torch.cat(pair) for pair in zip(TOKENS, more, strict=True)]
    assert rel(merged(total)[0], least_squares(tokens, [torch.cat([SEEN[0], *other]), *seen[1:]], twice)) < 1e-10


def test_lines_become_scenes():
    names = ["people/alice.safetensors", "bob.safetensors", "ink.safetensors"]
    lines = ["a picture of all", " ", "[alice, 2] alice and bob", "[people/alice.safetensors,ink] alice in ink"]
    assert parse_scenes(lines, ["a tree", ""], names) == (
        Scene("a picture of all", (0, 1, 2)),
        Scene("alice and bob", (0, 1)),
        Scene("alice in ink", (0, 2)),
        Scene("a tree"),
    )
    for wrong, what in (
        ("[carol, bob] x", "carol"),
        ("[4, 1] x", "'4'"),
        ("[bob] x", "one LoRA alone"),
        ("[] x", "''"),
        ("[²,1] x", "'²'"),
        ("[alice, bob]", "no text"),
    ):
        with pytest.raises(IncompatibleError, match=what):
            parse_scenes([wrong], [], names)
    with pytest.raises(IncompatibleError, match="several"):
        parse_scenes(["[x, y] z"], [], ["a/x.safetensors", "b/x.safetensors", "y"])


def test_numbered_lines_are_read_back_where_loras_are_called_by_numbers():
    names = ["people/2.safetensors", "1", "03.safetensors"]
    scenes = (Scene("all", (0, 1, 2)), Scene("two", (0, 2)), Scene("nobody"))
    assert parse_scenes(*scene_lines(scenes, names), names) == scenes


def test_metadata_forgets_the_joint_prompts_of_loras_that_left():
    settings = {"seed": 3, "joint_prompts": ["[1, 2] both"], "neutral_prompts": []}
    left = keep(replace(calibrated(scenes=SCENES[:1], seen=SEEN[:1]), settings=settings), [2, 1])
    recipe = json.loads(merge_metadata([TASKS[2], TASKS[1]], SSRMerge(), left)["ssr_merge"])
    assert recipe["calibration"]["settings"] == {"seed": 3, "joint_prompts": [], "neutral_prompts": []}


def test_scene_samples_of_another_width_are_refused():
    calibration = calibrated(sample=SampleOptions(8))
    stats = calibration.stats[LAYER]
    samples = tuple(replace(one, rows=one.rows[:, 1:]) for one in stats.scenes.samples)
    broken = {LAYER: replace(stats, scenes=replace(stats.scenes, samples=samples))}
    with pytest.raises(IncompatibleError, match="sampled inputs are 13 wide"):
        merged(replace(calibration, stats=broken), SSRMerge())


def test_metadata_names_the_scenes_of_the_merged_loras():
    """A subset's file says by number, among its own LoRAs, which joint prompts were in force."""
    calibration = calibrated()
    for tasks, joint in (
        (TASKS, ["[1, 2] both", "[1, 2, 3] everyone"]),
        ([TASKS[1], TASKS[0]], ["[1, 2] both"]),
        ([TASKS[2], TASKS[0]], []),
    ):
        settings = json.loads(merge_metadata(tasks, SSRMerge(), calibration)["ssr_merge"])["calibration"]["settings"]
        assert settings["joint_prompts"] == joint
        assert settings["neutral_prompts"] == ["nobody"]
        names = [one.name for one in tasks]
        places = [TASKS.index(one) for one in tasks]
        assert parse_scenes(joint, ["nobody"], names) == keep(calibration, places).scenes


def test_compression_counts_scenes_among_the_calibrated_outputs():
    """The error that a truncation states is the one on all passes' tokens."""
    calibration = calibrated()
    result = merge(TASKS, SSRMerge(refine=False), calibration, dtype=F64)
    small, report = compress(result, CompressOptions("rank", 2, 0.0), TASKS, calibration)
    whole, less = result.layers[LAYER].delta(F64), small.layers[LAYER].delta(F64)
    error = energy = 0.0
    for x in (*TOKENS, *SEEN):
        error += float((x @ (whole - less).T).square().sum()) / len(x)
        energy += float((x @ whole.T).square().sum()) / len(x)
    assert report.layers[0].error == pytest.approx((error / energy) ** 0.5, rel=1e-6)


def test_scenes_without_a_pass_are_refused():
    module = linear64(IN, OUT)
    with pytest.raises(CalibrationError, match="run_scene"):
        calibrate(
            nn.ModuleDict({"layer": module}),
            TASKS,
            build_stacks(TASKS),
            lambda k, tap: module(TOKENS[k]),
            scenes=SCENES,
        )


def test_room_for_a_solve_counts_the_scenes():
    """Their Grams in float64, and with the rows of who acts, beside the tasks'."""
    stack, bare = build_stacks(TASKS)[0], calibrated(scenes=(), seen=[])
    with_scenes, without = (
        Statistics(TASKS, SSRMerge(), one, "anchor", True).bytes_to_solve(stack) for one in (calibrated(), bare)
    )
    gram = 8 * sum(stack.basis_ranks) ** 2
    assert 2 * len(SCENES) * gram <= with_scenes - without <= 4 * len(SCENES) * gram


def test_a_joint_prompt_of_others_is_measured_as_a_neutral_one():
    tasks = [*TASKS[:2], task("else", {Target("other"): lora(3, OUT, IN, RANK)})]
    tasks.append(task("more", {Target("other"): lora(4, OUT, IN, RANK)}))
    root = nn.ModuleDict({"layer": linear64(IN, OUT), "other": linear64(IN, OUT)})
    x = [*TOKENS, TOKENS[0], SEEN[0]]

    def run(index, tap):
        for module in root.values():
            module(x[index])

    scenes = (Scene("else and more", (2, 3)),)
    found = calibrate(root, tasks, build_stacks(tasks), run, scenes=scenes, run_scene=lambda j, tap: run(4, tap))
    layers = {layer.target: layer for layer in merged(found, tasks=tasks)[1].layers}
    assert set(layers[LAYER].measures) == {NEUTRAL}
    assert set(layers[Target("other")].measures) == {JOINT}


def test_convolutions_have_scenes_too():
    tasks = [task(f"t{k}", lora(k, 5, 4 * 9, RANK, kernel=(3, 3))) for k in range(2)]
    module, inputs = (
        nn.Conv2d(4, 5, 3, padding=1).double().requires_grad_(False),
        [randn(k, 1, 4, 6, 6) for k in range(3)],
    )
    given = []
    found = calibrate(
        nn.ModuleDict({"layer": module}),
        tasks,
        build_stacks(tasks),
        lambda k, tap: module(inputs[k]),
        scenes=(Scene("both", (0, 1)),),
        run_scene=lambda j, tap: given.append(module(inputs[2])),
    )
    weight = sum(one.adapter.layers[LAYER].delta(F64) for one in tasks).reshape(5, 4, 3, 3)
    expected = torch.nn.functional.conv2d(inputs[2], module.weight + weight, module.bias, padding=1)
    assert rel(given[0], expected) < 1e-12
    columns = torch.nn.functional.unfold(inputs[2], 3, padding=1)[0].T
    z = columns @ build_stacks(tasks)[0].basis.to(F64).T
    assert rel(found.stats[LAYER].scenes.gram[0], z.T @ z) < 1e-12
