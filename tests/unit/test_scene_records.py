"""Joint and neutral prompts as people write them, in files, sums, metadata and reports."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    LAYER,
    rel,
    task_tokens,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scene_world import IN, SCENES, SEEN, TASKS, TOKENS, K, calibrated, least_squares, merged

from ssr_core import (
    FileError,
    IncompatibleError,
    SampleOptions,
    Scene,
    SSRMerge,
    combine,
    keep,
    load_calibration,
    merge_metadata,
    parse_scenes,
    save_calibration,
)
from ssr_core.calibration_io import FORMAT
from ssr_core.scene_lines import scene_lines


def test_the_report_of_a_subset_says_that_joint_prompts_take_no_part():
    def said(tasks, scenes):
        report = merged(calibrated(scenes=scenes, seen=SEEN[: len(scenes)]), tasks=tasks)[1]
        notes = [note for note in report.notes if "no part, as some" in note]
        return [note.split()[0] for note in notes], any("joint_prompts" in line for line in report.advice)

    assert said(TASKS, SCENES) == ([], False)
    assert said(TASKS[:2], SCENES) == (["1"], False)
    assert said(TASKS[1:], SCENES) == (["2"], True)


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
