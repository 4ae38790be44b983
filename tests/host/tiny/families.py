"""Tiny random checkpoints, a few MB each, that the real UNETLoader accepts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.ops
import folder_paths
import torch
from safetensors.torch import save_file

from .detection import describe

CONTEXT = {"flux": 32, "sdxl": 128, "sd15": 64, "zimage": 32, "wan21": 32}
"""Width of the text embedding each family expects; the tiny text encoders produce the same."""


@dataclass(frozen=True)
class Family:
    """How to build one tiny network and what its file must say about itself."""

    build: Callable[..., torch.nn.Module]
    config: dict
    metadata: dict[str, str]


def _flux() -> Family:
    from comfy.ldm.flux.model import Flux

    config = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "hidden_size": 128,
        "num_heads": 1,
        "depth": 2,
        "depth_single_blocks": 2,
        "mlp_ratio": 4.0,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
        "vec_in_dim": 64,
        "context_in_dim": CONTEXT["flux"],
    }
    return Family(Flux, config, {})


def _wan21() -> Family:
    from comfy.ldm.wan.model import WanModel

    config = {
        "model_type": "t2v",
        "in_dim": 16,
        "out_dim": 16,
        "dim": 128,
        "num_heads": 1,
        "num_layers": 2,
        "ffn_dim": 256,
        "text_dim": CONTEXT["wan21"],
    }
    # the host itself reads this key, so no override is needed
    return Family(WanModel, config, {"config": json.dumps({"transformer": {"text_dim": CONTEXT["wan21"]}})})


def _zimage() -> Family:
    from comfy.ldm.lumina.model import NextDiT

    config = {
        "patch_size": 2,
        "in_channels": 16,
        "dim": 256,  # the time embedder's 256 is hard-coded
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
        "axes_dims": [16, 24, 24],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "multiple_of": 32,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "qk_norm": True,
        "cap_feat_dim": CONTEXT["zimage"],
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }
    return Family(NextDiT, config, describe("ZImage", {**config, "image_model": "lumina2"}))


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


def _sd15() -> Family:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = _unet(
        model_channels=32,
        adm_in_channels=None,
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        use_linear_in_transformer=False,
        context_dim=CONTEXT["sd15"],
        num_heads=8,
        num_head_channels=-1,
    )
    return Family(UNetModel, config, describe("SD15", config))


def _sdxl() -> Family:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = _unet(
        model_channels=64,
        num_classes="sequential",
        adm_in_channels=64 + 6 * 256,  # pooled text and the six sizes
        transformer_depth=[0, 2],
        transformer_depth_output=[0, 0, 2, 2],
        transformer_depth_middle=2,
        use_linear_in_transformer=True,
        context_dim=CONTEXT["sdxl"],
        num_heads=-1,
        num_head_channels=64,
    )
    return Family(UNetModel, config, describe("SDXL", config))


FAMILIES: dict[str, Callable[[], Family]] = {
    "flux": _flux,
    "sdxl": _sdxl,
    "sd15": _sd15,
    "zimage": _zimage,
    "wan21": _wan21,
}


def random_state(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size: matrices by fan-in, norm scales near 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            state[name] = value.clone()
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2:
            state[name] = noise / value[0].numel() ** 0.5
        elif name.endswith((".weight", ".scale")):
            state[name] = 1 + 0.05 * noise
        else:
            state[name] = 0.02 * noise
    return state


def write_missing() -> None:
    """Write every family's checkpoint that is not there yet."""
    folder = Path(folder_paths.models_dir, "diffusion_models")
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, recipe) in enumerate(FAMILIES.items()):
        path = folder / f"tiny_{name}.safetensors"
        if path.exists():
            continue
        family = recipe()
        with torch.no_grad():
            module = family.build(
                **family.config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
            )
            save_file(random_state(module, seed), path, metadata=family.metadata or None)
