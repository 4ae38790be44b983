"""A user's folders: the pack, tiny models, and LoRA files as a trainer would have written them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

NAMES = ("dog", "cat", "tower")
PROMPTS = ("a photo of sks dog", "a zwx cat on a sofa", "a painting of a qqq tower")
METADATA = {
    "modelspec.title": "Dog",
    "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 12, "outdoors": 5, "<b>bold</b>": 1}}),
}


PACK = Path(__file__).parents[2]


def furnish(root: Path) -> None:
    """An empty base directory of ComfyUI with the pack and the test nodes, which write tiny models."""
    for folder in ("models/diffusion_models", "models/loras", "custom_nodes", "input", "output", "user", "temp"):
        (root / folder).mkdir(parents=True)
    tiny = PACK / "tests" / "host" / "tiny"
    shutil.copytree(tiny, root / "custom_nodes" / "tiny", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "custom_nodes" / "ssr-merge").symlink_to(PACK, target_is_directory=True)


def write_loras(base: Path) -> None:
    """Three LoRAs for the tiny SDXL, the first with trigger words in its header."""
    from safetensors.torch import load_file, save_file

    from tests.host.loras import family_lora

    folder = base / "models" / "loras"
    for seed, name in zip((31, 32, 33), NAMES, strict=True):
        made = family_lora(base, "sdxl", "kohya", seed=seed)
        save_file(load_file(made.path), folder / f"{name}.safetensors", METADATA if name == "dog" else None)
        made.path.unlink()
