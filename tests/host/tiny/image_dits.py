"""Transformers for images that are no kin of Flux."""

from .detection import describe
from .recipe import Family, Text

_LUMINA = {
    "patch_size": 2,
    "in_channels": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "axes_lens": [1536, 512, 512],
    "multiple_of": 32,
    "qk_norm": True,
    "cap_feat_dim": 32,
}


def zimage() -> Family:
    from comfy.ldm.lumina.model import NextDiT

    config = {
        **_LUMINA,
        "dim": 256,  # the time embedder's 256 is hard-coded
        "n_heads": 4,
        "n_kv_heads": 4,
        "axes_dims": [16, 24, 24],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }
    return Family(NextDiT, config, Text(32), describe("ZImage", {**config, "image_model": "lumina2"}))


def lumina2() -> Family:
    """Three query heads to each key head, as in the real one."""
    from comfy.ldm.lumina.model import NextDiT

    config = {
        **_LUMINA,
        "dim": 96,
        "n_heads": 6,
        "n_kv_heads": 2,
        "axes_dims": [4, 6, 6],
        "rope_theta": 10000.0,
        "ffn_dim_multiplier": 1.0,
    }
    return Family(NextDiT, config, Text(32), describe("Lumina2", {**config, "image_model": "lumina2"}))


def sd3() -> Family:
    """As SD 3.5 medium: the first block has a second attention."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    config = {
        "input_size": None,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "depth": 2,  # 64 hidden features for each
        "adm_in_channels": 24,
        "pos_embed_scaling_factor": None,
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "qk_norm": "rms",
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 32, "out_features": 128},
        },
        "x_block_self_attn_layers": [0],
    }
    return Family(OpenAISignatureMMDITWrapper, config, Text(32, random={"pooled_output": (1, 24)}))


def _qwen(text: Text) -> Family:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    config = {
        "in_channels": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "joint_attention_dim": 48,
        "axes_dims_rope": [8, 12, 12],
    }
    described = describe("QwenImage", {**config, "image_model": "qwen_image"})
    return Family(QwenImageTransformer2DModel, config, text, described)


def qwen_image() -> Family:
    return _qwen(Text(48))


def qwen_image_edit() -> Family:
    """The same network, with an image to edit among the tokens."""
    return _qwen(Text(48, random={"reference_latents": (1, 16, 1, 8, 8)}, listed=("reference_latents",)))


def hidream() -> Family:
    from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel

    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "max_resolution": [128, 128],
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "axes_dims_rope": [16, 8, 8],
        "caption_channels": [32, 32],
        "text_emb_dim": 24,
        "num_layers": 1,
        "num_single_layers": 1,
        "llama_layers": [0, 1],
        "num_routed_experts": 4,
        "num_activated_experts": 2,
    }
    text = Text(32, random={"pooled_output": (1, 24), "conditioning_llama3": (1, 2, -1, 32)})
    described = describe("HiDream", {**config, "image_model": "hidream"})
    return Family(HiDreamImageTransformer2DModel, config, text, described)


def krea2() -> Family:
    from comfy.ldm.krea2.model import SingleStreamDiT

    config = {"features": 128, "heads": 1, "kvheads": 1, "layers": 2, "channels": 16, "patch": 2}
    config |= {"txtdim": 160, "txtlayers": 3}  # twenty text heads are hard-coded
    return Family(SingleStreamDiT, config, Text(3 * 160))


IMAGE_DITS = {
    "zimage": zimage,
    "lumina2": lumina2,
    "sd3": sd3,
    "qwen_image": qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "hidream": hidream,
    "krea2": krea2,
}
