"""Records on disk: safetensors with half-precision factors, checked when they are read, layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import atomic_path
from ..errors import CalibrationError, FileError
from ..files import json_text, open_safetensors, write_safetensors
from ..finite import all_finite
from ..targets import Target
from .budget import distinct
from .factor import InputFactor
from .identity import RECORD_VERSION, RecordIdentity
from .record_header import checked_factor, read_identity, read_options
from .record_parts import crc, fits, packed, unpacked
from .sketch import RecordOptions

FORMAT = "ssr_record"
"""Metadata key of the header: its sha256, a space, JSON. One key, so that equal records are equal files."""

SUFFIX = ".ssrrecord"
"""Not .safetensors: ComfyUI would list records beside their LoRAs as LoRAs."""
_AGAIN = "delete it and record the LoRA again."
_RETRY = "another process writes or cleans this library; run it again, which finds or makes the record."
_DAMAGE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    CalibrationError,
    RuntimeError,
    RecursionError,
)


def save_record(
    path: Path, identity: RecordIdentity, options: RecordOptions, layers: Mapping[Target, InputFactor]
) -> None:
    """Write a record; `path` is either complete or as it was. A record of the same run is replaced.

    Raises:
        FileError: The disk is full, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    factors = []
    for index, (factor, targets) in enumerate(distinct(layers)):
        parts = {"columns": factor.columns.to(torch.float16), "norms": factor.norms.to(torch.float32)}
        parts |= {} if factor.sample is None else packed(factor.sample)
        factors.append(
            {
                "own": factor.own,
                "trace": factor.trace,
                "tokens": factor.tokens,
                "nonfinite": factor.nonfinite,
                "bfloat16": factor.sample is not None and factor.sample.rows.dtype == torch.bfloat16,
                "layers": [[target.part, target.module_path] for target in targets],
                "crc32": {name: crc(part) for name, part in parts.items()},
            }
        )
        tensors.update({f"{index}.{name}": part for name, part in parts.items()})
    header = json_text(
        {
            "version": RECORD_VERSION,
            "task": asdict(identity.task),
            "model": identity.model,
            "text_encoder": identity.text_encoder,
            "settings": identity.settings,
            "options": asdict(options),
            "factors": factors,
        }
    )
    digest = hashlib.sha256(header.encode()).hexdigest()
    with atomic_path(path, overwrite=True) as temporary:
        write_safetensors(temporary, tensors, {FORMAT: f"{digest} {header}"})


@dataclass(frozen=True)
class RecordFile:
    """A record whose header has been read and checked; factors are read when they are asked for.

    Attributes:
        path: The file.
        identity: What it was made of.
        options: How much it keeps.
    """

    path: Path
    identity: RecordIdentity
    options: RecordOptions
    _factors: tuple[dict[str, Any], ...] = field(repr=False)
    _digest: str = field(repr=False)

    @cached_property
    def places(self) -> dict[Target, int]:
        """Which factor each layer reads."""
        return {
            Target(str(module), None, part): index
            for index, factor in enumerate(self._factors)
            for part, module in factor["layers"]
        }

    def layers(self) -> dict[Target, InputFactor]:
        """All factors."""
        with self.reading() as read:
            return {target: factor for target in self.places if (factor := read(target)) is not None}

    def reading(self) -> RecordReader:
        """A context in which single layers are read from the open file.

        The file stays open and the same, whoever puts another one into its place meanwhile.
        """
        return RecordReader(self)

    def check_same(self, metadata: Mapping[str, str]) -> None:
        """Refuse a file that took this one's place since its header was read.

        Raises:
            FileError: Its header is another one.
        """
        if metadata.get(FORMAT, "").partition(" ")[0] != self._digest:
            raise FileError("the record was replaced since it was looked up.", file=self.path.name, remedy=_RETRY)

    def parts(self, index: int) -> list[str]:
        """Names of a factor's tensors."""
        return list(self._factors[index]["crc32"])

    def check(self, index: int, parts: Mapping[str, Tensor]) -> InputFactor:
        """A factor from its tensors.

        Raises:
            FileError: They are not those that were written.
        """
        entry, path = self._factors[index], self.path
        name = str(entry["layers"][0][1])
        sums = {part: crc(value) for part, value in parts.items()}
        if sums != entry["crc32"] or not all(fits(parts)) or not all(all_finite(one) for one in parts.values()):
            raise FileError("the record's values are damaged.", file=path.name, layer=name, remedy=_AGAIN)
        return InputFactor(
            parts["columns"],
            parts["norms"],
            entry["own"],
            entry["trace"],
            entry["tokens"],
            entry["nonfinite"],
            None if "rows" not in parts else unpacked(parts, entry["bfloat16"]),
        )


class RecordReader:
    """Reads factors of one record while its file is open; those that layers share are read once."""

    def __init__(self, record: RecordFile) -> None:
        self._record, self._stack = record, ExitStack()
        self._last: tuple[int, InputFactor] | None = None
        self._file: Any = None

    def __enter__(self) -> RecordReader:
        """Open the file.

        Raises:
            FileError: It was removed or replaced since its header was read, or cannot be read any more.
        """
        if not self._record.path.exists():
            raise FileError(
                "the record was removed since it was looked up.", file=self._record.path.name, remedy=_RETRY
            )
        with ExitStack() as opened:
            self._file = opened.enter_context(open_safetensors(self._record.path))
            self._record.check_same(self._file.metadata() or {})
            self._stack = opened.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def __call__(self, target: Target) -> InputFactor | None:
        """The factor of one module; None if the layer never ran."""
        index = self._record.places.get(target)
        if index is None:
            return None
        if self._last is None or self._last[0] != index:
            names = self._record.parts(index)
            self._last = index, self._record.check(index, {n: self._file.get_tensor(f"{index}.{n}") for n in names})
        return self._last[1]


def open_record(path: Path) -> RecordFile:
    """Read a record's header.

    Raises:
        FileError: No record, of another version, or damaged; says which.
    """
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
    if FORMAT not in metadata:
        raise FileError("this is no SSR record.", file=path.name, remedy="choose a file that SSR Record wrote.")
    try:
        digest, _, text = metadata[FORMAT].partition(" ")
        header = json.loads(text)
        version = header["version"]
        if version != RECORD_VERSION:
            raise FileError(
                f"record format {version}, this version reads {RECORD_VERSION}.",
                file=path.name,
                remedy="record the LoRA again, or update SSR-Merge.",
            )
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError("its header was changed")
        identity = read_identity(header)
        factors = tuple(checked_factor(entry) for entry in header["factors"])
        return RecordFile(path, identity, read_options(header["options"]), factors, digest)
    except FileError:
        raise
    except _DAMAGE as err:
        raise FileError(f"the record is damaged ({type(err).__name__}: {err}).", file=path.name, remedy=_AGAIN) from err
