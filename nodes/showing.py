"""What nodes show in the browser beside their outputs, and what its panel may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ssr_core import FileError, MergeReport, compact_report, header_metadata, prompt_warnings, trigger_words
from . import host
from .pipeline import CalibrationSocket

REPORT = "ssr_merge"
"""Name of the report in a node's `ui` output."""
TRIGGERS = "/ssr_merge/triggers"


def merge_ui(report: MergeReport, text: str) -> dict[str, Sequence[Any]]:
    """A merge's report for people and for the panel."""
    return {"text": (text,), REPORT: (compact_report(report),)}


def calibration_ui(socket: CalibrationSocket, text: str) -> dict[str, Sequence[Any]]:
    """What each pass of a calibration saw, for people and for the panel."""
    calibration = socket.calibration
    records = calibration.tasks
    tasks = []
    for index, record in enumerate(records):
        tokens = socket.tokens_of(index)
        tasks.append(
            {
                "name": record.name,
                "prompts": list(record.prompts),
                "layers": len(tokens),
                "tokens": max(tokens, default=0.0),
                "unseen": sum(count == 0 for count in tokens),
            }
        )
    warnings = prompt_warnings([r.name for r in records], [r.prompts for r in records])
    shown = {"version": 1, "kind": "calibration", "tasks": tasks, "shared_layers": len(calibration.stats)}
    return {"text": (text,), REPORT: ({**shown, "warnings": warnings},)}


def triggers_of(name: str) -> Mapping[str, Any]:
    """Trigger words of a LoRA file that ComfyUI lists.

    Raises:
        FileError: ComfyUI does not list it, or its header cannot be read.
    """
    if name not in host.lora_files():
        raise FileError("no loras folder has this file.", file=name[:200])
    found = trigger_words(header_metadata(host.lora_path(name)))
    return {"name": name, "phrases": found.phrases, "tags": found.tags, "title": found.title}


def open_routes() -> None:
    """Let the panel ask for trigger words."""
    host.answer(TRIGGERS, triggers_of)
