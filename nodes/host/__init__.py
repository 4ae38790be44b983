"""Everything this pack asks of ComfyUI's internals. Nothing outside this folder imports comfy or folder_paths."""

from .device import activation_dtype, check_cancel, compute_device, is_out_of_memory, make_room, memory_budgets
from .files import load_file, lora_files, lora_path, numbered_file, output_directory
from .graph import packs_of
from .latents import SCHEDULERS, empty_latent, prepare_latent, shared_noise, step_sigmas
from .names import CoreKeyMap, convert_names, core_key_map, key_map, lora_adapter, read_patches
from .news import announce, answer
from .progress import Activity, Progress
from .running import around_sampling, layers_called_as_modules, run_calibration_pass
from .text import encode, text_rows
from .weights import change_of, current_weight, patches_of

__all__ = [
    "SCHEDULERS",
    "Activity",
    "CoreKeyMap",
    "Progress",
    "activation_dtype",
    "announce",
    "answer",
    "around_sampling",
    "change_of",
    "check_cancel",
    "compute_device",
    "convert_names",
    "core_key_map",
    "current_weight",
    "empty_latent",
    "encode",
    "is_out_of_memory",
    "key_map",
    "layers_called_as_modules",
    "load_file",
    "lora_adapter",
    "lora_files",
    "lora_path",
    "make_room",
    "memory_budgets",
    "numbered_file",
    "output_directory",
    "packs_of",
    "patches_of",
    "prepare_latent",
    "read_patches",
    "run_calibration_pass",
    "shared_noise",
    "step_sigmas",
    "text_rows",
]
