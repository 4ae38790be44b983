"""Removing records: those that were listed, never one that another process wrote meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..atomic import rename_to_new, scratch_folder
from ..errors import FileError
from .library import Listed, content_of


@dataclass(frozen=True)
class CleanRule:
    """Which records go.

    Attributes:
        damaged: Those that cannot be read, of other versions included, and what killed processes left.
        older_than_days: Those that were written longer ago; 0 for any age.
        contents: If given, those whose LoRA is none of these fingerprints: its file changed or is gone.
        everything: All.
    """

    damaged: bool = True
    older_than_days: float = 0.0
    contents: Collection[str] | None = None
    everything: bool = False

    def reason(self, one: Listed, now: float) -> str:
        """Why a record goes; empty if it stays."""
        if self.everything:
            return "all were to go"
        if one.record is None:
            return one.problem if self.damaged else ""
        if self.contents is not None and one.record.identity.task.fingerprint not in self.contents:
            return "its LoRA changed or is gone"
        days = (now - one.modified) / 86400
        return f"{days:.0f} days old" if 0 < self.older_than_days < days else ""


def clean(listed: Sequence[Listed], rule: CleanRule, now: float, *, dry: bool) -> list[tuple[Listed, str]]:
    """Remove records.

    Args:
        listed: `RecordLibrary.listing()`.
        rule: Which ones.
        now: Seconds since 1970.
        dry: Only say which.

    Returns:
        Those that went (or would go), with the reason. One that another process has recorded again
        since the listing stays.

    Raises:
        FileError: One cannot be removed.
    """
    chosen = [(one, reason) for one in listed if (reason := rule.reason(one, now))]
    return chosen if dry else [(one, reason) for one, reason in chosen if _removed(one)]


def _removed(one: Listed) -> bool:
    """Remove what was listed; False if another file has taken its place."""
    try:
        if one.unfinished:
            shutil.rmtree(one.path)
            return True
        if content_of(one.path.stat()) != one.content:
            return False
        return _taken_away(one)
    except FileNotFoundError:  # gone already
        return True
    except OSError as err:
        raise FileError(
            f"cannot remove the record ({err.strerror}).", file=str(one.path), remedy="check who may write there."
        ) from err


def _taken_away(one: Listed) -> bool:
    """Rename first and look then: between a look and a removal a new record could come."""
    with scratch_folder(one.path) as folder:
        aside = folder / one.path.name
        one.path.rename(aside)
        if content_of(aside.stat()) == one.content:
            return True
        with suppress(FileError):  # one that is newer still is there
            rename_to_new(aside, one.path)
        return False
