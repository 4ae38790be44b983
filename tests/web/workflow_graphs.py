"""The example graphs of workflows/."""

from __future__ import annotations

from compress_graph import COMPRESS
from workflow_parts import FLUX, SDXL, WAN, lora, moved, note, sampling, wan_sampling

DANCING = "sks man and zwx woman dancing together"
TOGETHER = "a photo of sks dog and zwx cat sitting together on a sofa"
STYLED = "sks dog in a meadow, in wtrclr style"
BOTH = {"width": 512, "height": 512, "joint_prompts": TOGETHER}
ONE = lora("one", 300, "subject_one.safetensors", "a photo of sks dog\nsks dog sitting in a garden", "First subject")
TWO = lora("two", 740, "subject_two.safetensors", "a photo of zwx cat\nzwx cat lying on a sofa", "Second subject")
MERGE = {"model": "ckpt.0", "clip": "ckpt.1", "loras.lora0": "one.0", "loras.lora1": "two.0"}

GRAPHS = {
    "two_subjects": [
        *SDXL,
        ONE,
        TWO,
        ("merge", "SSRMerge", 440, 150, BOTH, MERGE, None),
        ("report", "PreviewAny", 440, 1300, {}, {"source": "merge.4"}, "Report"),
        *sampling("a", "merge.0", "merge.1", "ckpt.2", 0, TOGETHER),
        note(
            "note",
            0,
            -190,
            "**Two subjects in one picture.** Choose your two LoRA files, and write into each SSR LoRA what "
            "that LoRA alone shows, with its trigger word. Then name both in your prompt, and write that prompt into "
            "joint_prompts too: a pass with both LoRAs teaches the merge to keep both.",
        ),
    ],
    "subject_and_style": [
        *FLUX,
        lora("one", 480, "subject_one.safetensors", "a photo of sks dog", "Subject"),
        lora("two", 920, "style.safetensors", "a landscape in wtrclr style", "Style"),
        (
            "merge",
            "SSRMerge",
            440,
            150,
            {"width": 512, "height": 512, "joint_prompts": STYLED},
            {"model": "unet.0", "clip": "clips.0", "loras.lora0": "one.0", "loras.lora1": "two.0"},
            None,
        ),
        ("report", "PreviewAny", 440, 1300, {}, {"source": "merge.4"}, "Report"),
        *sampling("a", "merge.0", "merge.1", "vae.0", 0, STYLED, flux=True),
        note(
            "note",
            0,
            -190,
            "**A subject in a style.** The subject's prompt names the subject, the style's prompt names "
            "something else in that style: the difference is what the router learns. joint_prompts is the picture that "
            "shows both: without it the style would be dropped there.",
        ),
    ],
    "np_lora_subject_and_style": [
        *FLUX,
        lora("one", 480, "subject_one.safetensors", "", "Subject"),
        lora("two", 920, "style.safetensors", "", "Style"),
        (
            "merge",
            "SSRNPLoRAMerge",
            440,
            150,
            {},
            {"model": "unet.0", "clip": "clips.0", "content": "one.0", "style": "two.0"},
            None,
        ),
        ("report", "PreviewAny", 440, 940, {}, {"source": "merge.3"}, "Report"),
        ("savelora", "SSRSaveLoRA", 900, 760, {"filename_prefix": "loras/dog_in_style"}, {"lora": "merge.2"}, None),
        *sampling("a", "merge.0", "merge.1", "vae.0", 0, STYLED, flux=True),
        note(
            "note",
            0,
            -190,
            "**A subject in a style, without calibration.** NP-LoRA Merge takes the subject out of the directions "
            "that the style reads. Raise mu if the style is weak, lower it if the subject is; the prompts in SSR LoRA "
            "are not used.",
        ),
    ],
    "calibrate_once": [
        *SDXL,
        ONE,
        TWO,
        ("calibrate", "SSRCalibrate", 440, 0, BOTH, MERGE, None),
        (
            "solve1",
            "SSRSolve",
            900,
            0,
            {"strengths": "1.0\n1.0"},
            {"model": "ckpt.0", "clip": "ckpt.1", "calibration": "calibrate.0"},
            "Solve: equal",
        ),
        (
            "solve2",
            "SSRSolve",
            900,
            780,
            {"strengths": "0.7\n1.0"},
            {"model": "ckpt.0", "clip": "ckpt.1", "calibration": "calibrate.0"},
            "Solve: first one weaker",
        ),
        *moved(440, sampling("a", "solve1.0", "solve1.1", "ckpt.2", 0, TOGETHER)),
        *moved(440, sampling("b", "solve2.0", "solve2.1", "ckpt.2", 780, TOGETHER)),
        note(
            "note",
            0,
            -190,
            "**Calibrate once, solve often.** Change the strengths in SSR Solve (one line for each LoRA) and "
            "run again: the calibration is not repeated.",
        ),
    ],
    "compare_methods": [
        *SDXL,
        ONE,
        TWO,
        ("calibrate", "SSRCalibrate", 440, 0, BOTH, MERGE, None),
        (
            "compare",
            "SSRCompare",
            440,
            900,
            {},
            {"model": "ckpt.0", "clip": "ckpt.1", "calibration": "calibrate.0"},
            "All methods; the best one goes on",
        ),
        ("table", "PreviewAny", 900, 700, {}, {"source": "compare.3"}, "Comparison"),
        ("pictures", "SSRReport", 1340, 420, {}, {"lora": "compare.2"}, "Pictures of the merge in use"),
        *sampling("a", "compare.0", "compare.1", "ckpt.2", 0, TOGETHER),
        note(
            "note",
            0,
            -190,
            "**Compare methods.** One calibration, one line for each method in SSR Compare. Set `choose` to a line's "
            "number to sample with that merge instead of the best; nothing is calibrated again. SSR Report shows where "
            "the LoRAs fight.",
        ),
    ],
    "save_and_reuse": [
        *SDXL,
        ONE,
        TWO,
        ("merge", "SSRMerge", 440, 150, BOTH, MERGE, None),
        ("savelora", "SSRSaveLoRA", 900, 0, {"filename_prefix": "loras/dog_and_cat"}, {"lora": "merge.2"}, None),
        (
            "savecal",
            "SSRSaveCalibration",
            900,
            200,
            {"filename_prefix": "dog_and_cat"},
            {"calibration": "merge.3"},
            None,
        ),
        (
            "use",
            "LoraModelLoader",
            900,
            400,
            {"strength_model": 1.0},
            {"model": "ckpt.0", "lora": "merge.2"},
            "The merged LoRA is an ordinary LoRA",
        ),
        *moved(500, sampling("a", "use.0", "merge.1", "ckpt.2", 0, TOGETHER)),
        note(
            "note",
            0,
            -190,
            "**Save and reuse.** After one run press R: `dog_and_cat_00001_` is in every LoRA loader, and the "
            "calibration in SSR Load Calibration. The metadata of the file says how it was made.",
        ),
    ],
    "compress": COMPRESS,
    "wan22_two_models": [
        *WAN,
        lora("one", 620, "subject_one.safetensors", "a video of sks man walking", "First subject"),
        (
            "two",
            "SSRLoRA",
            0,
            1060,
            {"lora": "subject_two.safetensors", "prompts": "a video of zwx woman dancing"},
            {"previous": "one.0"},
            "Second subject",
        ),
        ("sigmas", "BasicScheduler", 440, 140, {"scheduler": "simple", "steps": 4}, {"model": "shift2.0"}, None),
        ("split", "SplitSigmas", 440, 320, {"step": 2}, {"sigmas": "sigmas.0"}, "The low-noise half"),
        (
            "merge1",
            "SSRMerge",
            860,
            -140,
            {"joint_prompts": DANCING},
            {"model": "shift1.0", "clip": "clip.0", "loras.lora0": "two.0"},
            "High",
        ),
        (
            "merge2",
            "SSRMerge",
            860,
            1020,
            {"joint_prompts": DANCING},
            {"model": "shift2.0", "clip": "clip.0", "loras.lora0": "two.0", "sigmas": "split.1"},
            "Low",
        ),
        *wan_sampling(0, DANCING),
        note(
            "note",
            0,
            -360,
            "**Wan 2.2: two models, one list of LoRAs.** Each model gets an SSR Merge of its own. The low-noise "
            "model is calibrated at the noise levels that it works at (SplitSigmas). If your LoRAs come as pairs of "
            "files, give each SSR Merge a list of its own.",
        ),
    ],
    "osrm_refit": [
        *SDXL,
        ONE,
        TWO,
        ("refit", "SSROSRMRefit", 440, 150, {"width": 512, "height": 512}, MERGE, None),
        ("report", "PreviewAny", 440, 1000, {}, {"source": "refit.2"}, "What the refit costs"),
        (
            "merge",
            "SSRMerge",
            900,
            700,
            BOTH,
            {"model": "ckpt.0", "clip": "ckpt.1", "loras.lora0": "refit.0"},
            None,
        ),
        *moved(440, sampling("a", "merge.0", "merge.1", "ckpt.2", 0, TOGETHER)),
        note(
            "note",
            0,
            -190,
            "**OSRM Refit.** Each LoRA gives up what the other's prompts use more than its own. Read the report, then "
            "merge the refit LoRAs in any mode, or connect `lora_models` to SSR Save LoRA.",
        ),
    ],
    "osrm_train": [
        *SDXL,
        (
            "init",
            "SSROSRMInit",
            0,
            200,
            {"prompts": "a photo of zwx cat\nzwx cat lying on a sofa", "filename_prefix": "sks_dog"},
            {"model": "ckpt.0", "clip": "ckpt.1"},
            "The OTHER LoRA's prompts",
        ),
        ("report", "PreviewAny", 0, 1000, {}, {"source": "init.2"}, "Where it starts"),
        ("image", "LoadImage", 480, -60, {}, {}, "A picture to train on"),
        ("encode", "VAEEncode", 840, -60, {}, {"pixels": "image.0", "vae": "ckpt.2"}, None),
        ("text", "CLIPTextEncode", 480, 400, {"text": "a photo of sks dog"}, {"clip": "ckpt.1"}, "Its caption"),
        (
            "train",
            "TrainLoraNode",
            900,
            120,
            {"steps": 100},
            {"model": "ckpt.0", "latents": "encode.0", "positive": "text.0", "existing_lora": "init.0"},
            None,
        ),
        ("save", "SaveLoRA", 1340, 120, {"prefix": "loras/sks_dog"}, {"lora": "train.0", "steps": "train.2"}, None),
        note(
            "note",
            0,
            -280,
            "**Train a LoRA that will merge well.** OSRM Init writes a start that keeps out of what the other LoRAs' "
            "prompts use; core's Train LoRA goes on from there.",
        ),
    ],
}
