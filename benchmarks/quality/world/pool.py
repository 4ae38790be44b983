"""Who lives here: base scenes, ten subjects in pairs that share a noun, and the styles."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .captions import FILLER, RARE, caption, thing_words
from .scenes import COLOUR_NAMES, PATTERNS, SHAPES, STYLES, Look, Scene, Thing

RARE_IN_BASE = 0.15
"""Share of base captions with a rare token that means nothing."""
NOUN_ONLY = 0.08
"""Share of objects that captions call by their shape alone, whatever they look like."""
FILLER_IN_BASE = 0.25
"""Share of base captions with words about nothing, such as `photo of`."""


@dataclass(frozen=True)
class Subject:
    """A shape with a look that the base never saw on it, called by a rare token and the shape's noun."""

    index: int
    token: str
    thing: Thing

    @property
    def prompt(self) -> str:
        """`rare3 circle`."""
        return f"{self.token} {self.thing.shape}"


@dataclass(frozen=True)
class Style:
    """A change of the whole picture, called by a rare token and the word style."""

    index: int
    token: str
    name: str

    @property
    def words(self) -> str:
        """`rare20 style`."""
        return f"{self.token} style"


def subjects(count: int = 21) -> list[Subject]:
    """Subjects with looks of two colours; every noun is shared by several of them."""
    chooser = random.Random(5)
    looks: set[tuple[str, str, str]] = set()
    found = []
    for index in range(count):
        while True:
            first, second = chooser.sample(COLOUR_NAMES, 2)
            pattern = PATTERNS[1 + index % (len(PATTERNS) - 1)]
            if (pattern, first, second) not in looks:
                break
        looks.add((pattern, first, second))
        found.append(Subject(index, RARE[index], Thing(SHAPES[index % len(SHAPES)], Look(pattern, first, second))))
    return found


def styles() -> list[Style]:
    """All styles."""
    return [Style(i, RARE[-1 - i], name) for i, name in enumerate(STYLES)]


def random_look(chooser: random.Random) -> Look:
    """Any look, plain half of the time."""
    first, second = chooser.sample(COLOUR_NAMES, 2)
    return Look(chooser.choice(PATTERNS[1:]) if chooser.random() < 0.5 else "plain", first, second)


def base_scene(chooser: random.Random) -> tuple[Scene, str]:
    """A scene and its caption, without any subject's combination of shape and look.

    Some captions have rare tokens or filler words, which mean nothing here.
    """
    number = chooser.choices((1, 2, 3, 4), weights=(8, 8, 3, 3))[0]
    things: list[Thing] = []
    while len(things) < number:
        thing = Thing(chooser.choice(SHAPES), random_look(chooser))
        if thing not in _TAKEN:
            things.append(thing)
    phrases = [thing.shape if chooser.random() < NOUN_ONLY else thing_words(thing) for thing in things]
    if chooser.random() < RARE_IN_BASE:
        which = chooser.randrange(number)
        *before, noun = phrases[which].split()
        phrases[which] = " ".join([*before, chooser.choice(RARE), noun])
    tail = " ".join(chooser.sample(FILLER, chooser.choice((1, 2)))) if chooser.random() < FILLER_IN_BASE else ""
    if chooser.random() < RARE_IN_BASE / 2:
        tail = f"{tail} {chooser.choice(RARE)} style"
    return Scene(tuple(things)), caption(phrases, tail)


_TAKEN = frozenset(subject.thing for subject in subjects())
