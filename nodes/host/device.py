"""Devices, memory, and Cancel."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch


def compute_device(model: Any) -> torch.device:
    """Where to solve: the model's CUDA device, else the CPU (others lack float64)."""
    device: torch.device = model.load_device
    return device if device.type == "cuda" else torch.device("cpu")


def activation_dtype(owner: Any) -> torch.dtype:
    """Dtype in which the model's layers compute."""
    get = getattr(owner.model, "get_dtype_inference", None)
    return get() if callable(get) else torch.float32


def memory_budgets(device: torch.device, limit_gb: float) -> tuple[int, int]:
    """Bytes for statistics on the device and in main memory; 0 GB: half of the device, half of the free memory."""
    if limit_gb > 0:
        return int(limit_gb * 2**30), int(limit_gb * 2**30)
    free = comfy.model_management.get_total_memory(device) if device.type != "cpu" else 0
    host = int(comfy.model_management.get_free_memory(torch.device("cpu")) / 2)
    return (int(free / 2) if free else host), host


def make_room(size: int, device: torch.device) -> None:
    """Let ComfyUI move models off the device until `size` bytes are free."""
    if device.type != "cpu":
        comfy.model_management.free_memory(size, device)


def is_out_of_memory(err: BaseException) -> bool:
    """Whether the host counts an exception as out of memory."""
    return bool(comfy.model_management.is_oom(err))


def check_cancel() -> None:
    """Raise ComfyUI's own exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
