"""Reading files that come from strangers, and what goes into files of our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import FileError

MAX_TENSORS = 200_000
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
UNREADABLE = "check that it is there and that ComfyUI may read it."
_CHUNK = 1 << 22


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes, as a hex string."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                digest.update(block)
    except OSError as err:
        raise FileError(f"cannot read the file ({err.strerror}).", file=path.name, remedy=UNREADABLE) from err
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors that have no file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(safetensors.torch.save({"t": tensor}))
    return digest.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and nothing else.

    Returns:
        Tensors by key (on the CPU) and the string metadata of the header.

    Raises:
        FileError: The file is missing, a pickle, truncated or otherwise not safetensors.
    """
    with open_safetensors(path) as file:
        names = list(file.keys())
        if len(names) > MAX_TENSORS:
            raise FileError(f"{len(names)} tensors are more than any LoRA has.", file=path.name)
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one, and nothing else.

    Yields:
        safetensors' own handle, with `keys`, `metadata` and `get_tensor`.

    Raises:
        FileError: As `read_safetensors`, while the block runs too.
    """
    _refuse_strangers(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, ValueError, OSError) as err:
        raise FileError(
            f"not a whole safetensors file ({err}).", file=path.name, remedy="download or export it again."
        ) from err


def _refuse_strangers(path: Path) -> None:
    if not path.is_file():
        raise FileError("the file does not exist.", file=str(path), remedy="choose a file from the list.")
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError as err:
        raise FileError(f"cannot read the file ({err.strerror}).", file=path.name, remedy=UNREADABLE) from err
    # A safetensors header opens with "{" after its length, and that length may spell a pickle's magic.
    magic = head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"
    if (magic and head[8:] != b"{") or path.suffix.lower() in PICKLE_SUFFIXES:
        raise FileError(
            "this is a pickle, which can run code when it is opened; it is refused.",
            file=path.name,
            remedy="convert it to safetensors with a tool that you trust.",
        )


def read_metadata(path: Path) -> dict[str, str]:
    """String metadata of a safetensors file, without its tensors.

    Raises:
        FileError: The file is missing or not safetensors.
    """
    if not path.is_file():
        raise FileError("the file does not exist.", file=str(path), remedy="check the path.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, ValueError, OSError) as err:
        raise FileError(
            f"not a whole safetensors file ({err}).", file=path.name, remedy="download or export it again."
        ) from err


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to `path` (use inside `atomic_path`)."""
    try:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, dict(metadata)
        )
    except (safetensors.SafetensorError, OSError, RuntimeError) as err:
        raise FileError(f"writing failed ({err}).", file=str(path), remedy="check the free disk space.") from err


def json_text(value: object) -> str:
    """JSON with stable key order, for metadata and fingerprints."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
