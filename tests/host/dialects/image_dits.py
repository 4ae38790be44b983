"""Transformers for images that are no kin of Flux."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .naming import Dialect, Entry, Naming, Shape, diffusers_dialects, native, native_dialects, renamed

_ZIMAGE_TOP = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}


def _thirds(module: str, shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(q, k or v; start; rows) of a fused module; with grouped queries k and v have fewer rows than q."""
    out, width = shape[:2]
    grouped = (out - width) // 2
    yield from zip("qkv", (0, width, width + grouped), (width, grouped, grouped), strict=True)


def zimage_diffusers(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    for module, shape in modules.items():
        if module.endswith(".attention.qkv"):
            for part, start, rows in _thirds(module, shape):
                yield Entry(f"{module.removesuffix('qkv')}to_{part}", module, start, rows)
        elif module.endswith(".attention.out"):
            yield Entry(module.removesuffix("out") + "to_out.0", module, 0, shape[0])
        else:
            yield Entry(_ZIMAGE_TOP.get(module, module), module, 0, shape[0])


_LUMINA_WORDS = {
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA_TOP = {
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}


def lumina2_diffusers(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    """The names of diffusers' own Lumina 2 class."""
    for module, shape in modules.items():
        block = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+\.)(.+)", module)
        if block is None:
            yield Entry(_LUMINA_TOP.get(module, module), module, 0, shape[0])
        elif block[2] == "attention.qkv":
            for part, start, rows in _thirds(module, shape):
                yield Entry(f"{block[1]}attn.to_{part}", module, start, rows)
        else:
            yield Entry(block[1] + _LUMINA_WORDS[block[2]], module, 0, shape[0])


_SD3_BLOCK = {
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
}
_SD3_SPLIT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SD3_TOP = {
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}


def sd3_diffusers(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    """The last block's context and the output norm have scale before shift."""
    last = max(int(m.split(".")[1]) for m in modules if m.startswith("joint_blocks."))
    for module, (out, width, *_) in modules.items():
        block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
        if block is None:
            yield Entry(_SD3_TOP.get(module, module), module, 0, out, swapped=module.startswith("final_layer.ada"))
            continue
        parent, rest = f"transformer_blocks.{block[1]}.", block[2]
        for position, part in enumerate(_SD3_SPLIT.get(rest, ())):
            yield Entry(parent + part, module, position * width, width)
        if rest in _SD3_BLOCK:
            swapped = int(block[1]) == last and rest == "context_block.adaLN_modulation.1"
            yield Entry(parent + _SD3_BLOCK[rest], module, 0, out, swapped=swapped)


_KREA_WORDS = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
_KREA_TOP = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "last.linear": "final_layer.linear",
}


def _krea2(module: str) -> str:
    block = re.fullmatch(r"(blocks|txtfusion\.\w+)\.(\d+)\.(.+)", module)
    if block is None:
        return _KREA_TOP.get(module, module).replace("txtfusion.", "text_fusion.")
    parent = block[1].replace("txtfusion.", "text_fusion.") if block[1] != "blocks" else "transformer_blocks"
    return f"{parent}.{block[2]}.{_KREA_WORDS[block[3]]}"


def _krea2_short(module: str) -> str:
    return _krea2(module).replace("attn.to_out.0", "attn.to_out")


_krea2_names = renamed(_krea2)
_krea2_short_dialects = diffusers_dialects(renamed(_krea2_short))

DIALECTS: dict[str, dict[str, Dialect]] = {
    "zimage": {**native_dialects(), **diffusers_dialects(zimage_diffusers)},
    "lumina2": {
        **native_dialects(),
        **diffusers_dialects(lumina2_diffusers),
        "zimage_names": diffusers_dialects(zimage_diffusers)["ai_toolkit"],
    },
    "sd3": {**native_dialects(), **diffusers_dialects(sd3_diffusers)},
    "qwen_image": {**native_dialects(), "bare_native_default": diffusers_dialects(native)["bare_diffusers_default"]},
    "qwen_image_edit": {"kohya": native_dialects()["kohya"], "native": native_dialects()["native"]},
    "hidream": native_dialects(),
    "krea2": {
        **native_dialects(),
        **diffusers_dialects(_krea2_names),
        "diffusers_short": _krea2_short_dialects["diffusers"],
    },
}
NAMINGS: dict[str, Naming] = {
    "zimage": zimage_diffusers,
    "lumina2": zimage_diffusers,
    "sd3": sd3_diffusers,
    "krea2": _krea2_names,
}
