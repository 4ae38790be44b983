"""Example graphs around records and sums of calibrations."""

from __future__ import annotations

from workflow_parts import SDXL, lora, note, sampling

PROMPT = "a photo of sks dog and zwx cat sitting together on a sofa"
CALIBRATE = {"model": "ckpt.0", "clip": "ckpt.1"}

RECORD_GRAPHS = {
    "records": [
        *SDXL,
        lora("one", 300, "subject_one.safetensors", "a photo of sks dog\nsks dog sitting in a garden", "First subject"),
        lora("two", 740, "subject_two.safetensors", "a photo of zwx cat\nzwx cat lying on a sofa", "Second subject"),
        (
            "merge",
            "SSRMergeFromRecords",
            440,
            0,
            {"width": 512, "height": 512},
            {**CALIBRATE, "loras.lora0": "one.0", "loras.lora1": "two.0"},
            None,
        ),
        ("report", "PreviewAny", 440, 1180, {}, {"source": "merge.4"}, "Report"),
        ("library", "SSRRecordLibrary", 900, 800, {}, {}, "What is recorded"),
        *sampling("a", "merge.0", "merge.1", "ckpt.2", 0, "a photo of sks dog on a sofa"),
        note(
            "note",
            0,
            -190,
            "**Calibrate each LoRA once, merge any set for ever.** The first run records each LoRA; after that any of "
            "them are merged without sampling, as long as prompts, seed, steps and size stay. A new LoRA costs its own "
            "pass only. Paint one subject a picture with such a merge; for both in one, SSR Merge has joint_prompts.",
        ),
    ],
    "several_servers": [
        *SDXL,
        lora("one", 300, "subject_one.safetensors", "a photo of sks dog", "Server A: first subject"),
        lora("two", 740, "subject_two.safetensors", "a photo of zwx cat", "Server A: second subject"),
        lora("three", 1180, "subject_one.safetensors", "sks dog sitting in a garden", "Server B: first subject"),
        lora("four", 1620, "subject_two.safetensors", "zwx cat lying on a sofa", "Server B: second subject"),
        (
            "cal1",
            "SSRCalibrate",
            440,
            0,
            {"width": 512, "height": 512},
            {**CALIBRATE, "loras.lora0": "one.0", "loras.lora1": "two.0"},
            "On server A",
        ),
        (
            "cal2",
            "SSRCalibrate",
            440,
            940,
            {"width": 512, "height": 512, "joint_prompts": PROMPT},
            {**CALIBRATE, "loras.lora0": "three.0", "loras.lora1": "four.0"},
            "On server B",
        ),
        ("save1", "SSRSaveCalibration", 440, 1880, {"filename_prefix": "server_a"}, {"calibration": "cal1.0"}, None),
        ("save2", "SSRSaveCalibration", 440, 2040, {"filename_prefix": "server_b"}, {"calibration": "cal2.0"}, None),
        (
            "sum",
            "SSRCombineCalibrations",
            900,
            760,
            {},
            {"calibrations.calibration0": "cal1.0", "calibrations.calibration1": "cal2.0"},
            "Anywhere",
        ),
        ("solve", "SSRSolve", 900, 960, {}, {**CALIBRATE, "calibration": "sum.0"}, None),
        ("report", "PreviewAny", 1340, 960, {}, {"source": "sum.1"}, "What the sum holds"),
        *sampling("a", "solve.0", "solve.1", "ckpt.2", 0, PROMPT),
        note(
            "note",
            0,
            -190,
            "**Several servers: calibrate apart, combine.** Run SSR Calibrate and SSR Save Calibration on each server "
            "with prompts (or seeds) of its own. Copy the files into one output/calibrations folder, put SSR Load "
            "Calibration in place of each SSR Calibrate here, and combine. The same LoRA files and model everywhere. One "
            "of them runs the joint prompt.",
        ),
    ],
}
