"""Transformers over latents with a time axis: Wan, HunyuanVideo, LTX-Video, and Anima, which is Cosmos at one frame."""

import functools
import json

from .detection import describe
from .recipe import Family, Text


def _wan(channels: int) -> Family:
    from comfy.ldm.wan.model import WanModel

    config = {
        "model_type": "t2v",
        "in_dim": channels,
        "out_dim": channels,
        "dim": 128,
        "num_heads": 1,
        "num_layers": 2,
        "ffn_dim": 256,
        "text_dim": 32,
    }
    return Family(WanModel, config, Text(32), _transformer({"text_dim": 32}))


def _transformer(config: dict) -> dict[str, str]:
    """Metadata that the host itself reads, so that no override is needed."""
    return {"config": json.dumps({"transformer": config})}


def wan21() -> Family:
    """Wan 2.1, and the two halves of Wan 2.2 14B, which have the same format."""
    return _wan(16)


def wan22() -> Family:
    """Wan 2.2 5B: latents of 48 channels."""
    return _wan(48)


def hunyuan_video() -> Family:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    config = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "vec_in_dim": 768,  # not read off the file
        "context_in_dim": 32,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "theta": 256,
        "qkv_bias": True,
        "guidance_embed": True,
        "meanflow": False,
        "meanflow_sum": False,
        "byt5": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
    }
    text = Text(32, random={"pooled_output": (1, 768)}, constants={"guidance": 6.0})
    return Family(HunyuanVideo, config, text)


def ltxv() -> Family:
    from comfy.ldm.lightricks.model import LTXVModel

    config = {
        "in_channels": 128,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": 32,
    }
    return Family(LTXVModel, config, Text(32, masked=True), _transformer(config))


def shrink_llm_adapter() -> None:
    """Anima's text adapter takes its sizes from the class's defaults only, and those are large."""
    from comfy.ldm.anima import model

    if not isinstance(model.LLMAdapter, functools.partial):
        sizes = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_heads": 2}
        model.LLMAdapter = functools.partial(model.LLMAdapter, **sizes)


def anima() -> Family:
    from comfy.ldm.anima.model import Anima

    shrink_llm_adapter()
    config = {
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 64,
        "concat_padding_mask": True,
        "crossattn_emb_channels": 32,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop",
        "min_fps": 1,
        "max_fps": 30,
        "use_adaln_lora": True,
        "adaln_lora_dim": 16,
        "num_blocks": 2,
        "num_heads": 2,
        "extra_per_block_abs_pos_emb": False,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0,
        "extra_h_extrapolation_ratio": 1.0,
        "extra_w_extrapolation_ratio": 1.0,
        "extra_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False,
    }
    text = Text(32, t5_tokens=9)
    return Family(Anima, config, text, describe("Anima", {**config, "image_model": "anima"}))


VIDEO_DITS = {"wan21": wan21, "wan22": wan22, "hunyuan_video": hunyuan_video, "ltxv": ltxv, "anima": anima}
