"""Merges whose calibration no single run gives, made again by the command from their own metadata."""

from __future__ import annotations

import ast
import re
import shutil

import pytest

from .conftest import PACK
from .merging import MergeGraph
from .test_headless import EQUAL, FAMILY, PROMPTS, difference, files, run

OTHER = (("a fox asleep",), ("a heron in flight", "a heron in reeds"))


@pytest.fixture
def library(base):
    """An empty library."""
    folder = base / "output" / "calibrations" / "records"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def loras(graph, tasks, prompts):
    """SSR LoRA nodes with prompts."""
    return [
        graph.pack(
            "SSRLoRA",
            lora=task.file.name,
            strength_model=task.strength,
            strength_clip=task.strength,
            prompts="\n".join(words),
        )
        for task, words in zip(tasks, prompts, strict=True)
    ]


def made_again(result, checkout, base, saved, tmp_path):
    """The file that the nodes saved, the one that the command makes of it, and what the command says."""
    path = base / "output" / "loras" / re.split(r"[\\/]", result.text(saved))[-1]
    output = tmp_path / "again.safetensors"
    code, _, err = run(checkout, base, path, "--again", "--trust-graph", "--output", output)
    assert code == 0, err
    return path, output, err


def test_a_merge_of_combined_runs_is_made_again_from_its_metadata(server, checkout, base, tmp_path):
    tasks, graph = files(base), MergeGraph(server)
    values = {"model": graph.checkpoint(FAMILY), "clip": graph.add("TinyCLIP", kind=FAMILY, seed=0), "steps": 2}
    parts = [
        graph.join("SSRCalibrate", loras(graph, tasks, prompts), **values, seed=seed)
        for prompts, seed in ((PROMPTS, 1), (OTHER, 2))
    ]
    sockets = {f"calibrations.calibration{i}": part for i, part in enumerate(parts)}
    whole = graph.pack("SSRCombineCalibrations", {"weights": "1 0.5"} | sockets)
    solved = graph.pack("SSRSolve", model=values["model"], clip=values["clip"], calibration=whole)
    saved = graph.save(solved, "again_combined")
    path, output, err = made_again(server.run(graph.prompt).ok(), checkout, base, saved, tmp_path)
    assert difference(path, output) < EQUAL and "Ignored" not in err


@pytest.mark.parametrize("kept", [True, False], ids=["records that are there", "records made again"])
def test_a_merge_from_records_is_made_again_from_its_metadata(server, checkout, base, library, tmp_path, kept):
    tasks, graph = files(base), MergeGraph(server)
    merged = graph.join(
        "SSRMergeFromRecords",
        loras(graph, tasks, PROMPTS),
        model=graph.checkpoint(FAMILY),
        clip=graph.add("TinyCLIP", kind=FAMILY, seed=0),
        steps=2,
        seed=3 + kept,
        columns=8,
        exact_limit=16,
        prompt_weights="1 0.5\n1",
    )
    saved = graph.save(merged, "again_records")
    result = server.run(graph.prompt).ok()
    before = {one.name: one.stat().st_ino for one in library.iterdir()}
    assert len(before) == 3
    if not kept:
        shutil.rmtree(library)
    path, output, err = made_again(result, checkout, base, saved, tmp_path)
    assert difference(path, output) < EQUAL and "Ignored" not in err
    after = {one.name: one.stat().st_ino for one in library.iterdir()}
    assert after.keys() == before.keys() and (after == before) == kept


def test_every_node_whose_merge_can_be_saved_has_its_model_in_the_metadata(server):
    source = ast.parse((PACK / "nodes" / "model_source.py").read_text(encoding="utf-8"))
    (merges,) = (
        one.value.args[0] for one in source.body if isinstance(one, ast.Assign) and isinstance(one.value, ast.Call)
    )
    known = {name for name, one in server.schemas().items() if one["output"][:3] == ["MODEL", "CLIP", "LORA_MODEL"]}
    assert {name for name in known if name.startswith("SSR")} == ast.literal_eval(merges)
