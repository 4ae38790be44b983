"""Calibrations changed without running them again: LoRAs that leave and join, runs that add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..ssr_core import Calibration, IncompatibleError, combine, extend, from_records, rounds_of, without
from ..ssr_core.words import number_of
from . import host, pipeline
from .entries import LoRAEntries, LoRAEntry
from .loading import load
from .options import CUSTOM_LATENT, CalibrationOptions
from .record_weights import record_notes
from .recording import RecordingOptions, obtain


def parse_drop(text: str, calibration: Calibration) -> list[int]:
    """LoRAs to drop, one a line: by number (from 1) or by name, with or without folder and extension.

    Raises:
        IncompatibleError: No such LoRA, or a name that several have.
    """
    chosen = []
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        names = [record.name for record in calibration.tasks]
        found = [i for i, name in enumerate(names) if line in (name, Path(name).name, Path(name).stem)]
        if line.isdigit() and not found:
            found = [int(line) - 1] if 0 < int(line) <= len(names) else []
        if len(found) != 1:
            listed = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1))
            problem = "several LoRAs are called" if found else "the calibration has no LoRA"
            raise IncompatibleError(f"{problem} {line!r}.", remedy=f"write a number or a name of: {listed}.")
        chosen += found
    return chosen


def drop(socket: pipeline.CalibrationSocket, text: str) -> tuple[pipeline.CalibrationSocket, list[str]]:
    """A calibration without some of its LoRAs, and what its report says."""
    calibration = socket.calibration
    gone = parse_drop(text, calibration)
    if not gone:
        return socket, []
    left = without(calibration, gone)
    entries = _entries_of(left, [socket])
    fingerprints = {record.fingerprint for record in left.tasks}
    converted = tuple(adapter for adapter in socket.converted if adapter.fingerprint in fingerprints)
    made = pipeline.socket_of(left)
    lost = len(calibration.scenes) - len(left.scenes)
    notes = [f"{number_of(lost, 'joint prompt is', 'joint prompts are')} gone with the LoRAs."] if lost else []
    if rounds_of(calibration.settings) > 1:
        notes.append("Further rounds of it ran on merges that had these LoRAs: what they saw is an approximation now.")
    return pipeline.CalibrationSocket(left, entries, made.tensors, converted), notes


def join(
    socket: pipeline.CalibrationSocket,
    new: LoRAEntries,
    model: Any,
    clip: Any | None,
    options: RecordingOptions,
    latent: Mapping[str, Any] | None,
    sigmas: Tensor | None,
    progress: host.Progress,
) -> tuple[pipeline.CalibrationSocket, list[str]]:
    """A calibration with further LoRAs, from records; what it knew exactly stays.

    Args:
        socket: The calibration.
        new: LoRAs that join.
        model: The MODEL that it was made with.
        clip: The CLIP, if one was there.
        options: What to do about LoRAs without a record.
        latent: LATENT, if the calibration was made with one.
        sigmas: SIGMAS, if the calibration was made with them.
        progress: Shows the passes.

    Returns:
        The calibration, and what its report says.
    """
    entries = (*pipeline.entries_of(socket, ()), *new)
    loaded = load(entries, model, clip, progress, socket.known(model))
    sampling = sampling_of(socket.calibration, latent, sigmas)
    notes = check_connected(socket.calibration, sampling, model)
    found = obtain(loaded, model, clip, sampling, options, progress)
    guess = from_records(loaded.tasks, found.shares, tick=lambda done, total: host.check_cancel())
    about = {**cast(Mapping[str, Any], guess.settings["records"]), "extends": True}
    settings = {**socket.calibration.settings, **guess.settings, "joint_prompts": [], "neutral_prompts": []}
    joined = replace(extend(socket.calibration, guess), settings={**settings, "records": about})
    notes = [*record_notes(found, joined.settings), *notes]
    if rounds_of(socket.calibration.settings) > 1:
        notes.append("The new LoRAs were in none of its further rounds: what these saw is an approximation now.")
    lost = len(socket.calibration.scenes)
    if lost:
        notes.append(
            f"{number_of(lost, 'joint or neutral prompt is', 'joint or neutral prompts are')} gone: what the new LoRAs read under them is not known."
        )
    return pipeline.socket_of(joined, loaded), notes


def sampling_of(
    calibration: Calibration, latent: Mapping[str, Any] | None, sigmas: Tensor | None
) -> CalibrationOptions:
    """The settings with which a calibration was made.

    Raises:
        IncompatibleError: It does not say, or was made with a LATENT or SIGMAS that are not connected.
    """
    settings: Mapping[str, Any] = calibration.settings
    for name, given in (("latent", latent), ("sigmas", sigmas)):
        if settings.get(f"custom_{name}") and given is None:
            raise IncompatibleError(
                f"the calibration was made with {name.upper()} of its own.", remedy=f"connect the same to {name}."
            )
    try:
        return CalibrationOptions(
            seed=settings["seed"],
            steps=settings["steps"],
            width=settings["width"],
            height=settings["height"],
            frames=settings["frames"],
            scheduler=settings["scheduler"],
            padding=settings["padding"],
            memory_budget_gb=0.0,
            latent=latent,
            sigmas=sigmas,
        )
    except KeyError as err:
        raise IncompatibleError(
            f"the calibration does not say with which {err} it was made (sums of different runs do not).",
            remedy="add LoRAs to its parts before combining them, or calibrate again.",
        ) from err


def check_connected(calibration: Calibration, sampling: CalibrationOptions, model: Any) -> list[str]:
    """Refuse another LATENT or other SIGMAS than the calibration was made with, before any pass is run.

    Returns:
        What cannot be checked, in words.

    Raises:
        IncompatibleError: Says which of the two differs.
    """
    settings: Mapping[str, Any] = calibration.settings
    sigmas, latent = sampling.sigmas_for(model)[:-1].tolist(), sampling.latent_for(model)
    if settings.get("sigmas", sigmas) != sigmas:
        raise IncompatibleError(
            f"its noise levels were {settings['sigmas']}, these are {sigmas}.",
            remedy="connect the SIGMAS and the MODEL that it was made with.",
        )
    known = settings.get(CUSTOM_LATENT)
    same_shape = settings.get("latent", list(latent.shape)) == list(latent.shape)
    if not same_shape or (known is not None and sampling.latent_content(model) != {CUSTOM_LATENT: known}):
        raise IncompatibleError(
            "it was made with another LATENT.", remedy="connect the LATENT that was connected to SSR Calibrate."
        )
    if settings.get("custom_latent") and known is None:
        return [
            "The calibration is of an earlier version and does not say what its LATENT held: whether it is the one that "
            "is connected now was checked by its shape alone."
        ]
    return []


def combined(
    sockets: Sequence[pipeline.CalibrationSocket], weights: Sequence[float] | None
) -> pipeline.CalibrationSocket:
    """The sum of calibrations, with the LoRAs that their links know."""
    calibration = combine([one.calibration for one in sockets], weights)
    made = pipeline.socket_of(calibration)
    known = next((one.converted for one in sockets if one.converted), ())
    return pipeline.CalibrationSocket(calibration, _entries_of(calibration, sockets), made.tensors, known)


def lost_samples(calibration: Calibration, parts: Sequence[Calibration]) -> bool:
    """Whether a sum lacks sampled inputs that some of its parts have."""
    had = any(stats.samples is not None for one in parts for stats in one.stats.values())
    return had and any(stats.samples is None and stats.complete for stats in calibration.stats.values())


def _entries_of(calibration: Calibration, sockets: Sequence[pipeline.CalibrationSocket]) -> LoRAEntries:
    """The LoRAs as linked; none if one of them came from a file, to be found by its content then."""
    linked = {entry.sha256: entry for socket in sockets for entry in socket.entries}
    found: list[LoRAEntry] = []
    for record in calibration.tasks:
        entry = linked.get(record.fingerprint)
        if entry is None:
            return ()
        same = entry.identity == record.prompts
        found.append(entry if same else replace(entry, prompts=record.prompts, conditioning=None))
    return tuple(found)


def parse_weights(text: str, count: int) -> list[float] | None:
    """Numbers, by spaces, commas or lines; None for an empty text.

    Raises:
        IncompatibleError: No numbers, or not one for each calibration.
    """
    words = text.replace(",", " ").split()
    if not words:
        return None
    try:
        weights = [float(word) for word in words]
    except ValueError as err:
        raise IncompatibleError(f"{text!r} are no weights.", remedy="write numbers like 1 0.5.") from err
    if len(weights) != count:
        raise IncompatibleError(
            f"{len(weights)} weights for {count} calibrations.", remedy="write one for each, or leave it empty."
        )
    return weights
