"""Which kind of adapter the tensors of one layer are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from .spelling import Spelled
from .targets import KeyTarget


class Fate(NamedTuple):
    """What the tensors of one weight are, and the kind or the reason in words."""

    form: Literal["factors", "vector", "difference", "dense", "unmatched", "unsupported"]
    detail: str = ""


def bends(kind: str) -> bool:
    """Whether a kind's change is not proportional to the strength, or the host does not apply it so."""
    return "OFT" in kind or is_replacement(kind)


def reads_weight(kind: str) -> bool:
    """Whether a kind's change depends on the weight that it changes."""
    return any(word in kind for word in ("DoRA", "OFT", "GLoRA"))


def is_replacement(kind: str) -> bool:
    """Whether a kind gives the new weight instead of a change of the old one."""
    return "replacement" in kind


def fate_of(group: Mapping[str, Spelled], entry: KeyTarget, tensors: Mapping[str, Tensor]) -> Fate:
    """Classify the tensors of one weight; every case that is not listed is refused with its reason."""
    roles = {s.role for s in group.values()}
    core = roles - {"alpha", "dora_scale"}
    spellings = sorted({s.spelling for s in group.values() if s.role in ("up", "down")})
    kinds = sorted({s.spelling for s in group.values() if s.role in ("dense", "unsupported")})
    if roles == {"alpha"}:  # left over by a tool that pruned the factors; loaders pass over it
        return Fate("unmatched", "alpha without factors")
    if "unsupported" in roles:
        return Fate("unsupported", f"{'/'.join(kinds)} is not low-rank (up, down)")
    if "reshape_weight" in roles:
        return Fate("unsupported", "it changes the shape of the weight")
    if core <= {"diff"} or core <= {"w_norm"} or core <= {"set_weight"}:
        return _plain_value(core, roles, entry)
    if not entry.is_map:
        return Fate("unsupported", f"the parameter {entry.parameter} of shape {entry.weight_shape} is no matrix")
    if core == {"dense"} and len(kinds) == 1:
        return Fate("dense", _dense_kind(kinds[0], group, tensors) + (" with DoRA" if "dora_scale" in roles else ""))
    if len(spellings) > 1:
        return Fate("unsupported", f"the layer is given in several spellings ({', '.join(spellings)})")
    if not core <= {"up", "down", "mid"}:
        return Fate("unsupported", f"the layer is given in several ways ({', '.join(sorted(core | set(kinds)))})")
    if not {"up", "down"} <= core:
        return Fate("unsupported", "one of the factors up and down is missing")
    return Fate("dense", "DoRA") if "dora_scale" in roles else Fate("factors")


def _plain_value(core: set[str], roles: set[str], entry: KeyTarget) -> Fate:
    """A difference, or a new value, of a whole parameter."""
    if "dora_scale" in roles:
        return Fate("unsupported", "a DoRA scale without factors")
    if core == {"set_weight"}:
        return Fate("difference", "a replacement of the weight")
    if entry.is_map and entry.tapped:
        return Fate("difference", "a full difference of a matrix")
    return Fate("vector")


def _dense_kind(kind: str, group: Mapping[str, Spelled], tensors: Mapping[str, Tensor]) -> str:
    blocks = [key for key in group if key.endswith(".oft_blocks")]
    return "BOFT" if blocks and tensors[blocks[0]].ndim == 4 else kind
