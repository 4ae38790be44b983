"""Records of LoRAs: looked up in the library, made where there are none, merged without a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..ssr_core import (
    RECORD_REMEDY,
    CalibrationError,
    IncompatibleError,
    KeyTarget,
    Recorder,
    RecordFile,
    RecordIdentity,
    RecordLibrary,
    RecordOptions,
    Share,
    SharingError,
    Task,
    check_memory,
    finished,
    records_of,
)
from . import host, paths
from .entries import LoRAEntry
from .loading import Loaded
from .model_info import model_identity
from .options import CalibrationOptions
from .passes import Passes

Missing = Literal["record", "refuse"]
MISSING: tuple[Missing, ...] = ("record", "refuse")
Store = Literal["library", "beside the LoRA"]
STORES: tuple[Store, ...] = ("library", "beside the LoRA")


@dataclass(frozen=True)
class RecordingOptions:
    """How records are looked up and made.

    Attributes:
        record: How much new ones keep.
        missing: What to do about a LoRA without a record.
        store: Where new ones are written.
        exactly: Whether larger ones will not do.
    """

    record: RecordOptions
    missing: Missing = "record"
    store: Store = "library"
    exactly: bool = False


def recording_options(values: Mapping[str, Any]) -> RecordingOptions:
    """Take the settings of records out of a node's inputs."""
    tokens = values.get("sampled_tokens", RecordOptions().sampled_tokens)
    kept = RecordOptions(values["columns"], values["exact_limit"], values["budget_mb"], tokens)
    return RecordingOptions(kept, values.get("missing", "record"), values["store"])


def library() -> RecordLibrary:
    """The library of this installation: its own folder, that of the calibrations, and all folders with LoRAs."""
    root = paths.record_root()
    return RecordLibrary(root, [root.parent, *sorted({host.lora_path(name).parent for name in host.lora_files()})])


@dataclass(frozen=True)
class _Unit:
    """One pass: a LoRA with one prompt, or with the CONDITIONING that replaces its prompts."""

    index: int
    entry: LoRAEntry
    task: Task
    identity: RecordIdentity


@dataclass(frozen=True)
class Recorded:
    """The records of a set of LoRAs.

    Attributes:
        shares: For each LoRA, one for each pass.
        made: How many passes had to be run.
        found: How many records were there.
        files: The new ones.
    """

    shares: tuple[tuple[Share, ...], ...]
    made: int
    found: int
    files: tuple[RecordFile, ...] = ()

    def sentence(self) -> str:
        """What was found and made, in words."""
        return f"Records: {self.found} found, {self.made} made by a pass of their own."


def obtain(
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    calibration: CalibrationOptions,
    options: RecordingOptions,
    progress: host.Progress,
    known: RecordLibrary | None = None,
) -> Recorded:
    """A record for every prompt of every LoRA, each made with that LoRA alone.

    Args:
        loaded: The LoRAs.
        model: The MODEL.
        clip: The CLIP, if one is connected.
        calibration: How to sample.
        options: What to do about LoRAs without a record.
        progress: Shows the passes.
        known: Where to look and to write; None for the installation's library.

    Raises:
        CalibrationError: A record is missing and may not be made (says why the nearest does not do), or a
            pass failed.
        MemoryBudgetError: The sketches would not fit.
        FileError: A record cannot be written.
    """
    where = known or library()
    units = _units(loaded, model, clip, calibration)
    least = options.record if options.missing == "record" else None
    files = [where.find(unit.identity, least, exactly=options.exactly) for unit in units]
    absent = [unit for unit, file in zip(units, files, strict=True) if file is None]
    if absent and options.missing == "refuse":
        first, count = absent[0], "1 pass has" if len(absent) == 1 else f"{len(absent)} passes have"
        raise CalibrationError(
            f"{count} no record; {where.nearest(first.identity)}.",
            file=first.entry.name,
            remedy="use the settings of the records, or set missing to record.",
        )
    made = iter(_make(loaded, absent, model, clip, calibration, options, progress, where))
    complete = [next(made) if file is None else file for file in files]
    shares: list[list[Share]] = [[] for _ in loaded.tasks]
    for unit, file in zip(units, complete, strict=True):
        shares[unit.index].append(Share(file))
    new = tuple(file for file, old in zip(complete, files, strict=True) if old is None)
    return Recorded(tuple(map(tuple, shares)), len(absent), len(units) - len(absent), new)


def _units(loaded: Loaded, model: Any, clip: Any | None, options: CalibrationOptions) -> list[_Unit]:
    latent = options.latent_for(model)
    settings: dict[str, object] = {
        "seed": options.seed,
        "sigmas": options.sigmas_for(model)[:-1].tolist(),
        "latent": list(latent.shape),
        "padding": options.padding,
        **options.latent_content(model),
    }
    identity = model_identity(model)
    text = "" if clip is None else model_identity(clip.patcher)
    units = []
    for index, (entry, task) in enumerate(zip(loaded.entries, loaded.tasks, strict=True)):
        for one in _split(entry):
            single = replace(task, prompts=one.identity)
            encoded = one.conditioning is None or single.strength_clip != 0
            made_of = RecordIdentity(records_of([single])[0], identity, text if encoded else "", settings)
            units.append(_Unit(index, one, single, made_of))
    return units


def _split(entry: LoRAEntry) -> list[LoRAEntry]:
    if entry.conditioning is not None:
        return [entry]
    return [replace(entry, prompts=(prompt,)) for prompt in entry.prompts]


def _make(
    loaded: Loaded,
    units: Sequence[_Unit],
    model: Any,
    clip: Any | None,
    calibration: CalibrationOptions,
    options: RecordingOptions,
    progress: host.Progress,
    where: RecordLibrary,
) -> list[RecordFile]:
    if not units:
        return []
    single = Loaded(
        tuple(unit.entry for unit in units),
        tuple(unit.task for unit in units),
        loaded.key_map,
        tuple(loaded.tensors[unit.index] for unit in units),
    )
    passes = Passes(single, model, clip, calibration, progress)
    files = []
    for number, unit in enumerate(units):
        layers = {}
        for recorder in _run(passes, number, unit, loaded.key_map, model, calibration, options.record):
            layers.update(recorder.factors(host.check_cancel))
        kept = finished(layers, options.record)
        files.append(where.save(unit.identity, options.record, kept, _folder(unit.entry, options.store)))
    return files


def _run(
    passes: Passes,
    number: int,
    unit: _Unit,
    key_map: Mapping[str, KeyTarget],
    model: Any,
    calibration: CalibrationOptions,
    options: RecordOptions,
) -> list[Recorder]:
    recorders = [Recorder(unit.task, key_map, part, options, calibration.padding) for part in ("model", "clip")]
    budgets = host.memory_budgets(model.load_device, calibration.memory_budget_gb)
    for recorder in recorders:
        check_memory(recorder.need(), *budgets, remedy=RECORD_REMEDY)
    try:
        passes.run(number, *recorders)
    except SharingError:  # a model whose layers share an input in one step and not in the next
        for recorder in recorders:
            recorder.collector.share = False
        passes.run(number, *recorders)
    return recorders


def _folder(entry: LoRAEntry, store: Store) -> Path | None:
    if store == "library":
        return None
    if entry.file is None:
        raise IncompatibleError(
            "it comes over a link and has no folder.", file=entry.name, remedy="set store to library."
        )
    return host.lora_path(entry.file).parent
