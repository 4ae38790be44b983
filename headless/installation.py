"""Finding a ComfyUI installation and making it importable."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ..ssr_core import FileError, IncompatibleError

PACK = Path(__file__).resolve().parent.parent


def find(given: str | None) -> Path:
    """The folder with ComfyUI's main.py: as given, or that in whose custom_nodes the pack lies.

    Raises:
        FileError: There is none.
    """
    named = given or os.environ.get("COMFYUI_PATH")
    # not resolved: a pack may be linked into custom_nodes
    around = [Path(named)] if named else [PACK.parent.parent]
    for folder in around:
        if (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file():
            return folder.resolve()
    raise FileError(
        "this is no ComfyUI installation.", file=str(around[0]), remedy="give the folder with its main.py as --comfyui."
    )


def start(checkout: Path, options: Sequence[str]) -> ModuleType:
    """Start ComfyUI without its server.

    Returns:
        The module that did, with `show_progress`.

    Raises:
        IncompatibleError: ComfyUI finds no device to compute on.
    """
    path = PACK / "nodes" / "host" / "start.py"
    # By path: its package imports ComfyUI as it is imported itself, which is not possible yet.
    spec = importlib.util.spec_from_file_location("ssr_merge_headless_start", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.start(checkout, options)
    reason = module.why_no_device()
    if reason:
        raise IncompatibleError(
            f"ComfyUI finds no device to compute on: {' '.join(reason.split())}.",
            remedy="end the command with -- --cpu to compute without a GPU, or install a torch for your GPU.",
        )
    return module
