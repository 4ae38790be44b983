"""What a record was made of, and why another one is not the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..files import json_text
from ..records import TaskRecord

RECORD_VERSION = 1


@dataclass(frozen=True)
class RecordIdentity:
    """Everything that a LoRA's layer inputs depend on.

    Attributes:
        task: The LoRA by content, its strengths, and the prompts of this one pass.
        model: Identity of the model.
        text_encoder: Identity of the text encoder that made the conditioning; empty where none did.
        settings: Seed, sigmas, latent, padding, as plain JSON values.
    """

    task: TaskRecord
    model: str
    text_encoder: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What decides, by what messages call it; names of files do not count."""
        return {
            "LoRA content": self.task.fingerprint,
            "model": self.model,
            "text encoder": self.text_encoder,
            "strength": [self.task.strength_model, self.task.strength_clip],
            "prompts": list(self.task.prompts),
            "conversion": None if self.task.convert_options is None else asdict(self.task.convert_options),
            **{name: self.settings[name] for name in sorted(self.settings)},
        }

    @property
    def key(self) -> str:
        """Hash of the facts: under it a library finds the record."""
        return hashlib.sha256(json_text([RECORD_VERSION, self.facts()]).encode()).hexdigest()[:32]

    def differences(self, other: RecordIdentity) -> list[str]:
        """What differs, in words, the weightiest first."""
        mine, theirs = self.facts(), other.facts()
        found = []
        for name in dict.fromkeys([*mine, *theirs]):
            here, there = mine.get(name), theirs.get(name)
            if here != there:
                hashed = name in ("LoRA content", "model", "text encoder")
                found.append(name if hashed else f"{name} {json_text(there)} instead of {json_text(here)}")
        return found


def shared_pass(first: RecordIdentity, second: RecordIdentity) -> list[str]:
    """What keeps records of different LoRAs out of one merge: other models or other noise."""
    passes = [RecordIdentity(first.task, one.model, one.text_encoder, one.settings) for one in (first, second)]
    off = passes[0].differences(passes[1])
    # a CONDITIONING that was given needs no text encoder
    return off if first.text_encoder and second.text_encoder else [one for one in off if one != "text encoder"]
