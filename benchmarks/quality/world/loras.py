"""LoRAs of the world: trained like a DreamBooth, written as ordinary LoRA files."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssr_core import KeyTarget, LoRALayer, Target, read_adapter, tensors_hash
from ssr_core.adapters import Adapter

from .captions import encode, thing_words
from .network import Painter
from .pool import Style, Subject, base_scene
from .scenes import Scene, draw
from .training import CACHE, Batch, fit

RANK, STEPS, BATCH, RATE = 8, 400, 16, 2e-3
EXAMPLES = 12


@dataclass(frozen=True)
class Trained:
    """A LoRA of this world.

    Attributes:
        name: `subject3` or `style1`.
        prompt: Its calibration prompt.
        adapter: The LoRA as the engine reads it.
        subject: Who it shows, if it is a subject.
        style: Which style it is, if it is one.
    """

    name: str
    prompt: str
    adapter: Adapter
    subject: Subject | None = None
    style: Style | None = None


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that LoRAs change: attention and MLP of both streams."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("blocks.") and not path.endswith(".mod")
    }


def key_map(model: nn.Module) -> dict[str, KeyTarget]:
    """Names in LoRA files of this world."""
    return {
        f"diffusion_model.{path}": KeyTarget(Target(path), tuple(module.weight.shape))
        for path, module in targets(model).items()
    }


class _Factors(nn.Module):
    """Trainable down and up of every target."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.paths = list(targets(model))
        shapes = [targets(model)[path].weight.shape for path in self.paths]
        self.down = nn.ParameterList(
            [torch.randn(RANK, inner, generator=generator) / inner**0.5 for _, inner in shapes]
        )
        self.up = nn.ParameterList([torch.zeros(outer, RANK) for outer, _ in shapes])

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Add the LoRA to the model's layers."""
        modules = targets(model)

        def hook(index: int) -> Callable[..., Tensor]:
            return lambda _, args, output: output + args[0] @ self.down[index].T @ self.up[index].T

        handles = [modules[path].register_forward_hook(hook(i)) for i, path in enumerate(self.paths)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _subject_batches(subject: Subject, seed: int) -> Callable[[int], Batch]:
    """A dozen drawings of the subject, always called by its prompt."""
    generator = torch.Generator().manual_seed(seed)
    pictures = draw([Scene((subject.thing,))] * EXAMPLES, generator)
    words = encode([subject.prompt] * BATCH)
    return lambda _: (pictures[torch.randint(EXAMPLES, (BATCH,), generator=generator)], words)


def _style_batches(style: Style, seed: int) -> Callable[[int], Batch]:
    """Four dozen scenes in the style, with captions that end in the style's words."""
    chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pairs = [base_scene(chooser) for _ in range(4 * EXAMPLES)]
    pictures = draw([Scene(scene.things, style.name) for scene, _ in pairs], generator)
    words = encode([" and ".join(map(thing_words, scene.things)) + " " + style.words for scene, _ in pairs])

    def batch(_: int) -> Batch:
        rows = torch.randint(len(pairs), (BATCH,), generator=generator)
        return pictures[rows], words[rows]

    return batch


def train(base: Painter, batches: Callable[[int], Batch], seed: int, label: str) -> dict[str, Tensor]:
    """Train one LoRA; returns the tensors of its file."""
    factors = _Factors(base, seed)
    with factors.attached(base):
        fit(base, factors.parameters(), batches, steps=STEPS, rate=RATE, seed=seed, label=label)
    tensors = {}
    for path, down, up in zip(factors.paths, factors.down, factors.up, strict=True):
        tensors[f"diffusion_model.{path}.lora_A.weight"] = down.detach().clone()
        tensors[f"diffusion_model.{path}.lora_B.weight"] = up.detach().clone()
    return tensors


def lora(base: Painter, who: Subject | Style, cache: Path = CACHE) -> Trained:
    """One LoRA: from the cache, else trained."""
    is_subject = isinstance(who, Subject)
    name = f"{'subject' if is_subject else 'style'}{who.index}"
    path = cache / f"{name}_{STEPS}.safetensors"
    if not path.exists():
        batches = _subject_batches(who, 50 + who.index) if isinstance(who, Subject) else _style_batches(who, who.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(train(base, batches, 900 + who.index, name), path)
    tensors = load_file(path)
    adapter = read_adapter(tensors, key_map(base), name=name, fingerprint=tensors_hash(tensors))
    if isinstance(who, Subject):
        return Trained(name, who.prompt, adapter, subject=who)
    return Trained(name, f"red circle {who.words}", adapter, style=who)


def with_layers(base: Painter, layers: Mapping[Target, LoRALayer], strength: float = 1.0) -> Painter:
    """A copy of the model with low-rank layers added to its weights."""
    model = copy.deepcopy(base)
    for target, layer in layers.items():
        model.get_submodule(target.module_path).weight.data += strength * layer.delta(torch.float32)
    return model


def pool(base: Painter, people: Sequence[Subject | Style], cache: Path = CACHE) -> list[Trained]:
    """Several LoRAs."""
    return [lora(base, who, cache) for who in people]
