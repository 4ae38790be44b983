"""ComfyUI nodes: thin classes over `ssr_core`. `host.py` is the only module that imports ComfyUI's internals."""
