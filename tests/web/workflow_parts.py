"""Pieces of the example graphs.

A node is (name, type, x, y, widgets, links {input: "node.output index"}, title).
"""

from __future__ import annotations

SDXL = [
    ("ckpt", "CheckpointLoaderSimple", 0, 0, {"ckpt_name": "sd_xl_base_1.0.safetensors"}, {}, None),
]
FLUX = [
    ("unet", "UNETLoader", 0, 0, {"unet_name": "flux1-dev.safetensors"}, {}, None),
    (
        "clips",
        "DualCLIPLoader",
        0,
        150,
        {"clip_name1": "t5xxl_fp8_e4m3fn.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"},
        {},
        None,
    ),
    ("vae", "VAELoader", 0, 340, {"vae_name": "ae.safetensors"}, {}, None),
]


WAN = [
    ("high", "UNETLoader", 0, 0, {"unet_name": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"}, {}, "High noise"),
    ("low", "UNETLoader", 0, 150, {"unet_name": "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"}, {}, "Low noise"),
    (
        "clip",
        "CLIPLoader",
        0,
        300,
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"},
        {},
        None,
    ),
    ("vae", "VAELoader", 0, 470, {"vae_name": "wan_2.1_vae.safetensors"}, {}, None),
    ("shift1", "ModelSamplingSD3", 440, -140, {"shift": 8.0}, {"model": "high.0"}, None),
    ("shift2", "ModelSamplingSD3", 440, 0, {"shift": 8.0}, {"model": "low.0"}, None),
]


def wan_sampling(y: int, prompt: str) -> list:
    """Prompt to video over both noise ranges."""
    common = {"noise_seed": 1, "control_after_generate": "fixed", "steps": 20, "cfg": 3.5, "scheduler": "simple"}
    first = {"start_at_step": 0, "end_at_step": 10, "return_with_leftover_noise": "enable"}
    second = {"add_noise": "disable", "start_at_step": 10, "end_at_step": 10000}
    text = {"positive": "pos.0", "negative": "neg.0"}
    return [
        ("pos", "CLIPTextEncode", 1340, y, {"text": prompt}, {"clip": "merge1.1"}, "Your prompt"),
        ("neg", "CLIPTextEncode", 1340, y + 230, {"text": ""}, {"clip": "merge1.1"}, "Negative prompt"),
        ("size", "EmptyHunyuanLatentVideo", 1340, y + 460, {"width": 640, "height": 640, "length": 81}, {}, None),
        (
            "sample1",
            "KSamplerAdvanced",
            1780,
            y,
            common | first,
            {"model": "merge1.0", "latent_image": "size.0"} | text,
            None,
        ),
        (
            "sample2",
            "KSamplerAdvanced",
            1780,
            y + 380,
            common | second,
            {"model": "merge2.0", "latent_image": "sample1.0"} | text,
            None,
        ),
        ("decode", "VAEDecode", 2120, y, {}, {"samples": "sample2.0", "vae": "vae.0"}, None),
        ("video", "CreateVideo", 2120, y + 110, {"fps": 16.0}, {"images": "decode.0"}, None),
        ("save", "SaveVideo", 2120, y + 320, {"filename_prefix": "ssr/merged"}, {"video": "video.0"}, None),
    ]


def lora(name: str, y: int, file: str, prompt: str, title: str, clip: float = 1.0) -> tuple:
    """An SSR LoRA node."""
    return (name, "SSRLoRA", 0, y, {"lora": file, "prompts": prompt, "strength_clip": clip}, {}, title)


def sampling(
    prefix: str, model: str, clip: str, vae: str, y: int, prompt: str, *, flux: bool = False, size: int = 1024
) -> list:
    """Prompt to picture."""
    nodes = [
        (f"{prefix}pos", "CLIPTextEncode", 900, y, {"text": prompt}, {"clip": clip}, "Your prompt"),
        (f"{prefix}neg", "CLIPTextEncode", 900, y + 230, {"text": ""}, {"clip": clip}, "Negative prompt"),
        (
            f"{prefix}latent",
            "EmptySD3LatentImage" if flux else "EmptyLatentImage",
            900,
            y + 460,
            {"width": size, "height": size, "batch_size": 1},
            {},
            None,
        ),
    ]
    positive = f"{prefix}pos.0"
    if flux:
        nodes.append(
            (f"{prefix}guide", "FluxGuidance", 1340, y - 120, {"guidance": 3.5}, {"conditioning": positive}, None)
        )
        positive = f"{prefix}guide.0"
    return [
        *nodes,
        (
            f"{prefix}sample",
            "KSampler",
            1340,
            y,
            {
                "seed": 1,
                "control_after_generate": "fixed",
                "steps": 20 if flux else 30,
                "cfg": 1.0 if flux else 6.0,
                "sampler_name": "euler",
                "scheduler": "simple" if flux else "normal",
            },
            {"model": model, "positive": positive, "negative": f"{prefix}neg.0", "latent_image": f"{prefix}latent.0"},
            None,
        ),
        (f"{prefix}decode", "VAEDecode", 1690, y, {}, {"samples": f"{prefix}sample.0", "vae": vae}, None),
        (
            f"{prefix}save",
            "SaveImage",
            1690,
            y + 110,
            {"filename_prefix": "ssr/merged"},
            {"images": f"{prefix}decode.0"},
            None,
        ),
    ]


def note(name: str, x: int, y: int, text: str) -> tuple:
    """A note in Markdown."""
    return (name, "MarkdownNote", x, y, {"": text}, {}, "Read me")


def moved(by: int, nodes: list) -> list:
    """The same nodes further to the right."""
    return [(name, kind, x + by, *rest) for name, kind, x, *rest in nodes]
