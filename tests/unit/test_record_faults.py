"""Other processes write, replace and remove records while this one cleans and reads."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recording import Attention, identity_of, key_map, record_all, recorded_tasks, tokens

from ssr_core import CleanRule, FileError, InputFactor, RecordLibrary, RecordOptions, Target, clean, record

ROOT = Path(__file__).resolve().parents[2]
SMALL = RecordOptions(columns=4, exact_limit=0)


@pytest.fixture
def world(tmp_path):
    model, tasks = Attention(), recorded_tasks(2)
    shares, library = record_all(tmp_path, model, tasks, [[tokens(k)] for k in range(2)], SMALL)
    return model, tasks, shares, library


def add(library, model, one, inputs):
    layers = record(model, one, key_map(), lambda tap: model(inputs), SMALL)
    return library.save(identity_of(one), SMALL, layers)


RECORDER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from recording import identity_of, recorded_tasks
from ssr_core import InputFactor, RecordLibrary, RecordOptions, Target
factor = InputFactor(torch.ones(64, 8).half(), torch.ones(8), 2, 10.0, 10.0)
input()
library = RecordLibrary(Path({path!r}))
made = library.save(identity_of(recorded_tasks(1)[0]), RecordOptions(), {{Target("q"): factor}})
print(made.path, flush=True)
input()
"""


def recorder(tmp_path):
    """Another process, which records at a word and then waits."""
    code = RECORDER.format(root=str(ROOT), tests=str(ROOT / "tests" / "unit"), path=str(tmp_path))
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def recorded_by(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return Path(process.stdout.readline().strip())


@pytest.mark.parametrize("when", ["after the listing", "after the last look", "and once more"])
def test_a_record_made_anew_while_the_library_is_cleaned_stays(tmp_path, monkeypatch, when):
    one = recorded_tasks(1)[0]
    library = RecordLibrary(tmp_path)
    factor = InputFactor(torch.ones(64, 8).half(), torch.ones(8), 2, 10.0, 10.0)
    path = library.save(identity_of(one), RecordOptions(), {Target("q"): factor}).path
    path.write_bytes(b"damaged")
    listed, others = library.listing(), [recorder(tmp_path) for _ in range(2)]
    rename = Path.rename
    names = []

    def meanwhile(source, target):
        monkeypatch.setattr(Path, "rename", rename)
        names.append(recorded_by(others[0]))
        moved = rename(source, target)
        if when == "and once more":
            names.append(recorded_by(others[1]))
        return moved

    if when == "after the listing":
        names.append(recorded_by(others[0]))
    else:
        monkeypatch.setattr(Path, "rename", meanwhile)
    try:
        assert clean(listed, CleanRule(), time.time(), dry=False) == []
    finally:
        for process in others:
            process.kill()
            process.communicate()
    assert set(names) == {path} and library.find(identity_of(one)).path == path
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_removed_is_named(world, monkeypatch):
    _, _, shares, library = world

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(FileError, match="cannot remove the record"):
        clean(library.listing(), CleanRule(everything=True), time.time(), dry=False)
    assert all(mine[0].record.path.exists() for mine in shares)


def test_a_record_that_is_replaced_while_it_is_read_is_noticed_or_read_on(world):
    model, tasks, shares, library = world
    mine = shares[0][0].record
    before = mine.layers()
    with mine.reading() as read:  # open: what is read is what was there
        add(library, model, tasks[0], tokens(9))
        assert all(torch.equal(read(target).columns, factor.columns) for target, factor in before.items())
    with pytest.raises(FileError, match=r"(?s)was replaced since it was looked up.*run it again"):
        mine.layers()
    assert set(library.find(identity_of(tasks[0])).layers()) == set(before)
    mine.path.unlink()
    with pytest.raises(FileError, match=r"(?s)was removed since it was looked up.*run it again"):
        mine.layers()


def test_the_same_record_written_again_is_the_same(world):
    model, tasks, shares, library = world
    before = shares[0][0].record.layers()
    add(library, model, tasks[0], tokens(0))
    after = shares[0][0].record.layers()
    assert all(torch.equal(after[target].columns, factor.columns) for target, factor in before.items())
