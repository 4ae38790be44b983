"""What SSR LoRA nodes hand over: which LoRA, how strong, calibrated with what."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ssr_core import (
    ConvertOptions,
    FileError,
    IncompatibleError,
    TaskRecord,
    content_hash,
    read_safetensors,
    tensors_hash,
)
from ..ssr_core.files import UNREADABLE
from ..ssr_core.words import number_of
from . import host

_STRENGTH = "use one or two numbers between -100 and 100, like 0.8 or 0.8 0.5."


@dataclass(frozen=True)
class LoRAEntry:
    """One LoRA of a graph.

    Attributes:
        name: What reports call it.
        sha256: Hash of the content when the node ran.
        strength_model: Strength on the diffusion model.
        strength_clip: Strength on the text encoder.
        prompts: Calibration prompts.
        conditioning: Replaces the prompts for the diffusion model.
        file: Name in the loras folders, if it comes from a file.
        tensors: Its tensors, if it comes from a LORA_MODEL.
        convert: How changes that are not low-rank are converted.
    """

    name: str
    sha256: str
    strength_model: float
    strength_clip: float
    prompts: tuple[str, ...]
    conditioning: list[Any] | None = field(default=None, repr=False)
    file: str | None = None
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)
    convert: ConvertOptions = field(default_factory=ConvertOptions)

    @property
    def identity(self) -> tuple[str, ...]:
        """The prompts, or the content of the conditioning that replaces them."""
        if self.conditioning is None:
            return self.prompts
        return (*self.prompts, f"conditioning:{conditioning_hash(self.conditioning)[:16]}")

    def load(self) -> dict[str, Tensor]:
        """The LoRA's tensors, with the host's renaming of special formats.

        Raises:
            FileError: The file changed since the node ran, or is no LoRA file.
        """
        if self.tensors is not None:
            return host.convert_names(dict(self.tensors))
        assert self.file is not None
        path = host.lora_path(self.file)
        if file_hash(path) != self.sha256:
            raise FileError("the file changed while the graph ran.", file=self.name, remedy="run again.")
        return host.convert_names(read_safetensors(path)[0])

    def with_strengths(self, model: float, clip: float) -> LoRAEntry:
        """The same LoRA at other strengths."""
        return replace(self, strength_model=model, strength_clip=clip)


LoRAEntries = tuple[LoRAEntry, ...]


def file_hash(path: Path) -> str:
    """Content hash of a file; read again only if its time or size changed."""
    try:
        stat = path.stat()
    except OSError as err:
        raise FileError(f"cannot read the file ({err.strerror}).", file=path.name, remedy=UNREADABLE) from err
    return _hash_of_version(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=512)
def _hash_of_version(path: str, mtime_ns: int, size: int) -> str:
    return content_hash(Path(path))


def conditioning_hash(conditioning: Sequence[Any]) -> str:
    """Hash of all tensors of a CONDITIONING."""
    tensors: dict[str, Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value if value.is_floating_point() else value.to(torch.float64)
        elif isinstance(value, Mapping):
            for key in value:
                collect(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                collect(f"{name}.{index}", item)
        elif isinstance(value, int | float):
            tensors[name] = torch.tensor(float(value), dtype=torch.float64)
        elif isinstance(value, str):
            tensors[name + "=" + value] = torch.zeros(1)
        elif value is not None:  # a control net, hooks: known by their kind only
            tensors[f"{name}:{type(value).__name__}"] = torch.zeros(1)

    collect("", conditioning)
    return tensors_hash(tensors)


def prompt_lines(text: str) -> tuple[str, ...]:
    """One prompt a line; blank lines are dropped; an empty text is one empty prompt."""
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def entry_from_file(
    file: str, strength_model: float, strength_clip: float, prompts: tuple[str, ...], conditioning: list[Any] | None
) -> LoRAEntry:
    """An entry for a listed LoRA file."""
    sha256 = file_hash(host.lora_path(file))
    return LoRAEntry(file, sha256, strength_model, strength_clip, prompts, conditioning, file=file)


def entry_from_tensors(
    tensors: Mapping[str, Tensor],
    strength_model: float,
    strength_clip: float,
    prompts: tuple[str, ...],
    conditioning: list[Any] | None,
) -> LoRAEntry:
    """An entry for core's LORA_MODEL."""
    sha256 = tensors_hash(tensors)
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}  # a trainer leaves them on its device
    name = f"LORA_MODEL {sha256[:8]}"
    return LoRAEntry(name, sha256, strength_model, strength_clip, prompts, conditioning, tensors=on_cpu)


def entries_from_stack(stack: Sequence[Any], prompts: str) -> LoRAEntries:
    """Entries for other packs' LORA_STACK: `(name, strength_model, strength_clip)` each, one prompt line for each.

    Raises:
        IncompatibleError: An element is no such triple, or the number of prompt lines differs.
    """
    lines = prompt_lines(prompts)
    names = [item[0] if isinstance(item, list | tuple) and item else item for item in stack]
    if len(lines) != len(stack):
        raise IncompatibleError(
            f"the stack holds {number_of(len(stack), 'LoRA')} ({', '.join(map(str, names))}), the prompts have "
            f"{number_of(len(lines), 'line')}.",
            remedy="write one line for each LoRA of the stack, in its order.",
        )
    entries = []
    for item, line in zip(stack, lines, strict=True):
        if not isinstance(item, list | tuple) or len(item) < 3 or not isinstance(item[0], str):
            raise IncompatibleError(
                f"an element of the stack is {item!r}, not (name, strength_model, strength_clip).",
                remedy="connect a LORA_STACK of three-tuples.",
            )
        entries.append(entry_from_file(item[0], float(item[1]), float(item[2]), (line,), None))
    return tuple(entries)


def flatten(groups: Mapping[str, LoRAEntries] | None) -> LoRAEntries:
    """All entries of growing sockets, in socket order."""
    return tuple(entry for group in (groups or {}).values() if group for entry in group)


def entry_from_record(record: TaskRecord) -> LoRAEntry:
    """Find the LoRA file that a saved calibration speaks of: by its name, in any folder, checked by content.

    Raises:
        FileError: No file of this name has this content.
    """
    base = Path(record.name).name
    # Only files of the same name are hashed: a library of hundreds of LoRAs would take minutes.
    for file in sorted(host.lora_files(), key=lambda other: other != record.name):
        if Path(file).name == base and file_hash(host.lora_path(file)) == record.fingerprint:
            return LoRAEntry(
                file,
                record.fingerprint,
                record.strength_model,
                record.strength_clip,
                record.prompts,
                file=file,
                # a record without options was made of a LoRA that was not converted
                convert=record.convert_options or ConvertOptions(max_rank=0),
            )
    raise FileError(
        f"no LoRA file of this name has the content that was calibrated (sha256 {record.fingerprint[:16]}…).",
        file=record.name,
        remedy="put the file back into a loras folder, connect it as SSR LoRA to loras, or calibrate again.",
    )


def parse_strengths(text: str, entries: LoRAEntries) -> LoRAEntries:
    """Apply lines like `0.8` or `0.8 0.5` (model, clip) to the LoRAs in order; an empty text changes nothing.

    Raises:
        IncompatibleError: Another number of lines than LoRAs, or no number.
    """
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return entries
    if len(lines) != len(entries):
        raise IncompatibleError(
            f"{number_of(len(lines), 'strength')} for {number_of(len(entries), 'LoRA')} ({', '.join(entry.name for entry in entries)}).",
            remedy="write one line for each LoRA, in order: strength, or model and clip strength.",
        )
    changed = []
    for line, entry in zip(lines, entries, strict=True):
        try:
            values = [float(word) for word in line.replace(",", " ").split()]
        except ValueError as err:
            raise IncompatibleError(f"{line!r} is no strength.", file=entry.name, remedy=_STRENGTH) from err
        if len(values) not in (1, 2) or not all(abs(value) <= 100 for value in values):
            raise IncompatibleError(f"{line!r} is no strength.", file=entry.name, remedy=_STRENGTH)
        changed.append(entry.with_strengths(values[0], values[-1]))
    return tuple(changed)
