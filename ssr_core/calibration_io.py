"""Calibrations on disk: safetensors, the upper triangles of the Grams, everything else in the header."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters import RESTS, ConvertOptions
from .atomic import atomic_path
from .calibration import Calibration
from .calibration_tensors import (
    read_counts,
    read_sample,
    read_scenes,
    read_triangles,
    sample_tensors,
    scene_stats,
    scene_tensors,
)
from .errors import CalibrationError, FileError
from .files import json_text, read_safetensors, write_safetensors
from .gram import GramStats
from .heldout import HeldOut
from .records import TaskRecord
from .sampling import InputSample
from .targets import Target
from .triangles import pack, unpack
from .triangles import places as places_of

FORMAT = "ssr_calibration"
VERSION = 3
"""Of files with joint or neutral prompts; those without are of version 2, those without sampled inputs of version 1.

Older releases then read all that they know. What was held out needs no version: releases that know nothing of it leave
it aside, and the Grams and samples beside it hold all tokens.
"""


def save_calibration(calibration: Calibration, path: Path, overwrite: bool = False) -> None:
    """Write a calibration; `path` is either complete or untouched.

    Raises:
        FileError: The file exists and `overwrite` is False, or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    stacks: list[dict[str, object]] = []
    modules: dict[tuple[str, str], int] = {}
    for index, (target, stats) in enumerate(calibration.stats.items()):
        tensors[f"{index}.gram"] = pack(stats.gram)
        tensors[f"{index}.tokens"] = stats.tokens
        if stats.held is not None:
            tensors[f"{index}.held_gram"] = stats.held.packed
            tensors[f"{index}.held_tokens"] = stats.held.tokens
        tensors[f"{index}.nonfinite"] = stats.nonfinite
        module = modules.setdefault((target.part, target.module_path), index)
        for task, sample in zip(calibration.stack_tasks[target], stats.samples or (), strict=False):
            tensors |= sample_tensors(f"{module}.sample.{task}", sample)
        if stats.scenes is not None:
            tensors |= scene_tensors(index, module, stats.scenes)
        if target in calibration.signatures:
            tensors[f"{index}.signature"] = calibration.signatures[target]
        stacks.append(
            {
                "module_path": target.module_path,
                "out_slice": target.out_slice,
                "part": target.part,
                "ranks": stats.ranks,
                "tasks": calibration.stack_tasks[target],
                "samples": None if stats.samples is None else module,
            }
        )
    header = {
        "version": _version(calibration),
        "tasks": [asdict(record) for record in calibration.tasks],
        "scenes": [asdict(scene) for scene in calibration.scenes],
        "stacks": stacks,
        "model": calibration.model,
        "settings": calibration.settings,
    }
    with atomic_path(path, overwrite) as temporary:
        write_safetensors(temporary, tensors, {FORMAT: json_text(header)})


def _version(calibration: Calibration) -> int:
    """The first that knows all that is in it."""
    if calibration.scenes:
        return VERSION
    return 1 if all(stats.samples is None for stats in calibration.stats.values()) else 2


def load_calibration(path: Path) -> Calibration:
    """Read a calibration back.

    Raises:
        FileError: Not a calibration, of another version, damaged, or not finite.
    """
    tensors, metadata = read_safetensors(path)
    if FORMAT not in metadata:
        raise FileError(
            "this is no SSR calibration.", file=path.name, remedy="choose a file that SSR Save Calibration wrote."
        )
    try:
        header: dict[str, Any] = json.loads(metadata[FORMAT])
        if header["version"] not in range(1, VERSION + 1):
            raise FileError(
                f"calibration format {header['version']}, this version reads up to {VERSION}.",
                file=path.name,
                remedy="calibrate again, or update SSR-Merge.",
            )
        tasks = tuple(
            TaskRecord(
                str(t["name"]),
                str(t["fingerprint"]),
                float(t["strength_model"]),
                float(t["strength_clip"]),
                tuple(str(p) for p in t["prompts"]),
                _convert_options(t.get("convert_options")),
            )
            for t in header["tasks"]
        )
        if not all(math.isfinite(s) for t in tasks for s in (t.strength_model, t.strength_clip)):
            raise ValueError("a strength is not finite")
        scenes = read_scenes(header.get("scenes", []), len(tasks))
        stats: dict[Target, GramStats] = {}
        stack_tasks: dict[Target, tuple[int, ...]] = {}
        signatures: dict[Target, Tensor] = {}
        places: dict[int, Tensor] = {}
        for index, stack in enumerate(header["stacks"]):
            target, members, one = _stack(index, stack, tensors, len(tasks), places)
            if scenes:
                one = replace(one, scenes=scene_stats(index, stack["samples"], scenes, members, tensors))
            stats[target], stack_tasks[target] = one, members
            if f"{index}.signature" in tensors:
                signatures[target] = tensors[f"{index}.signature"].double()
                if signatures[target].shape != (sum(one.ranks),):
                    raise ValueError(f"signature of {target}")
        settings = dict(header["settings"])
        return Calibration(tasks, stats, stack_tasks, str(header["model"]), settings, signatures, scenes)
    except FileError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        IndexError,
        OverflowError,
        CalibrationError,
    ) as err:
        raise FileError(
            f"the calibration is damaged ({type(err).__name__}: {err}).", file=path.name, remedy="calibrate again."
        ) from err


def _convert_options(stored: dict[str, Any] | None) -> ConvertOptions | None:
    if stored is None:
        return None
    options = ConvertOptions(int(stored["max_rank"]), float(stored["tolerance"]), stored["rest"])
    if options.max_rank < 0 or not options.tolerance >= 0 or options.rest not in RESTS:
        raise ValueError(f"conversion {stored!r}")
    return options


def _stack(
    index: int, stack: dict[str, Any], tensors: dict[str, Tensor], tasks: int, places: dict[int, Tensor]
) -> tuple[Target, tuple[int, ...], GramStats]:
    rows = stack["out_slice"]
    part = stack["part"]
    if part not in ("model", "clip"):
        raise ValueError(f"part {part!r}")
    target = Target(str(stack["module_path"]), None if rows is None else (int(rows[0]), int(rows[1])), part)
    ranks = tuple(int(rank) for rank in stack["ranks"])
    members = tuple(int(task) for task in stack["tasks"])
    size = sum(ranks)
    if len(members) != len(ranks) or any(not 0 <= m < tasks for m in members) or not ranks or min(ranks) < 0:
        raise ValueError(f"layer {target}")
    packed, tokens = read_triangles(f"{index}.", tensors, len(ranks), size)
    held = None
    if f"{index}.held_gram" in tensors:
        held = HeldOut(*read_triangles(f"{index}.held_", tensors, len(ranks), size))
        if bool((held.tokens > tokens * (1 + 1e-5)).any()):
            raise ValueError(f"held-out token counts of {target}")
    if size not in places:  # most layers are of one rank
        places[size] = places_of(size)
    nonfinite = read_counts(f"{index}.nonfinite", tensors, len(ranks))
    samples = None if stack.get("samples") is None else _samples(int(stack["samples"]), members, tensors)
    return target, members, GramStats(unpack(packed, places[size]), tokens, nonfinite, ranks, samples, held)


def _samples(module: int, members: Sequence[int], tensors: dict[str, Tensor]) -> tuple[InputSample, ...]:
    """Sampled inputs of one module; stacks of its rows share them."""
    return tuple(read_sample(f"{module}.sample.{task}", tensors) for task in members)
