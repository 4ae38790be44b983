"""Calibrations that no single run gives, as recipes describe them: sums of runs, and merges from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .combining import RUNS
from .errors import CalibrationError, FileError, IncompatibleError
from .scene_lines import parse_scenes, settings_with_scenes
from .scenes import scenes_of
from .signals.record_header import read_options
from .signals.sketch import RecordOptions

RECORDS = "records"
"""Setting of a calibration that was put together from records."""

_KEEP = "save that calibration (SSR Save Calibration) and give it as calibration.file in a recipe."


@dataclass(frozen=True)
class Run:
    """One run of a combined calibration.

    Attributes:
        settings: Of its passes.
        prompts: For each source its prompts in this run; none if it was not run.
        weight: How much its tokens count.
    """

    settings: Mapping[str, Any]
    prompts: tuple[tuple[str, ...], ...]
    weight: float


@dataclass(frozen=True)
class RecordUse:
    """What the records behind a merge were.

    Attributes:
        options: How much they kept, all alike.
        weights: For each source the weight of each of its prompts.
    """

    options: RecordOptions
    weights: tuple[tuple[float, ...], ...]


def read_runs(
    settings: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    name: str,
    absent: Mapping[str, Any] | None = None,
) -> tuple[Run, ...]:
    """The runs that a calibration is the sum of; none if it is one run.

    Args:
        settings: Of the calibration.
        sources: The LoRAs, as recipes say them.
        name: Of the file, for errors.
        absent: What a run had that does not say so.

    Raises:
        FileError: A run cannot be made again; says why.
    """
    found = []
    for run in settings.get(RUNS, ()):
        if RECORDS in run["settings"]:
            raise _lost(name, "a part of it was put together from records")
        hashes = _hashes(sources, name)
        settings_of_run = _in_order(run, hashes, [one["name"] for one in sources], name)
        prompts = _prompts_of(run, name)
        silent = [one["name"] for one, sha256 in zip(sources, hashes, strict=True) if sha256 not in prompts]
        if silent:
            raise _lost(name, f"its runs do not say the prompts of {silent[0]}")
        given = {**(absent or {}), **settings_of_run}
        found.append(Run(given, tuple(prompts[sha256] for sha256 in hashes), float(run["weight"])))
    return tuple(found)


def _in_order(run: Mapping[str, Any], hashes: Sequence[str], names: Sequence[str], name: str) -> Mapping[str, Any]:
    """Settings of one run whose joint prompts name the LoRAs by their numbers here, where those of then differed.

    Args:
        run: The run.
        hashes: Contents of the LoRAs, in their order here.
        names: Their names.
        name: Of the file, for errors.
    """
    settings: Mapping[str, Any] = run["settings"]
    joint, neutral = (_lines(settings.get(key, ())) for key in ("joint_prompts", "neutral_prompts"))
    order = run.get("order")
    if order == hashes or not (joint or neutral):
        return settings
    if not isinstance(order, list) or not set(hashes) <= set(order):
        raise _lost(name, "a part of it has joint or neutral prompts, and does not say of which LoRAs")
    try:
        scenes = parse_scenes(joint, neutral, order)
    except IncompatibleError as err:
        raise _lost(name, f"the joint prompts of a part make no sense ({err.what})") from err
    _, kept = scenes_of(scenes, [order.index(one) for one in hashes])
    return settings_with_scenes(settings, kept, names)


def _lines(given: str | Sequence[str]) -> list[str]:
    return given.splitlines() if isinstance(given, str) else list(given)


def _prompts_of(run: Mapping[str, Any], name: str) -> dict[str, tuple[str, ...]]:
    """Prompts of one run by the content of their LoRAs."""
    found = {}
    for sha256, words in run["prompts"]:
        if not isinstance(sha256, str) or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise _lost(name, "the prompts of its runs are damaged")
        found[sha256] = tuple(words)
    if len(found) < len(run["prompts"]):
        raise _lost(name, "a LoRA is in it twice")
    return found


def read_record_use(settings: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], name: str) -> RecordUse | None:
    """What the records were that a calibration is made of; None if it was made by passes.

    Raises:
        FileError: They cannot be made again; says why.
    """
    about = settings.get(RECORDS)
    if about is None:
        return None
    if about.get("extends"):
        raise _lost(name, "it was extended by LoRAs from records")
    passes = about.get("passes", [])
    if not passes or not all("options" in one for one in passes):
        raise _lost(name, "it was put together from records by a version that did not say how large they were")
    if any(one["options"] != passes[0]["options"] for one in passes):
        raise _lost(name, "it was put together from records of different sizes")
    weights = []
    for source, sha256 in zip(sources, _hashes(sources, name), strict=True):
        mine = [one for one in passes if one["sha256"] == sha256]
        if [prompt for one in mine for prompt in one["prompts"]] != list(source.get("prompts", ())):
            raise _lost(name, f"its records of {source['name']} were of other prompts")
        weights.append(tuple(float(one["weight"]) for one in mine))
    try:
        return RecordUse(read_options(passes[0]["options"]), tuple(weights))
    except (KeyError, TypeError, ValueError, CalibrationError) as err:
        raise _lost(name, f"the size of its records makes no sense ({err})") from err


def _hashes(sources: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Contents of the LoRAs, by which runs and records name them."""
    hashes = [one.get("sha256") for one in sources]
    if None in hashes or len(set(hashes)) < len(hashes):
        raise _lost(name, "its LoRAs have no sha256, or one is in it twice")
    return [str(one) for one in hashes]


def _lost(name: str, why: str) -> FileError:
    return FileError(f"its calibration cannot be made again from this: {why}.", file=name, remedy=_KEEP)
