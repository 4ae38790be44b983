"""Wan, HunyuanVideo, LTX-Video and Anima: the host knows few names but its own."""

from __future__ import annotations

import re

from .naming import Dialect, Naming, diffusers_dialects, dotted, native, native_dialects, renamed, underscored

_WAN_BLOCK = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_WAN_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def _wan(module: str) -> str:
    attention = re.fullmatch(r"blocks\.(\d+)\.(self|cross)_attn\.([qkvo])", module)
    if attention is not None:
        number = 1 if attention[2] == "self" else 2
        return f"blocks.{attention[1]}.attn{number}.{_WAN_BLOCK[attention[3]]}"
    module = module.replace(".ffn.0", ".ffn.net.0.proj").replace(".ffn.2", ".ffn.net.2")
    return _WAN_TOP.get(module, module)


def _hunyuan_original(module: str) -> str:
    """The names of Tencent's own code, which diffusion-pipe and musubi-tuner write."""
    module = module.replace("_mod.lin", "_mod.linear").replace(".modulation.lin", ".modulation.linear")
    module = module.replace("_attn.qkv", "_attn_qkv").replace("_attn.proj", "_attn_proj")
    return re.sub(r"mlp\.([02])$", lambda found: f"mlp.fc{1 if found[1] == '0' else 2}", module)


def _ltxv(module: str) -> str:
    return module.replace("patchify_proj", "proj_in").replace("adaln_single", "time_embed")


_COSMOS_WORDS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}


def _cosmos(module: str) -> str:
    attention = re.fullmatch(r"blocks\.(\d+)\.(self|cross)_attn\.(\w+)", module)
    if attention is None:
        return re.sub(r"^blocks\.", "transformer_blocks.", module).replace(".mlp.layer", ".ff.layer")
    number = 1 if attention[2] == "self" else 2
    return f"transformer_blocks.{attention[1]}.attn{number}.{_COSMOS_WORDS[attention[3]]}"


_wan_names, _ltxv_names, _cosmos_names = renamed(_wan), renamed(_ltxv), renamed(_cosmos)
_hunyuan_names = renamed(_hunyuan_original)


def _transformer_only(naming: Naming) -> dict[str, Dialect]:
    """Diffusers names in the three ways that files of these families are seen in."""
    every = diffusers_dialects(naming)
    return {name: every[name] for name in ("diffusers", "ai_toolkit", "kohya_diffusers")}


_WAN = {
    **native_dialects(),
    **_transformer_only(_wan_names),
    "wan_fun": underscored(native, "lora_unet__"),
}
DIALECTS: dict[str, dict[str, Dialect]] = {
    "wan21": _WAN,
    "wan22": _WAN,
    "hunyuan_video": {
        **native_dialects(),
        "original": dotted(_hunyuan_names, "transformer.", words="original"),
        "original_comfy": dotted(_hunyuan_names, "diffusion_model.", words="original"),
        "original_kohya": underscored(_hunyuan_names, words="original"),
    },
    "ltxv": {**native_dialects(), **_transformer_only(_ltxv_names)},
    "anima": {**native_dialects(), **_transformer_only(_cosmos_names)},
}
NAMINGS: dict[str, Naming] = {
    "wan21": native,
    "wan22": native,
    "hunyuan_video": _hunyuan_names,
    "ltxv": native,
    "anima": native,
}
