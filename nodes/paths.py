"""Where the pack writes and finds its files: confined to the output folder, never over an existing file."""

from __future__ import annotations

from pathlib import Path

from ..ssr_core import FileError
from . import host

CALIBRATION_FOLDER, CALIBRATION_SUFFIX = "calibrations", ".calibration.safetensors"
RECORD_FOLDER = "records"
"""Below the calibrations."""


def output_path(prefix: str, suffix: str, folder: str = "") -> Path:
    """A new file below the output folder, numbered like ComfyUI's own files.

    Args:
        prefix: What the user typed: a name, possibly with folders.
        suffix: End of the file name.
        folder: Folder of the output folder that it is confined to.

    Raises:
        FileError: The prefix is empty, or leads outside.
    """
    root = (host.output_directory() / folder).resolve()
    cleaned = prefix.replace("\\", "/").strip()
    if not cleaned or cleaned.endswith("/"):
        raise FileError("the name is empty, or ends with a slash.", file=prefix, remedy="write a name, like ssr.")
    if not (root / cleaned).resolve().is_relative_to(root):
        raise FileError("the name leads outside the output folder.", file=prefix, remedy="use a name without .. in it.")
    return host.numbered_file(cleaned, root, suffix)


def record_root() -> Path:
    """Folder of the record library."""
    return _calibration_root() / RECORD_FOLDER


def _calibration_root() -> Path:
    return (host.output_directory() / CALIBRATION_FOLDER).resolve()


def calibration_files() -> list[str]:
    """Saved calibrations, by name below their folder."""
    root = _calibration_root()
    return sorted(str(path.relative_to(root).as_posix()) for path in root.rglob(f"*{CALIBRATION_SUFFIX}"))


def calibration_path(name: str) -> Path:
    """Full path of a listed calibration; confined to its folder."""
    root = _calibration_root()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise FileError("the name leads outside the output folder.", file=name, remedy="choose one from the list.")
    return path
