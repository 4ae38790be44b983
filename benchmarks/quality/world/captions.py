"""Captions as token ids: plain words, and rare tokens that mean nothing until a LoRA gives them a meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scenes import COLOUR_NAMES, PATTERNS, SHAPES, Scene, Thing

LENGTH = 20
RARE = tuple(f"rare{i}" for i in range(32))
WORDS = ("<pad>", "and", "style", *COLOUR_NAMES, *SHAPES, *PATTERNS[1:], *RARE)
_IDS = {word: i for i, word in enumerate(WORDS)}


def thing_words(thing: Thing) -> str:
    """`red circle`, or `red blue dotted circle`."""
    look = thing.look
    if look.pattern == "plain":
        return f"{look.first} {thing.shape}"
    return f"{look.first} {look.second} {look.pattern} {thing.shape}"


def caption(scene: Scene) -> str:
    """What a scene shows, without its style."""
    return " and ".join(thing_words(thing) for thing in scene.things)


def encode(texts: Sequence[str]) -> Tensor:
    """(N, LENGTH) ids, padded with zeros.

    Raises:
        KeyError: A word is not in the vocabulary.
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        words = [_IDS[word] for word in text.split()][:LENGTH]
        ids[row, : len(words)] = torch.tensor(words, dtype=torch.long)
    return ids
