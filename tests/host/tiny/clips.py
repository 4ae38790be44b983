"""Tiny text encoders with the real tokenizers and the real class of each family's encoder."""

import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget

from .recipe import random_state

_CLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 64,
}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
_QWEN3 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}

KINDS = ("sd15", "sdxl", "flux", "zimage")


def _target(kind: str) -> tuple[ClipTarget, dict]:
    if kind == "sd15":
        from comfy import sd1_clip

        return ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel), {"clip_l_model_config": _CLIP}
    if kind == "sdxl":
        from comfy import sdxl_clip

        sizes = {"clip_l_model_config": _CLIP, "clip_g_model_config": _CLIP}
        return ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel), sizes
    if kind == "flux":
        from comfy.text_encoders import flux

        return ClipTarget(flux.FluxTokenizer, flux.flux_clip()), {
            "clip_l_model_config": _CLIP,
            "t5xxl_model_config": _T5,
        }
    from comfy.text_encoders import z_image

    return ClipTarget(z_image.ZImageTokenizer, z_image.te()), {"qwen3_4b_model_config": _QWEN3}


def build_clip(kind: str, seed: int) -> comfy.sd.CLIP:
    target, sizes = _target(kind)
    options = {name: dict(size) for name, size in sizes.items()}
    clip = comfy.sd.CLIP(target, parameters=1, model_options={**options, "dtype": torch.float32})
    with torch.no_grad():
        clip.cond_stage_model.load_state_dict(random_state(clip.cond_stage_model, seed))
    return clip
