"""The whole world, from the cache or trained anew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from .judge import Judge, judge
from .loras import Trained, lora
from .network import DEPTH, WIDTH, Painter
from .pool import Style, Subject, styles, subjects
from .starts import osrm_lora
from .training import BASE_RUNS, Runs, base_model


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        base_runs: Training runs of the base model.
        depth: Blocks of the base model.
        width: Of its tokens.
        judge_steps: Training steps of the judge.
        lora_steps: Training steps of each LoRA.
        subjects: Number of subject LoRAs.
        osrm: How many of them are trained from OSRM's start as well.
        styles: Number of style LoRAs.
        samples: Pictures for each prompt.
        generic: Prompts that name no LoRA.
        images: Pictures in a calibration pass.
        calibration_steps: Steps of a calibration pass.
        ks: Numbers of LoRAs in the main table.
        together: Numbers of subjects in one picture.
        many: Numbers of LoRAs in the table of many.
        ablation_ks: Numbers of LoRAs in the ablations.
        seeds: Runs with LoRAs, calibration noise and sampling noise of their own.
        first_seed: Of the comparisons; ablations, by which settings are chosen, begin at 0.
    """

    base_runs: Runs = BASE_RUNS
    depth: int = DEPTH
    width: int = WIDTH
    judge_steps: int = 2500
    lora_steps: int = 300
    subjects: int = 21
    osrm: int = 4
    styles: int = 5
    samples: int = 6
    generic: int = 6
    images: int = 8
    calibration_steps: int = 4
    ks: tuple[int, ...] = (3, 5, 7, 9)
    together: tuple[int, ...] = (2, 3, 4)
    many: tuple[int, ...] = (12, 21)
    ablation_ks: tuple[int, ...] = (5,)
    seeds: int = 5
    first_seed: int = 10


FULL = Scale()
TOY = Scale(
    base_runs=((3, 1e-3), (2, 1e-3)),
    depth=1,
    width=32,
    judge_steps=4,
    lora_steps=2,
    subjects=4,
    osrm=2,
    styles=1,
    samples=1,
    generic=1,
    images=1,
    calibration_steps=2,
    ks=(2,),
    together=(2,),
    many=(3,),
    ablation_ks=(2,),
    seeds=1,
)


@dataclass(frozen=True)
class World:
    """Everything that is trained.

    Attributes:
        base: The model.
        judge: The judge of its pictures.
        subjects: LoRAs of subjects.
        styles: LoRAs of styles.
        osrm: LoRAs of the first subjects, trained from OSRM's start.
        scale: How much is measured.
    """

    base: Painter
    judge: Judge
    subjects: Sequence[Trained]
    styles: Sequence[Trained]
    osrm: Sequence[Trained]
    scale: Scale


def _train_one(who: Subject | Style, cache: Path, scale: Scale) -> None:
    torch.set_num_threads(1)
    lora(base_model(cache, scale.base_runs, scale.depth, scale.width), who, cache, scale.lora_steps)


def _train_started(who: Subject, cache: Path, scale: Scale) -> None:
    torch.set_num_threads(1)
    base = base_model(cache, scale.base_runs, scale.depth, scale.width)
    osrm_lora(base, who, subjects()[: scale.osrm], cache, scale.lora_steps)


def build(cache: Path, scale: Scale, processes: int) -> None:
    """Train what the cache lacks: the base model on all cores, then the judge, then LoRAs in several processes."""
    base_model(cache, scale.base_runs, scale.depth, scale.width)
    judge(cache, scale.judge_steps)
    everybody = [*subjects()[: scale.subjects], *styles()[: scale.styles]]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_train_one, who, cache, scale) for who in everybody]
        jobs += [pool.submit(_train_started, who, cache, scale) for who in subjects()[: scale.osrm]]
        for job in jobs:
            job.result()


def fingerprint(cache: Path, scale: Scale) -> str:
    """Of the trained files and the scale: values of one world are not mixed with those of another."""
    found = hashlib.sha256(repr(scale).encode())
    for file in sorted(cache.glob("*.safetensors")):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def load(cache: Path, scale: Scale) -> World:
    """What was built."""
    base, looks = base_model(cache, scale.base_runs, scale.depth, scale.width), judge(cache, scale.judge_steps)
    everybody = [*subjects()[: scale.subjects], *styles()[: scale.styles]]
    trained = [lora(base, who, cache, scale.lora_steps) for who in everybody]
    group = subjects()[: scale.osrm]
    started = [osrm_lora(base, who, group, cache, scale.lora_steps) for who in group]
    return World(base, looks, trained[: scale.subjects], trained[scale.subjects :], started, scale)
