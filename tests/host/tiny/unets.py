"""The convolutional networks: SD 1.5 and SDXL."""

from .detection import describe
from .recipe import Family, Text


def _unet(**extra: object) -> dict:
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "use_spatial_transformer": True,
        "use_checkpoint": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
        **extra,
    }


def sd15() -> Family:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = _unet(
        model_channels=32,
        adm_in_channels=None,
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        use_linear_in_transformer=False,
        context_dim=64,
        num_heads=8,
        num_head_channels=-1,
    )
    return Family(UNetModel, config, Text(64, fixed_tokens=77), describe("SD15", config))


def sdxl() -> Family:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = _unet(
        model_channels=64,
        num_classes="sequential",
        adm_in_channels=64 + 6 * 256,  # pooled text and the six sizes
        transformer_depth=[0, 2],
        transformer_depth_output=[0, 0, 2, 2],
        transformer_depth_middle=2,
        use_linear_in_transformer=True,
        context_dim=128,
        num_heads=-1,
        num_head_channels=64,
    )
    text = Text(128, fixed_tokens=77, random={"pooled_output": (1, 64)})
    return Family(UNetModel, config, text, describe("SDXL", config))


UNETS = {"sdxl": sdxl, "sd15": sd15}
