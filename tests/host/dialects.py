"""How trainers name the layers of each family, written down from the trainers' side.

Nothing here is read back from the host's key map: a name that the host does not know must show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One name in a LoRA file: which rows of which module it acts on.

    Attributes:
        name: Path in the trainer's naming, with dots.
        module: Path in the host's naming, without "diffusion_model.".
        start: First output row.
        rows: Number of output rows.
        swapped: The file holds (scale, shift) where the host holds (shift, scale).
    """

    name: str
    module: str
    start: int
    rows: int
    swapped: bool = False


Naming = Callable[[Mapping[str, Shape]], Iterator[Entry]]


@dataclass(frozen=True)
class Dialect:
    """A naming of layers, a prefix, and the suffixes of the two matrices."""

    naming: Naming
    prefix: str
    up: str
    down: str
    alpha: bool
    dotted: bool = True

    def key(self, entry: Entry) -> str:
        return self.prefix + (entry.name if self.dotted else entry.name.replace(".", "_"))


def native(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    for module, shape in modules.items():
        yield Entry(module, module, 0, shape[0])


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


def flux_diffusers(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    for module, (out, width, *_) in modules.items():
        block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
        if block is None:
            stem, _, half = module.rpartition(".")
            if half in ("in_layer", "out_layer"):
                yield Entry(f"{_FLUX_TOP[stem]}.linear_{1 if half == 'in_layer' else 2}", module, 0, out)
            else:
                yield Entry(_FLUX_TOP[module], module, 0, out, swapped=module.startswith("final_layer.ada"))
            continue
        kind, index, rest = block.groups()
        parent = f"{'single_' if kind == 'single' else ''}transformer_blocks.{index}."
        if rest not in _FLUX_SPLIT:
            yield Entry(parent + _FLUX_BLOCK[rest], module, 0, out)
            continue
        for position, part in enumerate(_FLUX_SPLIT[rest]):
            rows = out - 3 * width if part == "proj_mlp" else width
            yield Entry(parent + part, module, position * width, rows)


_ZIMAGE_TOP = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}


def zimage_diffusers(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    for module, (out, width, *_) in modules.items():
        if module.endswith(".attention.qkv"):
            for position, part in enumerate("qkv"):
                yield Entry(f"{module.removesuffix('qkv')}to_{part}", module, position * width, width)
        elif module.endswith(".attention.out"):
            yield Entry(module.removesuffix("out") + "to_out.0", module, 0, out)
        else:
            yield Entry(_ZIMAGE_TOP.get(module, module), module, 0, out)


_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def unet_diffusers(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    """Everything kohya's LoCon trains: attention blocks, resnets, down- and upsamplers.

    One resnet per level down and two per level up, as the tiny UNets are built.
    """
    for module, (out, *_) in modules.items():
        path = re.fullmatch(r"(input|middle|output)_block(?:s\.(\d+))?\.(\d+)\.?(.*)", module)
        if path is None or module.startswith("input_blocks.0."):
            continue  # embedders, first and last convolution: not trained
        side, number, slot, rest = path.groups()
        if side == "middle":
            parent = "mid_block.attentions.0" if slot == "1" else f"mid_block.resnets.{int(slot) // 2}"
        else:
            level, index = divmod(int(number) - (side == "input"), 2)
            parent = f"{'down' if side == 'input' else 'up'}_blocks.{level}."
            if rest == "op":
                yield Entry(parent + "downsamplers.0.conv", module, 0, out)
                continue
            if rest == "conv":
                yield Entry(parent + "upsamplers.0.conv", module, 0, out)
                continue
            parent += f"{'resnets' if slot == '0' else 'attentions'}.{index}"
        yield Entry(f"{parent}.{_RESNET.get(rest, rest)}", module, 0, out)


def text_encoder_kohya(single: bool) -> Naming:
    """CLIP blocks as kohya names them: te for the only encoder, te1 and te2 for CLIP-L and CLIP-G."""
    prefixes = {"clip_l": "te" if single else "te1", "clip_g": "te2"}

    def naming(modules: Mapping[str, Shape]) -> Iterator[Entry]:
        for module, (out, *_) in modules.items():
            encoder, _, path = module.partition(".transformer.")
            if path.startswith("text_model.encoder.layers."):
                yield Entry(f"{prefixes[encoder]}.{path}", module, 0, out)

    return naming


def _kohya(naming: Naming, prefix: str = "lora_unet_") -> Dialect:
    return Dialect(naming, prefix, ".lora_up.weight", ".lora_down.weight", alpha=True, dotted=False)


def _peft(naming: Naming, prefix: str) -> Dialect:
    return Dialect(naming, prefix, ".lora_B.weight", ".lora_A.weight", alpha=False)


DIALECTS: dict[str, dict[str, Dialect]] = {
    "flux": {
        "kohya": _kohya(native),
        "diffusers": _peft(flux_diffusers, "transformer."),
        "native": _peft(native, "diffusion_model."),
    },
    "zimage": {
        "kohya": _kohya(native),
        "diffusers": _peft(zimage_diffusers, "diffusion_model."),
        "native": _peft(native, "diffusion_model."),
    },
    "wan21": {"kohya": _kohya(native), "native": _peft(native, "diffusion_model.")},
    "sdxl": {"kohya": _kohya(unet_diffusers), "native": _peft(native, "diffusion_model.")},
    "sd15": {"kohya": _kohya(unet_diffusers), "native": _peft(native, "diffusion_model.")},
}

TEXT_DIALECTS: dict[str, Dialect] = {
    "sd15": _kohya(text_encoder_kohya(single=True), "lora_"),
    "sdxl": _kohya(text_encoder_kohya(single=False), "lora_"),
}

_NAMINGS: dict[str, Naming] = {
    "flux": flux_diffusers,
    "zimage": zimage_diffusers,
    "sdxl": unet_diffusers,
    "sd15": unet_diffusers,
}


def all_names(family: str, modules: Mapping[str, Shape]) -> dict[str, Entry]:
    """Every name that a file for this family may use, over all namings and prefixes."""
    names = {}
    for naming in (native, _NAMINGS.get(family, native)):
        for entry in naming(modules):
            names["lora_unet_" + entry.name.replace(".", "_")] = entry
            for prefix in ("diffusion_model.", "transformer.", "unet."):
                names[prefix + entry.name] = entry
    return names
