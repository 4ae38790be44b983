"""Base names of LoRA files -> names that the host knows, whatever prefix a trainer put before them.

The host's own table has each layer under some prefixes and dialects. The same path under another
prefix (`transformer.<native path>`, `lora_unet_<diffusers path>`, no prefix at all) means the same
layer, as long as only one layer of the model has that path.
"""

from __future__ import annotations

from .targets import KeyMap, KeyTarget

_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "text_encoders.", "lora_prior_te", "te1_", "te2_")


def is_text_encoder(base: str) -> bool:
    """Whether a base name speaks of a text encoder."""
    return base.removeprefix(_PREFIXES[0]).startswith(_TEXT_ENCODER_PREFIXES)


class NameIndex:
    """Finds the host's name for a base name of a file.

    Args:
        key_map: Base names that the model understands.
    """

    def __init__(self, key_map: KeyMap) -> None:
        self._key_map = key_map
        self._by_stem: dict[str, str | None] = {}
        meanings: dict[str, KeyTarget] = {}
        for name, entry in key_map.items():
            if entry.target.part != "model":
                continue
            stem = _stem(name)
            if stem in meanings and meanings[stem] != entry:
                self._by_stem[stem] = None  # two layers have this path
            elif stem not in meanings:
                meanings[stem], self._by_stem[stem] = entry, name

    def find(self, base: str) -> str | None:
        """The host's name; None if no layer, or more than one, has this path."""
        if base in self._key_map:
            return base
        stripped = base.removeprefix(_PREFIXES[0])
        if stripped in self._key_map:
            return stripped
        return None if is_text_encoder(base) else self._by_stem.get(_stem(base))


def _stem(base: str) -> str:
    """A base name without prefixes, with underscores for dots."""
    known = True
    while known:
        known = False
        for prefix in _PREFIXES:
            if base.startswith(prefix):
                base, known = base[len(prefix) :], True
    return base.replace(".", "_")
