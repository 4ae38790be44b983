"""Captions as token ids: plain words, and rare tokens that mean nothing until a LoRA gives them a meaning.

A caption has a phrase of up to five words for each object, in order, and a tail of up to four words for
everything else (the style, filler). Phrases start at fixed rows, so that binding words to an object costs
the small network no capacity; what the words mean it has to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scenes import COLOUR_NAMES, PATTERNS, SHAPES, Scene, Thing

PHRASES, PHRASE, TAIL = 4, 5, 4
LENGTH = PHRASES * PHRASE + TAIL
RARE = tuple(f"rare{i}" for i in range(32))
FILLER = ("a", "photo", "picture", "drawing", "of", "nice")
WORDS = ("<pad>", "style", *FILLER, *COLOUR_NAMES, *SHAPES, *PATTERNS[1:], *RARE)
_IDS = {word: i for i, word in enumerate(WORDS)}


def thing_words(thing: Thing) -> str:
    """`red circle`, or `red blue dotted circle`."""
    look = thing.look
    if look.pattern == "plain":
        return f"{look.first} {thing.shape}"
    return f"{look.first} {look.second} {look.pattern} {thing.shape}"


def caption(phrases: Sequence[str], tail: str = "") -> str:
    """`red circle, blue ring; rare31 style`."""
    return ", ".join(phrases) + (f"; {tail}" if tail else "")


def scene_caption(scene: Scene, tail: str = "") -> str:
    """What a scene shows, without its style."""
    return caption([thing_words(thing) for thing in scene.things], tail)


def encode(texts: Sequence[str]) -> Tensor:
    """(N, LENGTH) ids, padded with zeros.

    Raises:
        KeyError: A word is not in the vocabulary.
        ValueError: A caption has too many phrases or words.
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        body, _, tail = text.partition(";")
        phrases = [phrase.split() for phrase in body.split(",")]
        if len(phrases) > PHRASES or max(map(len, phrases)) > PHRASE or len(tail.split()) > TAIL:
            raise ValueError(f"too many phrases or words in caption {text!r}")
        places = [(PHRASE * i, words) for i, words in enumerate(phrases)] + [(PHRASES * PHRASE, tail.split())]
        for start, words in places:
            ids[row, start : start + len(words)] = torch.tensor([_IDS[word] for word in words], dtype=torch.long)
    return ids
