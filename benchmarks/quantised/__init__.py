"""How much of a merged LoRA acts on quantised base models, patched or in the forward pass, and at what cost."""
