"""LoRA files of the suite: what a trainer would have written, metadata included."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.host.loras import family_lora

NAMES = ("dog", "cat", "tower")
PROMPTS = ("a photo of sks dog", "a zwx cat on a sofa", "a painting of a qqq tower")
METADATA = {
    "modelspec.title": "Dog",
    "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 12, "outdoors": 5, "<b>bold</b>": 1}}),
}


def write_loras(base: Path) -> None:
    """Three LoRAs for the tiny SDXL, the first with trigger words in its header."""
    folder = base / "models" / "loras"
    for seed, name in zip((31, 32, 33), NAMES, strict=True):
        made = family_lora(base, "sdxl", "kohya", seed=seed)
        save_file(load_file(made.path), folder / f"{name}.safetensors", METADATA if name == "dog" else None)
        made.path.unlink()
