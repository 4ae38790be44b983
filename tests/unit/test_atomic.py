"""Files that are whole or absent: power cuts, killed processes, what these leave behind."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path, PurePath

import pytest
import torch
from recording import identity_of, recorded_tasks

from ssr_core import CleanRule, FileError, InputFactor, RecordLibrary, RecordOptions, Target, atomic_path, clean
from ssr_core.atomic import STALE_SECONDS, in_scratch, stale_scratch

ROOT = Path(__file__).resolve().parents[2]
FACTOR = InputFactor(torch.ones(64, 8).half(), torch.ones(8), 2, 10.0, 10.0)


class Disk:
    """What survives a power cut: of flushed files the content, of flushed folders the names."""

    def __init__(self, monkeypatch):
        self.content, self.names = {}, {}
        self.sync, monkeypatch_sync = os.fsync, self.flushed
        monkeypatch.setattr(os, "fsync", monkeypatch_sync)

    def flushed(self, handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_dir():
            self.names[path] = {one.name: one.stat().st_ino for one in path.iterdir() if one.is_file()}
        else:
            self.content[path.stat().st_ino] = path.read_bytes()
        self.sync(handle)

    def after_power_cut(self, path):
        """None: no such name. Content of a file that was never flushed is what a disk may make of it: nothing."""
        inode = self.names.get(path.parent, {}).get(path.name)
        return None if inode is None else self.content.get(inode, b"")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux to see what is flushed")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_survives_a_power_cut_or_was_never_there(tmp_path, monkeypatch, overwrite):
    disk, path = Disk(monkeypatch), tmp_path / "one.record"
    if overwrite:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"earlier")
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(b"new")
        assert disk.after_power_cut(path) == (b"earlier" if overwrite else None)
    assert disk.after_power_cut(path) == b"new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_cannot_be_flushed_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch, overwrite):
    path = tmp_path / "one.record"
    if overwrite:
        path.write_bytes(b"earlier")

    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="Input/output error"), atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(b"new")
    assert [one.read_bytes() for one in tmp_path.iterdir()] == ([b"earlier"] if overwrite else [])


def test_a_file_system_that_flushes_no_folders_is_no_error(tmp_path, monkeypatch):
    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", only_files)
    with atomic_path(tmp_path / "one.record") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "one.record").read_bytes() == b"new"


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
import safetensors.torch
from recording import identity_of, recorded_tasks
from ssr_core import InputFactor, RecordLibrary, RecordOptions, Target
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
moment = {moment!r}
if moment == "half written":
    safetensors.torch.save_file = lambda tensors, path, metadata: (Path(path).write_bytes(b"half"), die())
elif moment == "before the flush":
    os.fsync = die
elif moment == "before the name":
    Path.replace = die
factor = InputFactor(torch.full((64, 8), 2.0).half(), torch.ones(8), 2, 10.0, 10.0)
RecordLibrary(Path({folder!r})).save(identity_of(recorded_tasks(1)[0]), RecordOptions(), {{Target("q"): factor}})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("moment", ["half written", "before the flush", "before the name"])
def test_a_killed_process_leaves_no_half_record_and_what_it_leaves_is_cleaned(tmp_path, moment, earlier):
    library, identity = RecordLibrary(tmp_path), identity_of(recorded_tasks(1)[0])
    if earlier:
        library.save(identity, RecordOptions(), {Target("q"): FACTOR})
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests" / "unit"), moment=moment, folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    found = library.find(identity)
    assert (found is not None) == earlier
    if earlier:
        assert torch.equal(found.layers()[Target("q")].columns, FACTOR.columns)
    (left,) = [one for one in tmp_path.iterdir() if one.is_dir()]
    assert len(library.listing()) == earlier, "its process could be alive"
    long_ago = time.time() - STALE_SECONDS - 10
    for one in (*left.iterdir(), left):
        os.utime(one, (long_ago, long_ago))
    assert [one.path for one in library.listing() if one.unfinished] == [left]
    assert [one.path for one, _ in clean(library.listing(), CleanRule(), time.time(), dry=True)] == [left]
    assert [one.path for one, _ in clean(library.listing(), CleanRule(), time.time(), dry=False)] == [left]
    assert not left.exists() and len(library.listing()) == earlier == len(list(tmp_path.iterdir()))


def test_folders_of_others_are_no_leftovers(tmp_path, monkeypatch):
    long_ago = time.time() - STALE_SECONDS - 10
    for name in (".git", ".x.0123abcd.tmp", "x.0123abcd.ssrtmp", ".x.0123abcg.ssrtmp", ".x.ssrtmp"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (long_ago, long_ago))
    file, private = tmp_path / ".x.0123abce.ssrtmp", tmp_path / ".x.0123abcf.ssrtmp"
    file.write_text("no folder")
    private.mkdir(mode=0)
    listed = Path.iterdir

    def iterdir(path):  # also where tests are run by somebody who may read everything
        if path == private:
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert stale_scratch(tmp_path) == []
    ours = tmp_path / ".x.0123abcd.ssrtmp"
    ours.mkdir()
    os.utime(ours, (long_ago, long_ago))
    assert [path for path, _, _ in stale_scratch(tmp_path)] == [ours]


def test_files_that_are_being_written_are_told_from_others(tmp_path):
    with atomic_path(tmp_path / "sub" / "one.safetensors") as temporary:
        assert in_scratch(temporary) and in_scratch(temporary.relative_to(tmp_path))
    for name in ("one.safetensors", "sub/one.safetensors", ".x/one.safetensors", "sub/.x.0123abcd.ssrtmp"):
        assert not in_scratch(PurePath(name))


def test_a_writer_whose_scratch_was_cleaned_fails_with_words(tmp_path):
    """A machine that slept for hours: its folder was taken for left behind."""
    path = tmp_path / "one.record"
    with pytest.raises(FileError, match="writing failed"), atomic_path(path) as temporary:
        temporary.unlink()
        temporary.parent.rmdir()
    assert list(tmp_path.iterdir()) == []
