"""A folder of records: found by what they were made of, listed.

There is no index: a record's name begins with the key of its identity, and each file appears whole
or not at all. Any number of processes may write at once; the same record twice is the same file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic import stale_scratch
from ..errors import FileError
from ..targets import Target
from ..words import number_of
from .factor import InputFactor
from .identity import RecordIdentity
from .record_io import SUFFIX, RecordFile, open_record, save_record
from .sketch import RecordOptions


@dataclass(frozen=True)
class Listed:
    """One file of a library.

    Attributes:
        path: The file.
        size: Bytes.
        modified: When it was written, in seconds since 1970.
        record: What it holds; None if it cannot be used.
        problem: Why not.
        content: What tells it from a file that another process puts there later; None for `unfinished`.
    """

    path: Path
    size: int
    modified: float
    record: RecordFile | None
    problem: str = ""
    content: tuple[int, ...] | None = None

    @property
    def unfinished(self) -> bool:
        """Whether it is no file, but what a killed process left while it wrote one."""
        return self.content is None


class RecordLibrary:
    """Records in one folder, and beside the LoRAs.

    Args:
        root: Where new records are written, and looked for.
        beside: Further folders to look in; folders that do not exist are empty.
    """

    def __init__(self, root: Path, beside: Iterable[Path] = ()) -> None:
        self.root = root
        self.folders = list(dict.fromkeys([root, *beside]))

    def save(
        self,
        identity: RecordIdentity,
        options: RecordOptions,
        layers: Mapping[Target, InputFactor],
        folder: Path | None = None,
    ) -> RecordFile:
        """Write a record under its key; another size of the same run is another file.

        Raises:
            FileError: It cannot be written; nothing is left half-written.
        """
        path = (folder or self.root) / f"{identity.key}-{size_name(options)}{SUFFIX}"
        save_record(path, identity, options, layers)
        return open_record(path)

    def find(
        self, identity: RecordIdentity, least: RecordOptions | None = None, *, exactly: bool = False
    ) -> RecordFile | None:
        """The largest usable record of one run.

        Args:
            identity: What it must have been made of.
            least: Records that keep less than this do not count; None takes any.
            exactly: Nor do those that keep more.
        """
        found = []
        for folder in self.folders:
            for path in sorted(folder.glob(f"{identity.key}-*{SUFFIX}")):
                one = _listed(path)
                # the header decides; a name can be anything
                if one is not None and one.record is not None and one.record.identity.key == identity.key:
                    found.append(one.record)
        if least is not None:
            found = [one for one in found if (one.options == least if exactly else _covers(one.options, least))]
        return max(found, key=lambda one: _size(one.options), default=None)

    def listing(self) -> list[Listed]:
        """All files, the newest first; what cannot be read has its reason. And what killed processes left."""
        paths = {path for folder in self.folders for path in folder.glob(f"*{SUFFIX}")}
        found = [one for path in paths if not path.name.startswith(".") and (one := _listed(path)) is not None]
        left = [one for folder in self.folders for one in stale_scratch(folder)]
        found += [Listed(path, size, changed, None, _LEFT) for path, size, changed in left]
        return sorted(found, key=lambda one: (-one.modified, str(one.path)))

    def nearest(self, identity: RecordIdentity) -> str:
        """Why there is no record of a run: how the most similar one differs, or what is wrong with it."""
        best: tuple[tuple[int, int], str] | None = None
        for one in self.listing():
            if one.record is None:
                if one.path.name.startswith(identity.key):
                    return f"{one.path.name} is refused: {one.problem}"
                continue
            theirs, mine = one.record.identity, identity
            same_content = theirs.task.fingerprint == mine.task.fingerprint
            if not same_content and theirs.task.name != mine.task.name:
                continue
            differences = mine.differences(theirs)
            text = f"the record {one.path.name} differs in: {'; '.join(differences)}"
            if not same_content:
                text = f"the file changed since the record {one.path.name} was made of it"
            rank = (int(not same_content), len(differences))
            if best is None or rank < best[0]:
                best = rank, text
        return "no record was made of this LoRA" if best is None else best[1]


_LEFT = "left by a process that was killed while it wrote"


def content_of(stat: os.stat_result) -> tuple[int, ...]:
    """What stays the same as long as nobody puts another file in a file's place."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def size_name(options: RecordOptions) -> str:
    """What tells records of different size apart."""
    budget = f"-{options.budget_mb:g}mb" if options.budget_mb else ""
    return f"{options.columns}x{options.exact_limit}+{options.sampled_tokens}{budget}"


def _size(options: RecordOptions) -> tuple[float, ...]:
    return (options.budget_mb or float("inf"), options.columns, options.sampled_tokens, options.exact_limit)


def _covers(mine: RecordOptions, least: RecordOptions) -> bool:
    return all(a >= b for a, b in zip(_size(mine), _size(least), strict=True))


def _listed(path: Path) -> Listed | None:
    """A file as it stands; None if another process removed it meanwhile."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    known = content_of(stat)  # of before: a file that is replaced while it is read is none that was listed
    try:
        return Listed(path, stat.st_size, stat.st_mtime, open_record(path), "", known)
    except FileError as err:
        return Listed(path, stat.st_size, stat.st_mtime, None, str(err), known) if path.exists() else None


def listing_text(listed: Sequence[Listed], folder: Path) -> str:
    """A library as people read it."""
    total, left = sum(one.size for one in listed), sum(one.unfinished for one in listed)
    also = f" {left} of them were never finished; clean removes them." if left else ""
    lines = [f"# Records in {folder}", "", f"{number_of(len(listed), 'record')}, {total / 1e6:.1f} MB.{also}", ""]
    if listed:
        lines += ["| LoRA | strength | prompts | columns | MB | model | file |", "|---|---|---|---|---|---|---|"]
    for one in listed:
        if one.record is None:
            state = "unfinished" if one.unfinished else "refused"
            lines.append(f"| {state} | | | | {one.size / 1e6:.1f} | | {one.path.name}: {one.problem} |")
            continue
        task, size = one.record.identity.task, one.record.options.columns
        prompts = " / ".join(task.prompts).replace("|", "\\|")
        lines.append(
            f"| {task.name} | {task.strength_model:g} | {prompts} | {size} | {one.size / 1e6:.1f} | "
            f"{one.record.identity.model[:8]} | {one.path.name} |"
        )
    return "\n".join(lines) + "\n"
