"""Prompts under which several LoRAs act at once, or none: what else a router should get right.

A router that has seen each LoRA alone keeps one LoRA where several are wanted (a subject in a style, two
subjects in one picture). A scene's pass runs with all of its LoRAs active as a plain sum, and the sum of
their branches is what the router should give there; under a neutral prompt nobody acts, and it should
give nothing. With J the second moments of a scene, P the selector of its LoRAs' rows and w its weight (their
number times `SSRMerge.joint_weight`; neutral prompts share `SSRMerge.neutral_weight` times K among them),

    G = sum_k S_k + sum_j w_j J_j,      Q = sum_k E_k S_k + sum_j w_j P_j J_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import CalibrationError
from .sampling import InputSample, joined
from .triangles import pack, packed_size, per_token, unpack

JOINT_WEIGHT = 1.0
"""What a joint prompt counts for each of its LoRAs, as a share of that LoRA's own prompts."""

NEUTRAL_WEIGHT = 0.05
"""What all neutral prompts together count, as a share of all LoRAs' own prompts."""


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
        """(J,) float64: the number of LoRAs that act in each scene, at least 1; `emphasis` is what methods change."""
        return self.active.sum(dim=1).clamp_min(1).double()

    def emphasis(self, joint_weight: float, neutral_weight: float) -> Tensor:
        """(J,) float64: what `weights` are multiplied by; scenes in which no LoRA of the stack acts share theirs."""
        acting = self.active.any(dim=1).double()
        silent = (1 - acting) * (self.tokens > 0)
        each = neutral_weight * self.active.shape[1] / silent.sum().clamp_min(1)
        return joint_weight * acting + each * silent

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
