"""SD 1.5 and SDXL: the host's names are the original ones, trainers also write those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .naming import Dialect, Entry, Naming, Shape, dotted, native, native_dialects, underscored

_RESNET = {
    "in_layers.0": "norm1",
    "out_layers.0": "norm2",
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


def _attention_processors(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    """The oldest diffusers files: only attention, and as parts of a processor."""
    for entry in unet_diffusers(modules):
        path, _, part = entry.name.partition(".to_")
        if part:
            yield Entry(f"{path}.processor.to_{part.removesuffix('.0')}", entry.module, entry.start, entry.rows)


def text_encoder_kohya(single: bool) -> Naming:
    """CLIP blocks as kohya names them: te for the only encoder, te1 and te2 for CLIP-L and CLIP-G."""
    prefixes = {"clip_l": "te" if single else "te1", "clip_g": "te2"}

    def naming(modules: Mapping[str, Shape]) -> Iterator[Entry]:
        for module, (out, *_) in modules.items():
            encoder, _, path = module.partition(".transformer.")
            if path.startswith("text_model.encoder.layers."):
                yield Entry(f"{prefixes[encoder]}.{path}", module, 0, out)

    return naming


UNET_DIALECTS: dict[str, Dialect] = {
    **native_dialects(),
    "kohya_native": underscored(native),
    "kohya": underscored(unet_diffusers),
    "lycoris": underscored(unet_diffusers, "lycoris_"),
    "old_diffusers": dotted(_attention_processors, "unet.", "_lora.up/down", words="attention processors"),
    "bare_old_diffusers": dotted(_attention_processors, "", "_lora.up/down", words="attention processors"),
    "diffusers": dotted(unet_diffusers, "unet."),
    "diffusers_peft": dotted(unet_diffusers, "base_model.model."),
}
DIALECTS: dict[str, dict[str, Dialect]] = {"sd15": UNET_DIALECTS, "sdxl": UNET_DIALECTS}

TEXT_DIALECTS: dict[str, Dialect] = {
    "sd15": underscored(text_encoder_kohya(single=True), "lora_"),
    "sdxl": underscored(text_encoder_kohya(single=False), "lora_"),
}
NAMINGS: dict[str, Naming] = {"sd15": unet_diffusers, "sdxl": unet_diffusers}
