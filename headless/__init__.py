"""The command: a recipe and a ComfyUI installation in, a merged LoRA and its reports out."""
