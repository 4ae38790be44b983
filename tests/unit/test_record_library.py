"""A folder of records: found by what they were made of, refused with a reason, shared by processes."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from recording import SETTINGS, Attention, identity_of, key_map, record_all, recorded_tasks, tokens

from ssr_core import CleanRule, ConvertOptions, FileError, RecordLibrary, RecordOptions, clean, listing_text, record

ROOT = Path(__file__).resolve().parents[2]
SMALL = RecordOptions(columns=4, exact_limit=0)


@pytest.fixture
def world(tmp_path):
    model, tasks = Attention(), recorded_tasks(2)
    shares, library = record_all(tmp_path, model, tasks, [[tokens(k)] for k in range(2)], SMALL)
    return model, tasks, shares, library


def add(library, model, one, options=SMALL, folder=None, **changes):
    layers = record(model, one, key_map(), lambda tap: model(tokens(0)), options)
    return library.save(identity_of(one, **changes), options, layers, folder)


def test_a_record_is_found_by_what_it_was_made_of(world):
    _, tasks, shares, library = world
    for one, mine in zip(tasks, shares, strict=True):
        found = library.find(identity_of(one))
        assert found.path == mine[0].record.path and found.identity == identity_of(one)
    renamed = identity_of(tasks[0])
    assert library.find(replace(renamed, task=replace(renamed.task, name="renamed"))) is not None


CHANGES = {
    "strength": lambda i: replace(i, task=replace(i.task, strength_model=0.5)),
    "prompts": lambda i: replace(i, task=replace(i.task, prompts=("else",))),
    "model": lambda i: replace(i, model="other"),
    "text encoder": lambda i: replace(i, text_encoder="other"),
    "seed": lambda i: replace(i, settings={**SETTINGS, "seed": 8}),
    "sigmas": lambda i: replace(i, settings={**SETTINGS, "sigmas": [0.5]}),
    "conversion": lambda i: replace(i, task=replace(i.task, convert_options=ConvertOptions(4))),
    "changed since": lambda i: replace(i, task=replace(i.task, fingerprint="new")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_is_not_found_and_the_reason_is_named(world, what):
    _, tasks, _, library = world
    wanted = CHANGES[what](identity_of(tasks[0]))
    assert library.find(wanted) is None
    assert what in library.nearest(wanted)


def test_an_unknown_lora_has_no_near_record(world):
    _, _, _, library = world
    stranger = identity_of(recorded_tasks(3)[2])
    assert library.nearest(stranger) == "no record was made of this LoRA"


def test_the_largest_record_of_a_run_is_taken(world):
    model, tasks, _, library = world
    large = add(library, model, tasks[0], RecordOptions(columns=9, exact_limit=0))
    assert library.find(identity_of(tasks[0])).path == large.path
    assert library.find(identity_of(tasks[0]), RecordOptions(columns=9, exact_limit=0)) is not None
    assert library.find(identity_of(tasks[0]), RecordOptions(columns=10, exact_limit=0)) is None
    assert library.find(identity_of(tasks[1]), RecordOptions(columns=9, exact_limit=0)) is None


def test_records_beside_a_lora_are_found(world, tmp_path):
    model, tasks, _, library = world
    beside = tmp_path / "loras"
    moved = replace(tasks[0], prompts=("beside",))
    made = add(library, model, moved, folder=beside)
    assert library.find(identity_of(moved)) is None
    wide = RecordLibrary(library.root, [beside, tmp_path / "missing"])
    assert wide.find(identity_of(moved)).path == made.path and len(wide.listing()) == 3


def test_a_damaged_record_is_passed_over_and_listed_with_its_reason(world):
    _, tasks, shares, library = world
    path = shares[0][0].record.path
    path.write_bytes(path.read_bytes()[:-20])
    assert library.find(identity_of(tasks[0])) is None
    assert path.name in library.nearest(identity_of(tasks[0]))
    listed = {one.path: one for one in library.listing()}
    assert listed[path].record is None and "not a whole" in listed[path].problem
    assert "refused" in listing_text(library.listing(), library.root)


def test_a_name_proves_nothing(world):
    """A record of another run under this run's name is not misread."""
    _, tasks, shares, library = world
    first, second = (mine[0].record.path for mine in shares)
    first.unlink()
    second.rename(first)
    assert library.find(identity_of(tasks[0])) is None


def test_cleaning(world):
    _, tasks, shares, library = world
    paths = [mine[0].record.path for mine in shares]
    now = time.time()
    os.utime(paths[1], (now, now - 10 * 86400))
    listed = library.listing()
    assert [one.path for one in listed] == paths
    assert clean(listed, CleanRule(), now, dry=False) == []
    old = clean(listed, CleanRule(older_than_days=9), now, dry=True)
    assert [(one.path, why) for one, why in old] == [(paths[1], "10 days old")] and paths[1].exists()
    gone = clean(listed, CleanRule(contents={tasks[1].adapter.fingerprint}), now, dry=False)
    assert [one.path for one, _ in gone] == [paths[0]] and not paths[0].exists() and paths[1].exists()
    paths[1].write_bytes(b"x")
    assert len(clean(library.listing(), CleanRule(damaged=False), now, dry=False)) == 0
    assert len(clean(library.listing(), CleanRule(), now, dry=False)) == 1 and library.listing() == []
    assert clean(listed, CleanRule(everything=True), now, dry=False)  # gone already: no error


def test_a_library_that_cannot_be_written_says_so(world, tmp_path):
    model, tasks, _, _ = world
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(FileError, match="cannot write here"):
        add(RecordLibrary(blocked), model, tasks[0])


WRITER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from recording import identity_of, recorded_tasks
from dataclasses import replace
from ssr_core import InputFactor, RecordLibrary, RecordOptions, Target
library = RecordLibrary(Path({path!r}))
factor = InputFactor(torch.ones(64, 8).half(), torch.ones(8), 2, 10.0, 10.0)
one = recorded_tasks(1)[0]
for number in range(40):
    prompt = f"shared {{number}}" if number % 2 else f"{who} {{number}}"
    library.save(identity_of(replace(one, prompts=(prompt,))), RecordOptions(), {{Target("q"): factor}})
    assert all(one.problem == "" for one in library.listing())
"""


def test_processes_share_a_library_without_losing_a_record(tmp_path):
    writers = []
    for who in ("a", "b"):
        code = WRITER.format(root=str(ROOT), tests=str(ROOT / "tests" / "unit"), path=str(tmp_path), who=who)
        writers.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True))
    for one in writers:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors
    library = RecordLibrary(tmp_path)
    one = recorded_tasks(1)[0]
    for number in range(40):
        for who in ("shared",) if number % 2 else ("a", "b"):
            assert library.find(identity_of(replace(one, prompts=(f"{who} {number}",)))) is not None
    assert len(library.listing()) == 60 == len(list(tmp_path.iterdir()))
