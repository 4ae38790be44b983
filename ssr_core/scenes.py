"""Prompts under which several LoRAs act at once, or none: what else a router should get right.

A router that has seen each LoRA alone keeps one LoRA where several are wanted (a subject in a style, two
subjects in one picture). A scene's pass runs with all of its LoRAs active as a plain sum, and the sum of
their branches is what the router should give there; under a neutral prompt nobody acts, and it should
give nothing. With J the second moments of a scene, P the selector of its LoRAs' rows and w its weight (their
number times `SSRMerge.joint_weight`; 1 for a neutral prompt, which counts as one LoRA's own),

    G = sum_k S_k + sum_j w_j J_j,      Q = sum_k E_k S_k + sum_j w_j P_j J_j.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import torch
from torch import Tensor

from .errors import CalibrationError, IncompatibleError
from .sampling import InputSample, joined
from .triangles import pack, packed_size, per_token, unpack


@dataclass(frozen=True)
class Scene:
    """One such prompt.

    Attributes:
        prompt: The text.
        tasks: Indices of the LoRAs that act, rising; none for a neutral prompt.
    """

    prompt: str
    tasks: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What people know it as."""
        return "joint prompt" if self.tasks else "neutral prompt"


@dataclass(frozen=True)
class SceneStats:
    """What the passes of all scenes found at one stack, in the order of `Calibration.scenes`.

    Attributes:
        packed: (J, R (R + 1) / 2), float32 or float64: second moments of each scene, as upper triangles.
        tokens: (J,) float64, their weighted number; 0 where a scene did not reach the layer.
        nonfinite: (J,) int64, tokens left out because a coordinate was NaN or infinite.
        active: (J, K) bool, which blocks of the stack act.
        samples: Whole inputs of the layer for each scene; None where any is lacking.
    """

    packed: Tensor
    tokens: Tensor
    nonfinite: Tensor
    active: Tensor
    samples: tuple[InputSample, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.active)
        fits = self.active.ndim == 2 and len(self.packed) == count
        fits &= self.tokens.shape == (count,) and self.nonfinite.shape == (count,)
        if not fits or (self.samples is not None and len(self.samples) != count):
            raise CalibrationError(f"statistics of shape {tuple(self.packed.shape)} do not belong to {count} scenes.")

    @property
    def gram(self) -> Tensor:
        """(J, R, R), unpacked anew each time."""
        return unpack(self.packed)

    def per_token(self, device: torch.device) -> Tensor:
        """(J, R, R), float64: the mean over each scene's tokens, zero for one that did not reach the layer."""
        return per_token(self.gram, self.tokens, device)

    @property
    def weights(self) -> Tensor:
        """(J,) float64: the number of LoRAs that act in each scene, at least 1; methods may weigh joint ones more."""
        return self.active.sum(dim=1).clamp_min(1).double()

    def emphasis(self, joint_weight: float) -> Tensor:
        """(J,) float64: what `weights` are multiplied by. Nothing changes where no LoRA of the stack acts."""
        return 1 + (joint_weight - 1) * self.active.any(dim=1).double()

    def choose(self, scenes: Sequence[int]) -> SceneStats | None:
        """Some of the scenes; None if that is none."""
        if not scenes:
            return None
        picked = torch.tensor(list(scenes), dtype=torch.long)
        samples = None if self.samples is None else tuple(self.samples[scene] for scene in scenes)
        return SceneStats(
            self.packed[picked], self.tokens[picked], self.nonfinite[picked], self.active[picked], samples
        )

    def pick(self, blocks: Tensor, rows: Tensor) -> SceneStats:
        """The same of some blocks and their coordinates."""
        packed = pack(self.gram[:, rows][:, :, rows])
        return replace(self, packed=packed, active=self.active[:, blocks])

    def fits(self, blocks: int, rank: int) -> bool:
        """Whether this belongs to a stack of so many blocks and rows."""
        return self.active.shape[1] == blocks and self.packed.shape[1] == packed_size(rank)


def selectors(active: Tensor, ranks: Sequence[int]) -> Tensor:
    """(J, R) float64: 1 in the rows of the blocks that act.

    Args:
        active: (J, K) bool.
        ranks: Rows of each block.
    """
    return active.double().repeat_interleave(torch.tensor(list(ranks), device=active.device), dim=1)


def scenes_of(scenes: Sequence[Scene], tasks: Sequence[int]) -> tuple[list[int], tuple[Scene, ...]]:
    """The scenes of which every LoRA stays, and what they are among these LoRAs.

    Args:
        scenes: Of a calibration.
        tasks: LoRAs of the calibration that stay, in their new order; -1 stands for one that acts on nothing.
    """
    kept = [i for i, scene in enumerate(scenes) if set(scene.tasks) <= set(tasks)]
    moved = [replace(scenes[i], tasks=tuple(sorted(tasks.index(task) for task in scenes[i].tasks))) for i in kept]
    return kept, tuple(moved)


def counted(scenes: Sequence[Scene]) -> list[tuple[Scene, int]]:
    """Each scene with the number of its equals before it: a line written twice is two passes."""
    return [(scene, list(scenes[:place]).count(scene)) for place, scene in enumerate(scenes)]


def summed_scenes(
    known: Sequence[Sequence[tuple[Scene, int]]],
    parts: Sequence[SceneStats | None],
    scenes: Sequence[tuple[Scene, int]],
) -> SceneStats | None:
    """All runs' scenes, those of equal prompt and LoRAs added up.

    Args:
        known: Scenes of each run, `counted`.
        parts: What each run saw of them at one stack.
        scenes: Those of all runs, each once.
    """
    found = []
    for scene in scenes:
        places = [(mine.index(scene), part) for mine, part in zip(known, parts, strict=True) if part and scene in mine]
        found.append([one for at, part in places if (one := part.choose([at])) is not None])
    if not found:
        return None
    samples = [_joined([one.samples for one in runs if float(one.tokens) > 0]) for runs in found]
    kept = tuple(one for one in samples if one is not None)
    return SceneStats(
        torch.cat([torch.stack([one.packed for one in runs]).sum(dim=0) for runs in found]),
        torch.cat([torch.stack([one.tokens for one in runs]).sum(dim=0) for runs in found]),
        torch.cat([torch.stack([one.nonfinite for one in runs]).sum(dim=0) for runs in found]),
        torch.cat([runs[0].active for runs in found]),
        kept if len(kept) == len(samples) else None,
    )


def _joined(runs: Sequence[tuple[InputSample, ...] | None]) -> InputSample | None:
    """One scene's samples of all runs; None where a run that saw the layer kept none."""
    kept = [one[0] for one in runs if one is not None]
    return joined([(one, 1.0) for one in kept]) if kept and len(kept) == len(runs) else None


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
