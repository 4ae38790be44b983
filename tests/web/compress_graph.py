"""The example graph of SSR Compress."""

from __future__ import annotations

from workflow_parts import SDXL, lora, note, sampling

COMPRESS = [
    *SDXL,
    lora("one", 300, "subject_one.safetensors", "a photo of sks dog", "First subject"),
    lora("two", 740, "subject_two.safetensors", "a photo of zwx cat", "Second subject"),
    (
        "merge",
        "SSRMerge",
        440,
        150,
        {"width": 512, "height": 512, "joint_prompts": "a photo of sks dog and zwx cat sitting together on a sofa"},
        {"model": "ckpt.0", "clip": "ckpt.1", "loras.lora0": "one.0", "loras.lora1": "two.0"},
        None,
    ),
    (
        "small",
        "SSRCompress",
        900,
        0,
        {},
        {"model": "ckpt.0", "clip": "ckpt.1", "lora": "merge.2", "calibration": "merge.3"},
        None,
    ),
    ("save", "SSRSaveLoRA", 900, 560, {"filename_prefix": "loras/dog_and_cat_small"}, {"lora": "small.2"}, None),
    ("report", "PreviewAny", 900, 800, {}, {"source": "small.3"}, "Rank and error of every layer"),
    *[
        (n, t, x + 500, y, w, li, ti)
        for n, t, x, y, w, li, ti in sampling(
            "a", "small.0", "small.1", "ckpt.2", 0, "a photo of sks dog and zwx cat sitting together on a sofa"
        )
    ],
    note(
        "note",
        0,
        -190,
        "**A smaller file.** SSR Compress takes the base MODEL and CLIP, the merge and its CALIBRATION. Choose what "
        "limits the size, look at the picture and the report, and save.",
    ),
]
