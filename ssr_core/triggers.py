"""What a LoRA file says about the words that call it up, from its header alone."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FileError
from .metadata import KEY

MAX_HEADER = 32 << 20
"""Bytes. Trainers write every caption's tags into the header; no real one comes near this."""
MAX_WORDS, MAX_LENGTH = 40, 200
_PHRASES = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word", "trigger_words", "activation text")
_REPEATS = re.compile(r"^\d+_")


@dataclass(frozen=True)
class TriggerWords:
    """What a file offers as a prompt.

    Attributes:
        phrases: What the trainer named as the trigger, and prompts that a merged file was calibrated with.
        tags: `(tag, how often it was in the captions)`, most frequent first.
        title: The file's own title, if it has one.
    """

    phrases: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    title: str = ""


def header_metadata(path: Path) -> dict[str, str]:
    """String metadata of a safetensors header; no tensor is read.

    Raises:
        FileError: The file is missing, no safetensors file, or its header is too long.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise FileError("this is no safetensors file, or its header is too long.", file=path.name)
            header = json.loads(stream.read(length))
    except OSError as err:
        raise FileError(f"cannot read the file ({err.strerror}).", file=path.name) from err
    except (ValueError, RecursionError) as err:
        raise FileError("its header is damaged.", file=path.name, remedy="download or export it again.") from err
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(metadata, dict):
        return {}
    return {str(name): value for name, value in metadata.items() if isinstance(value, str)}


def trigger_words(metadata: Mapping[str, str]) -> TriggerWords:
    """Trigger words in the metadata that kohya's and other trainers, modelspec and this pack write."""
    phrases = [part for name in _PHRASES for part in _split(metadata.get(name, ""))]
    phrases += _concepts(metadata)
    phrases += _own_prompts(metadata)
    counts: Counter[str] = Counter()
    for tags in _folders(metadata).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            word = _clean(tag)
            if word and isinstance(count, int) and not isinstance(count, bool) and count > 0:
                counts[word] += count
    title = _clean(metadata.get("modelspec.title") or metadata.get("ss_output_name") or "")
    return TriggerWords(
        tuple(dict.fromkeys(phrase for phrase in phrases if phrase))[:MAX_WORDS],
        tuple(counts.most_common(MAX_WORDS)),
        title,
    )


def _folders(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Tags that kohya-style trainers counted, by folder of the data set."""
    value = _json(metadata.get("ss_tag_frequency"))
    return value if isinstance(value, dict) else {}


def _concepts(metadata: Mapping[str, str]) -> Iterator[str]:
    """What folder names call a concept: 10_sks dog -> sks dog; and class tokens of configured data sets."""
    folders = [*_folders(metadata)]
    more = _json(metadata.get("ss_dataset_dirs"))
    folders += [*more] if isinstance(more, dict) else []
    for folder in folders:
        if _REPEATS.match(folder):
            yield _clean(_REPEATS.sub("", folder))
    sets = _json(metadata.get("ss_datasets"))
    for one in sets if isinstance(sets, list) else ():
        subsets = one.get("subsets") if isinstance(one, dict) else None
        for subset in subsets if isinstance(subsets, list) else ():
            yield _clean(subset.get("class_tokens")) if isinstance(subset, dict) else ""


def _own_prompts(metadata: Mapping[str, str]) -> Iterator[str]:
    """Prompts of the LoRAs that a file of this pack was merged from."""
    recipe = _json(metadata.get(KEY))
    sources = recipe.get("sources") if isinstance(recipe, dict) else None
    for source in sources if isinstance(sources, list) else ():
        prompts = source.get("prompts") if isinstance(source, dict) else None
        for prompt in prompts if isinstance(prompts, list) else ():
            yield _clean(prompt)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):  # a stranger's file: then it says nothing
        return None


def _split(text: str) -> list[str]:
    """A phrase, or a JSON list of phrases."""
    value = _json(text)
    return [_clean(item) for item in value] if isinstance(value, list) else [_clean(text)]


def _clean(value: object) -> str:
    """One printable line of bounded length; empty for anything but text."""
    if not isinstance(value, str):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())[:MAX_LENGTH]
