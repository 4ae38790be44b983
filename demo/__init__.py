"""A small world to show and test the engine without ComfyUI: a stub model, planted LoRAs, one command."""
