"""Settings of the nodes as typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..ssr_core import (
    METHODS,
    Anchor,
    IncompatibleError,
    MergeMethod,
    MomentOptions,
    PaddingMode,
    SampleOptions,
    SSRMerge,
    tensors_hash,
)
from . import host
from .forward import Apply

DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


CUSTOM_LATENT = "custom latent"
"""Setting: hash of a connected LATENT, as the model takes it."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate."""

    seed: int
    steps: int
    width: int
    height: int
    frames: int
    scheduler: str
    padding: PaddingMode
    memory_budget_gb: float
    latent: Mapping[str, Any] | None = field(default=None, repr=False)
    sigmas: Tensor | None = field(default=None, repr=False)
    sample: SampleOptions | None = None
    joint_prompts: tuple[str, ...] = ()
    neutral_prompts: tuple[str, ...] = ()
    rounds: int = 1

    def latent_for(self, model: Any) -> Tensor:
        """The connected LATENT, or an empty one of the chosen size."""
        if self.latent is not None:
            return host.prepare_latent(model, self.latent)
        return host.empty_latent(model, self.width, self.height, self.frames)

    def latent_content(self, model: Any) -> dict[str, object]:
        """Setting that tells one connected LATENT from another of the same shape; none without one."""
        latent = None if self.latent is None else self.latent_for(model)
        if not isinstance(latent, Tensor):
            return {}
        return {CUSTOM_LATENT: tensors_hash({"samples": latent})[:16]}

    def sigmas_for(self, model: Any) -> Tensor:
        """The connected SIGMAS, or those of a short schedule; the last one is not evaluated."""
        sigmas = self.sigmas if self.sigmas is not None else host.step_sigmas(model, self.scheduler, self.steps)
        falling = bool(torch.isfinite(sigmas).all() and (sigmas[:-1] > 0).all() and (sigmas.diff() < 0).all())
        if len(sigmas) < 2 or not falling:
            raise IncompatibleError(
                f"SIGMAS has to fall from step to step and only end in 0; it is {sigmas.tolist()[:8]}.",
                remedy="connect a scheduler node, or disconnect sigmas.",
            )
        return sigmas

    def settings(self) -> dict[str, object]:
        """Plain values for the calibration's record."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "scheduler": self.scheduler,
            "padding": self.padding,
            "custom_latent": self.latent is not None,
            "latent_fill": None if self.latent is None else _one_value(self.latent["samples"]),
            "custom_sigmas": self.sigmas is not None,
            "sampled_tokens": 0 if self.sample is None else self.sample.tokens,
            "joint_prompts": list(self.joint_prompts),
            "neutral_prompts": list(self.neutral_prompts),
            "rounds": self.rounds,
        }


def _one_value(latent: Any) -> float | None:
    """The value of a latent that holds nothing else, as empty ones do."""
    if not isinstance(latent, Tensor) or latent.numel() == 0:
        return None
    first = latent.flatten()[0]
    return float(first) if bool((latent == first).all()) else None


@dataclass(frozen=True)
class SolveOptions:
    """How to solve and what to make of the answer."""

    method: MergeMethod
    dtype: str
    unsupported: Literal["refuse", "pass_through"]
    unseen_layers: Literal["anchor", "refuse"]
    apply: Apply

    def torch_dtype(self) -> torch.dtype | None:
        """Dtype of the merged factors; None for that of the inputs."""
        return DTYPES[self.dtype]


def calibration_options(values: Mapping[str, Any]) -> CalibrationOptions:
    """Take the calibration settings out of a node's inputs."""
    return CalibrationOptions(
        seed=values["seed"],
        steps=values["steps"],
        width=values["width"],
        height=values["height"],
        frames=values["frames"],
        scheduler=values["scheduler"],
        padding=cast(PaddingMode, values["padding"]),
        memory_budget_gb=values["memory_budget_gb"],
        latent=values.get("latent"),
        sigmas=values.get("sigmas"),
        sample=_sample_options(values),
        joint_prompts=_lines(values.get("joint_prompts", "")),
        neutral_prompts=_lines(values.get("neutral_prompts", "")),
        rounds=values.get("rounds", 1),
    )


def _lines(given: str | Sequence[str]) -> tuple[str, ...]:
    """Prompts, one a line: a node's text, or a recipe's list."""
    lines = given.splitlines() if isinstance(given, str) else given
    return tuple(line.strip() for line in lines if line.strip())


def _sample_options(values: Mapping[str, Any]) -> SampleOptions | None:
    """How many whole inputs calibration keeps; nodes and workflows without the input take the default."""
    tokens = values.get("sampled_tokens", SampleOptions().tokens)
    return SampleOptions(tokens) if tokens else None


def moment_options(values: Mapping[str, Any]) -> MomentOptions:
    """Take the size of input moments out of a node's inputs."""
    return MomentOptions(values["features"], values["exact_limit"], values["sketch"])


def solve_method(values: Mapping[str, Any]) -> MergeMethod:
    """The method of a `mode` input; all but ssr keep the defaults of their parameters there."""
    if values["mode"] == SSRMerge.name:
        return SSRMerge(
            values["ridge"],
            cast(Anchor, values["anchor"]),
            values["balance"],
            # nodes and workflows without these inputs
            joint_weight=values.get("joint_weight", SSRMerge.joint_weight),
            neutral_weight=values.get("neutral_weight", SSRMerge.neutral_weight),
        )
    return METHODS[values["mode"]]()


def solve_options(values: Mapping[str, Any], method: MergeMethod) -> SolveOptions:
    """Take what is to be made of a method's answer out of a node's inputs."""
    return SolveOptions(
        method=method,
        dtype=values["dtype"],
        unsupported=values["unsupported"],
        unseen_layers=values["unseen_layers"],
        apply=values.get("apply", "auto"),  # workflows from before it existed
    )
