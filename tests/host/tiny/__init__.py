"""Test-only custom nodes: tiny models on disk, tiny text encoders, and probes that write what they see.

The harness copies this folder into the custom_nodes of a temporary base directory. Importing it
installs the detection override and writes the checkpoints, so that the real UNETLoader finds them.
"""

if __package__:
    from comfy_api.latest import ComfyExtension, io

    from . import detection, families
    from .conversions import CONVERSION_NODES
    from .faults import FAULT_NODES
    from .guests import GUEST_NODES
    from .layers import LAYER_NODES
    from .modes import MODE_NODES
    from .packed import PACKED_NODES
    from .probes import PROBE_NODES
    from .quantise import QUANTISED_NODES
    from .sources import SOURCE_NODES

    detection.install()
    families.write_missing()

    class TinyExtension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [
                *SOURCE_NODES,
                *PROBE_NODES,
                *FAULT_NODES,
                *GUEST_NODES,
                *CONVERSION_NODES,
                *LAYER_NODES,
                *MODE_NODES,
                *PACKED_NODES,
                *QUANTISED_NODES,
            ]

    async def comfy_entrypoint() -> ComfyExtension:
        return TinyExtension()
