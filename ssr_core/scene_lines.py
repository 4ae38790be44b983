"""Joint and neutral prompts as the lines that people write, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from .errors import IncompatibleError
from .scenes import Scene

_CHOSEN = re.compile(r"\s*\[([^\]]*)\](.*)", re.DOTALL)


def parse_scenes(joint: Sequence[str], neutral: Sequence[str], names: Sequence[str]) -> tuple[Scene, ...]:
    """Scenes from lines that a person wrote.

    Args:
        joint: Prompts of all LoRAs together, or of some: `[alice, bob] two women`, by file name (with or
            without folder and extension) or by number, from 1. Empty lines do not count.
        neutral: Prompts under which no LoRA acts.
        names: Of the LoRAs.

    Raises:
        IncompatibleError: No such LoRA, a name that several have, fewer than two LoRAs, or no text.
    """
    found = []
    for line in filter(None, map(str.strip, joint)):
        match = _CHOSEN.fullmatch(line)
        if match is None and line.startswith("["):
            raise IncompatibleError(
                f"in the joint prompt {line!r} the bracket is not closed.",
                remedy="write who takes part in brackets, then the prompt: [alice, bob] two women.",
            )
        tasks = set(range(len(names))) if match is None else {_chosen(one, names) for one in match[1].split(",")}
        if len(tasks) < 2:
            raise IncompatibleError(
                f"the joint prompt {line!r} is of one LoRA alone.",
                remedy="a prompt of one LoRA belongs to its SSR LoRA; name two or more: [alice, bob] two women.",
            )
        prompt = line if match is None else match[2].strip()
        if not prompt:
            raise IncompatibleError(
                f"the joint prompt {line!r} has no text.", remedy="write it in the same line: [alice, bob] two women."
            )
        found.append(Scene(prompt, tuple(sorted(tasks))))
    return (*found, *(Scene(line) for line in map(str.strip, neutral) if line))


def scene_lines(scenes: Sequence[Scene], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Lines that `parse_scenes` reads as these scenes: joint ones by number, and neutral ones.

    Args:
        scenes: Some scenes.
        names: Of the LoRAs, as for `parse_scenes`.
    """
    called = {spelling for name in names for spelling in _spellings(name)}

    def number(task: int) -> str:
        found = str(task + 1)
        while found in called:  # a LoRA's name goes before a number
            found = f"0{found}"
        return found

    joint = [f"[{', '.join(map(number, one.tasks))}] {one.prompt}" for one in scenes if one.tasks]
    return joint, [one.prompt for one in scenes if not one.tasks]


def settings_with_scenes(
    settings: Mapping[str, object], scenes: Sequence[Scene], names: Sequence[str]
) -> dict[str, object]:
    """Settings whose joint and neutral prompts are these scenes, by the LoRAs' numbers.

    What a person wrote is about the LoRAs of then, in their order of then; some may be gone or stand elsewhere.
    """
    if not scenes and "joint_prompts" not in settings:
        return dict(settings)
    joint, neutral = scene_lines(scenes, names)
    return {**settings, "joint_prompts": joint, "neutral_prompts": neutral}


def _spellings(name: str) -> tuple[str, str, str]:
    """How people may write a LoRA's name."""
    return name, PurePath(name).name, PurePath(name).stem


def _chosen(wanted: str, names: Sequence[str]) -> int:
    """Index of the LoRA that a joint prompt names."""
    wanted = wanted.strip()
    found = [i for i, name in enumerate(names) if wanted in _spellings(name)]
    if wanted.isdecimal() and not found:
        found = [int(wanted) - 1] if 0 < int(wanted) <= len(names) else []
    if len(found) != 1:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1))
        problem = "several LoRAs are called" if found else "no LoRA that is switched on is called"
        raise IncompatibleError(
            f"in a joint prompt: {problem} {wanted!r}.",
            remedy=f"write numbers or names of: {listed}. If the bracket belongs to the prompt, name the LoRAs before "
            "it: [1, 2] [word] text.",
        )
    return found[0]
