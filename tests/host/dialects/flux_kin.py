"""Flux, Flux.2 and Chroma: fused q, k, v in the host, split ones in diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .naming import Dialect, Entry, Naming, Shape, diffusers_dialects, native_dialects

_FLUX_BLOCK = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
}
_FLUX_SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
_FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "time_in": "time_text_embed.timestep_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "vector_in": "time_text_embed.text_embedder",
}
_FLUX2_BLOCK = {
    **_FLUX_BLOCK,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
}
_FLUX2_SPLIT = {name: parts for name, parts in _FLUX_SPLIT.items() if name != "linear1"}
_FLUX2_TOP = {
    **_FLUX_TOP,
    "time_in": "time_guidance_embed.timestep_embedder",
    "guidance_in": "time_guidance_embed.guidance_embedder",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}


def _naming(block_names: Mapping[str, str], split: Mapping[str, tuple[str, ...]], top: Mapping[str, str]) -> Naming:
    def naming(modules: Mapping[str, Shape]) -> Iterator[Entry]:
        for module, (out, width, *_) in modules.items():
            block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
            if block is None:
                swapped = module.startswith("final_layer.ada")
                yield Entry(_top_name(module, top), module, 0, out, swapped=swapped)
                continue
            kind, index, rest = block.groups()
            parent = f"{'single_' if kind == 'single' else ''}transformer_blocks.{index}."
            if rest not in split:
                yield Entry(parent + block_names[rest], module, 0, out)
                continue
            for position, part in enumerate(split[rest]):
                rows = out - 3 * width if part == "proj_mlp" else width
                yield Entry(parent + part, module, position * width, rows)

    return naming


def _top_name(module: str, top: Mapping[str, str]) -> str:
    """Embedders of two linears are numbered; Chroma's approximator keeps its path."""
    stem, _, half = module.rpartition(".")
    if half in ("in_layer", "out_layer"):
        return f"{top.get(stem, stem)}.linear_{1 if half == 'in_layer' else 2}"
    return top.get(module, module)


flux_diffusers = _naming(_FLUX_BLOCK, _FLUX_SPLIT, _FLUX_TOP)
flux2_diffusers = _naming(_FLUX2_BLOCK, _FLUX2_SPLIT, _FLUX2_TOP)

_FLUX2 = {**native_dialects(), **diffusers_dialects(flux2_diffusers)}
DIALECTS: dict[str, dict[str, Dialect]] = {
    "flux": {**native_dialects(), **diffusers_dialects(flux_diffusers)},
    "flux2": _FLUX2,
    "flux2_klein": _FLUX2,
    "chroma": {**native_dialects(), **diffusers_dialects(flux_diffusers)},
}
NAMINGS: dict[str, Naming] = {
    "flux": flux_diffusers,
    "flux2": flux2_diffusers,
    "flux2_klein": flux2_diffusers,
    "chroma": flux_diffusers,
}
