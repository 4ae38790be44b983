"""Files where ComfyUI keeps them."""

from __future__ import annotations

from pathlib import Path, PurePath

import comfy.utils
import folder_paths
from torch import Tensor

from ...ssr_core import FileError
from ...ssr_core.atomic import in_scratch
from .names import convert_names


def lora_files() -> list[str]:
    """LoRA files as ComfyUI lists them, without those that are being written."""
    return [name for name in folder_paths.get_filename_list("loras") if not in_scratch(PurePath(name))]


def lora_path(name: str) -> Path:
    """Full path of a listed LoRA file.

    Raises:
        FileError: No loras folder has it.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise FileError("no loras folder has this file.", file=name, remedy="refresh the list (R) and choose again.")
    return Path(path)


def load_file(path: Path) -> dict[str, Tensor]:
    """A LoRA file as ComfyUI's LoraLoader reads it."""
    return convert_names(comfy.utils.load_torch_file(str(path), safe_load=True))


def output_directory() -> Path:
    """ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()).resolve()


def numbered_file(prefix: str, root: Path, suffix: str) -> Path:
    """A new file below `root`, numbered like ComfyUI's own files; its folder is made."""
    directory, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(directory) / f"{name}_{counter:05}_{suffix}"
