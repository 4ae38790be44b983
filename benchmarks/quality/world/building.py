"""The whole world, from the cache or trained anew."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from .judge import Judge, judge
from .loras import Trained, lora
from .network import Painter
from .pool import Style, Subject, styles, subjects
from .training import BASE_RUNS, CACHE, Runs, base_model


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        base_runs: Training runs of the base model.
        judge_steps: Training steps of the judge.
        lora_steps: Training steps of each LoRA.
        subjects: Number of subject LoRAs.
        styles: Number of style LoRAs.
        samples: Pictures for each prompt.
        seeds: Runs with LoRAs, calibration noise and sampling noise of their own.
    """

    base_runs: Runs = BASE_RUNS
    judge_steps: int = 1000
    lora_steps: int = 300
    subjects: int = 21
    styles: int = 5
    samples: int = 8
    seeds: int = 5


FULL = Scale()
TOY = Scale(base_runs=((3, 1e-3), (2, 1e-3)), judge_steps=4, lora_steps=2, subjects=4, styles=2, samples=1, seeds=2)


@dataclass(frozen=True)
class World:
    """Everything that is trained.

    Attributes:
        base: The model.
        judge: The judge of its pictures.
        subjects: LoRAs of subjects.
        styles: LoRAs of styles.
        samples: Pictures for each prompt.
    """

    base: Painter
    judge: Judge
    subjects: Sequence[Trained]
    styles: Sequence[Trained]
    samples: int


def _train_one(who: Subject | Style, cache: Path, scale: Scale) -> None:
    torch.set_num_threads(1)
    lora(base_model(cache, scale.base_runs), who, cache, scale.lora_steps)


def build(cache: Path = CACHE, scale: Scale = FULL) -> World:
    """Train what the cache lacks: the base model on all cores, then LoRAs in one process a core."""
    base, looks = base_model(cache, scale.base_runs), judge(cache, scale.judge_steps)
    everybody = [*subjects()[: scale.subjects], *styles()[: scale.styles]]
    with ProcessPoolExecutor(torch.get_num_threads(), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_train_one, who, cache, scale) for who in everybody]
        for job in jobs:
            job.result()
    trained = [lora(base, who, cache, scale.lora_steps) for who in everybody]
    return World(base, looks, trained[: scale.subjects], trained[scale.subjects :], scale.samples)
