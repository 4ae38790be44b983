"""The list of nodes, as ComfyUI asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare_node import SSRCompare
from .compress_node import SSRCompress
from .library_node import SSRRecordLibrary
from .lora_node import SSRLoRA
from .merge_nodes import SSRCalibrate, SSRMergeNode, SSRSolve
from .nplora_node import SSRNPLoRAMerge
from .osrm_init_node import SSROSRMInit
from .osrm_refit_node import SSROSRMRefit
from .record_nodes import SSRMergeFromRecords, SSRRecord
from .report_node import SSRReport
from .showing import open_routes
from .storage_nodes import SSRLoadCalibration, SSRSaveCalibration, SSRSaveLoRA
from .update_nodes import SSRCombineCalibrations, SSREditCalibration


class SSRMergeExtension(ComfyExtension):
    """SSR-Merge."""

    async def on_load(self) -> None:
        """Open the routes that the browser asks."""
        open_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes of the pack."""
        return [
            SSRLoRA,
            SSRMergeNode,
            SSRCalibrate,
            SSRSolve,
            SSRNPLoRAMerge,
            SSRSaveCalibration,
            SSRLoadCalibration,
            SSRSaveLoRA,
            SSRCompress,
            SSROSRMInit,
            SSROSRMRefit,
            SSRReport,
            SSRCompare,
            SSRRecord,
            SSRMergeFromRecords,
            SSRRecordLibrary,
            SSRCombineCalibrations,
            SSREditCalibration,
        ]
