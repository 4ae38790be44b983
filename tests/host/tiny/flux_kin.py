"""Flux and what descends from it: Flux.2 and Chroma."""

from .detection import describe
from .recipe import Family, Text

_FLUX = {
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
    "txt_ids_dims": [],
    "context_in_dim": 32,
}


def flux() -> Family:
    from comfy.ldm.flux.model import Flux

    config = {**_FLUX, "guidance_embed": True, "vec_in_dim": 64}
    return Family(Flux, config, Text(32, random={"pooled_output": (1, 64)}, constants={"guidance": 3.5}))


def flux2() -> Family:
    """As FLUX.2 [dev]: modulation shared by all blocks, no biases, guidance embedded."""
    from comfy.ldm.flux.model import Flux

    config = {
        **_FLUX,
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "mlp_ratio": 3.0,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "qkv_bias": False,
        "ops_bias": False,
        "txt_ids_dims": [3],
        "vec_in_dim": None,
        "global_modulation": True,
        "mlp_silu_act": True,
        "guidance_embed": True,
    }
    return Family(Flux, config, Text(32, constants={"guidance": 4.0}))


def flux2_klein() -> Family:
    """As FLUX.2 [klein]: no guidance; a reference image, which is how it edits."""
    from comfy.ldm.flux.model import Flux

    config = {**flux2().config, "guidance_embed": False}
    text = Text(32, random={"reference_latents": (1, 128, 4, 4)}, listed=("reference_latents",))
    return Family(Flux, config, text)


def chroma() -> Family:
    from comfy.ldm.chroma.model import Chroma

    config = {
        **_FLUX,
        "in_channels": 64,
        "out_channels": 64,
        "vec_in_dim": None,
        "in_dim": 64,
        "out_dim": 128,
        "hidden_dim": 64,
        "n_layers": 2,
    }
    return Family(Chroma, config, Text(32), describe("Chroma", {**config, "image_model": "chroma"}))


FLUX_KIN = {"flux": flux, "flux2": flux2, "flux2_klein": flux2_klein, "chroma": chroma}
