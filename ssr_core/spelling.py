"""How trainers spell the tensors of one layer: suffix -> role.

The names are facts of the file formats (kohya, LoCon, diffusers, peft, transformers, LyCORIS).
Longer suffixes are tried first, so `.lora_B.default.weight` is never taken for `.lora_B`.
"""

from __future__ import annotations

from typing import NamedTuple

LOW_RANK_SUFFIXES: dict[str, tuple[str, str]] = {
    # suffix -> (role, spelling); up and down of one layer must share a spelling
    ".lora_up.weight": ("up", "kohya"),
    ".lora_down.weight": ("down", "kohya"),
    ".lora_mid.weight": ("mid", "kohya"),
    "_lora.up.weight": ("up", "diffusers attention processor"),
    "_lora.down.weight": ("down", "diffusers attention processor"),
    ".lora_B.weight": ("up", "peft"),
    ".lora_A.weight": ("down", "peft"),
    ".lora.up.weight": ("up", "diffusers"),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora_B": ("up", "mochi"),
    ".lora_A": ("down", "mochi"),
    ".lora_linear_layer.up.weight": ("up", "transformers"),
    ".lora_linear_layer.down.weight": ("down", "transformers"),
    ".lora_B.default.weight": ("up", "peft default"),
    ".lora_A.default.weight": ("down", "peft default"),
}
SHARED_SUFFIXES: dict[str, str] = {
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".reshape_weight": "reshape_weight",
}
VECTOR_SUFFIXES: dict[str, str] = {
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".set_weight": "set_weight",
    ".lora_B.bias": "lora_bias",
    ".lora_B.default.bias": "lora_bias",
}
DENSE_SUFFIXES: dict[str, str] = {
    **{f".hada_{n}": "LoHa" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{n}": "LoKr" for n in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".{n}.weight": "GLoRA" for n in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": "OFT",
    ".rescale": "OFT",
}
UNSUPPORTED_SUFFIXES: dict[str, str] = {
    ".oft_diag": "a diagonal OFT",
    ".on_input": "IA3",
}

_ROLES: dict[str, tuple[str, str]] = {
    **LOW_RANK_SUFFIXES,
    **{suffix: (role, "") for suffix, role in SHARED_SUFFIXES.items()},
    **{suffix: (role, "") for suffix, role in VECTOR_SUFFIXES.items()},
    **{suffix: ("dense", kind) for suffix, kind in DENSE_SUFFIXES.items()},
    **{suffix: ("unsupported", kind) for suffix, kind in UNSUPPORTED_SUFFIXES.items()},
}
_BY_LENGTH = sorted(_ROLES, key=len, reverse=True)


class Spelled(NamedTuple):
    """A key taken apart: base name, role of the tensor, spelling or adapter kind."""

    base: str
    role: str
    spelling: str


def split_key(key: str) -> Spelled | None:
    """Take one key of a LoRA file apart; None if it ends in nothing known."""
    for suffix in _BY_LENGTH:
        if key.endswith(suffix):
            role, spelling = _ROLES[suffix]
            return Spelled(key[: -len(suffix)], role, spelling)
    return None
