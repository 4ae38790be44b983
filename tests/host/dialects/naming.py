"""What a dialect is: names for layers, a prefix, and the suffixes of the two matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

Shape = tuple[int, ...]

_NO_LAYER = re.compile(r"(\.ff_i\.gate|^llm_adapter\.embed)$")
"""Matrices that no trainer adapts: HiDream's expert gates are bare parameters, Anima's token table an embedding."""


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

SPELLINGS: dict[str, tuple[str, str]] = {
    "up/down": (".lora_up.weight", ".lora_down.weight"),
    "A/B": (".lora_B.weight", ".lora_A.weight"),
    "A/B default": (".lora_B.default.weight", ".lora_A.default.weight"),
    "lora.up/down": (".lora.up.weight", ".lora.down.weight"),
    "_lora.up/down": ("_lora.up.weight", "_lora.down.weight"),
    "linear_layer": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
}
"""(up, down) suffixes by the word that the compatibility table uses."""


@dataclass(frozen=True)
class Dialect:
    """A naming of layers, a prefix, and the suffixes of the two matrices.

    Attributes:
        pattern: How one name looks, for people; "native" is the host's own path.
    """

    naming: Naming
    prefix: str
    up: str
    down: str
    alpha: bool
    dotted: bool = True
    pattern: str = ""

    def key(self, entry: Entry) -> str:
        return self.prefix + (entry.name if self.dotted else entry.name.replace(".", "_"))


def native(modules: Mapping[str, Shape]) -> Iterator[Entry]:
    """The host's own paths; every linear and convolution."""
    for module, shape in modules.items():
        if not _NO_LAYER.search(module):
            yield Entry(module, module, 0, shape[0])


def renamed(rename: Callable[[str], str]) -> Naming:
    """A naming that only has other words for the same modules."""

    def naming(modules: Mapping[str, Shape]) -> Iterator[Entry]:
        for entry in native(modules):
            yield replace(entry, name=rename(entry.name))

    return naming


def _named(naming: Naming) -> str:
    return "native" if naming is native else "diffusers"


def underscored(naming: Naming, prefix: str = "lora_unet_", words: str = "") -> Dialect:
    """As kohya, LyCORIS and OneTrainer write: underscores, up and down, an alpha for each layer."""
    up, down = SPELLINGS["up/down"]
    return Dialect(naming, prefix, up, down, alpha=True, dotted=False, pattern=f"{prefix}<{words or _named(naming)}>")


def dotted(naming: Naming, prefix: str, spelling: str = "A/B", alpha: bool = False, words: str = "") -> Dialect:
    """As peft and diffusers write: dots; an alpha only where said."""
    up, down = SPELLINGS[spelling]
    pattern = f"{prefix}<{words or _named(naming)}>" + ("" if spelling == "A/B" else f" {spelling}")
    return Dialect(naming, prefix, up, down, alpha=alpha, pattern=pattern)


def native_dialects() -> dict[str, Dialect]:
    """What is written with the host's own names, for any family."""
    return {
        "kohya": underscored(native),
        "native": dotted(native, "diffusion_model."),
        "native_updown": dotted(native, "diffusion_model.", "up/down", alpha=True),
        "native_default": dotted(native, "diffusion_model.", "A/B default"),
        "native_peft": dotted(native, "base_model.model.diffusion_model."),
        "bare_native": dotted(native, ""),
        "bare_native_peft": dotted(native, "base_model.model."),
        "transformer_native": dotted(native, "transformer."),
        "lycoris_native": underscored(native, "lycoris_"),
    }


def diffusers_dialects(naming: Naming) -> dict[str, Dialect]:
    """What is written with the names of a diffusers transformer."""
    return {
        "diffusers": dotted(naming, "transformer."),
        "diffusers_lora": dotted(naming, "transformer.", "lora.up/down"),
        "bare_diffusers": dotted(naming, ""),
        "bare_diffusers_default": dotted(naming, "", "A/B default"),
        "diffusers_peft": dotted(naming, "base_model.model."),
        "ai_toolkit": dotted(naming, "diffusion_model."),
        "lycoris": underscored(naming, "lycoris_"),
        "onetrainer": underscored(naming, "lora_transformer_"),
        "kohya_diffusers": underscored(naming),
    }
