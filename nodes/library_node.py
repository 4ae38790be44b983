"""SSR Record Library: what is recorded, and getting rid of it."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import CleanRule, Listed, clean, listing_text
from . import host, paths, recording
from .entries import file_hash
from .inputs import CATEGORY

ACTIONS = ("list", "clean", "clean (only say which)")


class SSRRecordLibrary(io.ComfyNode):
    """List and clean records."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRRecordLibrary",
            display_name="SSR Record Library",
            category=CATEGORY,
            description="Lists the records of LoRAs, and removes those that are of no use any more.",
            search_aliases=["records", "list records", "clean records", "lora library"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    default=ACTIONS[0],
                    tooltip="list shows all records. clean removes damaged ones, those of other versions, and what the "
                    "inputs below say; choose the last entry to see first what would go.",
                ),
                io.Boolean.Input(
                    "changed_loras",
                    default=True,
                    tooltip="clean: also remove records whose LoRA file changed, was renamed or is gone. A record that is removed "
                    "costs a pass to make again.",
                ),
                io.Float.Input(
                    "older_than_days",
                    default=0.0,
                    min=0.0,
                    max=36500.0,
                    step=1.0,
                    tooltip="clean: also remove records that were written longer ago. 0: age does not matter.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The records, or what was removed and why.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Files change without the graph: look each time."""
        return time.time()

    @classmethod
    def execute(cls, action: str, changed_loras: bool, older_than_days: float) -> io.NodeOutput:
        """Look, and remove."""
        listed = recording.library().listing()
        if action == ACTIONS[0]:
            text = listing_text(listed, paths.record_root())
        else:
            contents = _current(listed) if changed_loras else None
            dry = action == ACTIONS[2]
            rule = CleanRule(older_than_days=older_than_days, contents=contents)
            gone = clean(listed, rule, time.time(), dry=dry)
            lines = [f"{'Would remove' if dry else 'Removed'} {len(gone)} of {len(listed)} records.", ""]
            text = "\n".join([*lines, *(f"- {one.path}: {reason}" for one, reason in gone)]) + "\n"
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _current(listed: list[Listed]) -> set[str]:
    """Content of the LoRA files that records are named after; of LoRAs without a file, what was recorded."""
    files = set(host.lora_files())
    tasks = [one.record.identity.task for one in listed if one.record is not None]
    found = {file_hash(host.lora_path(task.name)) for task in tasks if task.name in files}
    return found | {task.fingerprint for task in tasks if task.name.startswith("LORA_MODEL ")}
