"""ComfyUI without its server, as main.py sets it up: arguments, folders, then the pack's other modules may import it.

Loaded by path before anything of ComfyUI is (`headless/installation.py`), so every import waits for its call.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def start(checkout: Path, options: Sequence[str]) -> None:
    """Make ComfyUI importable, with its own command line options in force.

    Args:
        checkout: The folder with main.py.
        options: ComfyUI's options, such as --cpu or --base-directory.
    """
    sys.path.insert(0, str(checkout))
    given, sys.argv = sys.argv, [str(checkout / "main.py"), *options]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        from comfy.cli_args import args
    finally:
        sys.argv = given
    import folder_paths
    from utils.extra_config import load_extra_path_config

    extra = checkout / "extra_model_paths.yaml"
    for config in [str(extra)] if extra.is_file() else []:
        load_extra_path_config(config)
    for config in itertools.chain(*(args.extra_model_paths_config or [])):
        load_extra_path_config(config)
    if args.output_directory:
        folder_paths.set_output_directory(str(Path(args.output_directory).absolute()))
    output = Path(folder_paths.get_output_directory())
    for folder in ("checkpoints", "clip", "vae", "diffusion_models", "loras"):
        folder_paths.add_model_folder_path(folder, str(output / folder))


def why_no_device() -> str:
    """What ComfyUI raises as it looks for a device to compute on; empty where it finds one."""
    try:
        import comfy.model_management  # noqa: F401
    except (AssertionError, RuntimeError) as err:  # torch without CUDA; torch with it, but no driver or no GPU
        return str(err) or type(err).__name__
    return ""


def show_progress(tell: Callable[[int, int], None]) -> None:
    """Have every progress bar of ComfyUI told as (done, total)."""
    import comfy.utils

    def hook(value: int, total: int, preview: Any = None, **_: Any) -> None:
        tell(value, total)

    comfy.utils.set_progress_bar_global_hook(hook)
