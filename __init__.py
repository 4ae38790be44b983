"""SSR-Merge for ComfyUI: merges LoRAs by Subspace Signal Routing. See README.md."""

if __package__:  # not when pytest collects the repository's root
    from .nodes.extension import SSRMergeExtension

    WEB_DIRECTORY = "./web"

    async def comfy_entrypoint() -> SSRMergeExtension:
        """What ComfyUI calls to get the nodes."""
        return SSRMergeExtension()
