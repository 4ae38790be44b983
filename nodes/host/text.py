"""Prompts through the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sd1_clip
from torch import Tensor

from ...ssr_core import TextRows


@contextmanager
def text_rows(clip: Any, tell: Callable[[TextRows], None]) -> Iterator[list[Tensor]]:
    """While prompts are encoded: tell which rows of each text encoder's input are padding.

    Yields:
        The masks, (sections, T) bool, one for each encoder run.
    """
    masks: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...]) -> None:
        tokens = args[0]
        device = module.execution_device or module.transformer.get_input_embeddings().weight.device
        mask = module.process_tokens(tokens, device)[1].bool()
        tell(TextRows(mask, everywhere=True))
        masks.append(mask.cpu())

    encoders = [m for m in clip.cond_stage_model.modules() if isinstance(m, comfy.sd1_clip.SDClipModel)]
    handles = [encoder.register_forward_pre_hook(before) for encoder in encoders]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def encode(clip: Any, prompt: str) -> list[Any]:
    """A prompt as CONDITIONING."""
    return list(clip.encode_from_tokens_scheduled(clip.tokenize(prompt), show_pbar=False))
