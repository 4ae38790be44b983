"""What the quality benchmark has measured, and what is left."""

from __future__ import annotations

import pytest

from benchmarks.quality.__main__ import _left
from benchmarks.quality.parts import PARTS, jobs_of, method_names
from benchmarks.quality.records import Kept, Record, paired, rows
from benchmarks.quality.report import table
from benchmarks.quality.world.building import FULL, TOY

ABLATIONS = ("scales", "solve", "data", "neutral", "wording")


def record(method, value, seed=0, table="t"):
    return Record(table, method, 3, "success", seed, value)


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "records")


def test_jobs_have_names_of_their_own_and_settings_are_chosen_on_other_seeds_than_they_are_judged_by():
    jobs = jobs_of(FULL, list(PARTS))
    assert len({job.name for job in jobs}) == len(jobs) > 50
    tuned = {job.seed for job in jobs if job.part in ABLATIONS}
    judged = {job.seed for job in jobs if job.part not in (*ABLATIONS, "baseline")}
    assert tuned == {0, 1, 2} and judged == {10, 11, 12, 13, 14}


def test_some_methods_are_measured_in_the_parts_that_have_them():
    jobs = jobs_of(FULL, list(PARTS), ["IterIS"])
    assert {job.part for job in jobs} == {"preservation", "composition", "styled", "crowd"}
    assert all(job.methods == ("IterIS",) for job in jobs)
    assert {"IterIS", "TIES, scale 1.5", "NP-LoRA, hard"} <= method_names(TOY)


def test_values_are_kept_and_replaced_by_method(kept):
    assert kept.methods("a") is None and kept.read("a") == []
    kept.write("a", ["x", "y"], [record("x", 0.1), record("y", 0.2)], add=False)
    kept.write("a", ["y", "z"], [record("y", 0.3), record("z", 0.4)], add=True)
    assert sorted(kept.methods("a")) == ["x", "y", "z"]
    assert {one.method: one.value for one in kept.read("a")} == {"x": 0.1, "y": 0.3, "z": 0.4}
    kept.write("a", ["z"], [record("z", 0.5)], add=False)
    assert kept.methods("a") == ["z"] and [one.value for one in kept.read("a")] == [0.5]
    assert [file.name for file in kept.folder.iterdir()] == ["a.json"]
    kept.clear()
    assert kept.methods("a") is None


def test_what_is_left_is_what_no_job_has_compared(kept):
    job, other = jobs_of(TOY, ["neutral", "baseline"])
    assert _left([job, other], kept) == [job, other]
    kept.write(job.name, job.methods[1:], [], add=False)
    kept.write(other.name, (), [], add=False)
    (left,) = _left([job, other], kept)
    assert left.name == job.name and left.methods == job.methods[:1]


def test_values_stand_in_the_order_of_the_methods_and_the_upper_bound_first():
    job = jobs_of(TOY, ["preservation"])[0]
    found = [record(name, 1.0) for name in ("TIES", "sum", "single LoRA", "average")]
    assert [one.method for one in sorted(found, key=job.place)] == ["single LoRA", "average", "sum", "TIES"]


def test_a_table_of_the_upper_bound_alone_has_no_best():
    lines = table(rows([record("single LoRA", 1.0)]), "t", "success")
    assert lines[2] == "| single LoRA | 1.000 |"


def test_differences_are_paired_by_seed():
    records = [record("x", 0.5, 1), record("y", 0.2, 1), record("x", 0.9, 2), record("y", 0.7, 3)]
    assert paired(records, "t", "success", "x", "y") == pytest.approx([0.3])
