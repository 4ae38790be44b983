"""Runs the command from wherever the pack lies: `python <pack>/headless recipe.json --comfyui PATH`."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "ssr_merge_headless"

if __name__ == "__main__":
    # The folder of a script comes first on the path, where its modules would shadow others.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    # The pack as a package of a fixed name, without its __init__, which is for ComfyUI with a server.
    package = types.ModuleType(NAME)
    package.__path__ = [str(HERE.parent)]
    sys.modules[NAME] = package
    try:
        sys.exit(importlib.import_module(f"{NAME}.headless.cli").main(sys.argv[1:]))
    except ModuleNotFoundError as err:
        if err.name not in ("torch", "safetensors", "numpy"):
            raise
        sys.exit(
            f"this Python ({sys.executable}) has no {err.name}: run the command with the one that ComfyUI runs in."
        )
