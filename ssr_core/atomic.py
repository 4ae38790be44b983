"""Writing files that are there whole or not at all: after an error, Ctrl-C, a killed process, a power cut."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from .errors import FileError

STALE_SECONDS = 3600.0
"""A scratch folder in which nothing changed for so long belongs to a process that is gone."""

_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}\.ssrtmp")
_NO_SUCH_PROMISE = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}
"""What file systems say that cannot flush a folder, or do not let it be opened."""


@contextmanager
def atomic_path(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path on the same file system; rename it to `path` if the block succeeds.

    On any exception, Cancel included, the temporary file is removed and `path` is untouched. The content is
    on the disk before it gets its name, so that a power cut leaves the new file, the earlier one or none.

    Raises:
        FileError: `path` exists and `overwrite` is False, the folder cannot be written, or the disk is full.
    """
    with scratch_folder(path) as folder:
        temporary = folder / f"whole{path.suffix}"
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes its files private
            _flush(temporary)
            if overwrite:
                temporary.replace(path)
            else:
                rename_to_new(temporary, path)
            _flush_folder(path.parent)
        except FileError as err:
            if err.file != str(temporary):
                raise
            raise FileError(err.what, file=str(path), remedy=err.remedy) from err  # nobody knows the temporary name
        except OSError as err:
            raise FileError(
                f"writing failed ({err.strerror or err}).", file=str(path), remedy="check the free disk space."
            ) from err


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder of our own beside a file, removed at the end.

    A folder and not a name alone: safetensors writes under a name that it chooses, which a killed process
    would leave behind for nobody to know whose it was.

    Raises:
        FileError: The folder cannot be written.
    """
    folder = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.ssrtmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as err:
        remedy = "check the folder's permissions and the space on the disk."
        raise FileError(f"cannot write here ({err.strerror}).", file=str(path), remedy=remedy) from err
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what a virus scanner holds on to, `stale_scratch` finds


def in_scratch(path: PurePath) -> bool:
    """Whether a file is one that is being written, or that a killed process left: no file of anybody's."""
    return any(_SCRATCH.fullmatch(part) for part in path.parts[:-1])


def stale_scratch(folder: Path) -> list[tuple[Path, int, float]]:
    """What killed processes left in a folder: each path, its bytes, and when it last changed (seconds since 1970)."""
    found = []
    for path in sorted(folder.glob(".*.ssrtmp")):
        if not _SCRATCH.fullmatch(path.name):
            continue
        try:
            stats = [one.stat() for one in (path, *path.iterdir())]
        except FileNotFoundError:  # its process is alive and has just finished
            continue
        except (NotADirectoryError, PermissionError):  # somebody else's
            continue
        changed = max(one.st_mtime for one in stats)
        if time.time() - changed > STALE_SECONDS:
            found.append((path, sum(one.st_size for one in stats[1:]), changed))
    return found


def rename_to_new(temporary: Path, path: Path) -> None:
    """Rename, but never over a file that exists: a hard link fails where a rename would overwrite.

    Raises:
        FileError: `path` exists.
    """
    try:
        os.link(temporary, path)
    except OSError as err:
        if path.exists():
            raise FileError(
                "a file of this name exists already.", file=str(path), remedy="choose another name."
            ) from err
        temporary.rename(path)  # a file system without hard links


def _flush(path: Path) -> None:
    """Put a file's content onto the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Put a folder's names onto the disk, where the system can do that."""
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as err:
        if err.errno in _NO_SUCH_PROMISE:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno not in _NO_SUCH_PROMISE:
            raise
    finally:
        os.close(handle)
