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

from ssr_core import KeyTarget, Target, read_adapter, tensors_hash
from ssr_core.adapters import Adapter

from .captions import caption, encode, thing_words
from .network import Painter
from .pool import Style, Subject, base_scene
from .scenes import Scene, draw
from .training import CACHE, Batch, fit

RANK, STEPS, BATCH, RATE = 8, 300, 12, 2e-3
EXAMPLES = 24


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


@contextmanager
def reading(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the last forward pass fed to each layer that LoRAs change, (tokens, in)."""
    inputs: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[path] = args[0].detach().flatten(0, -2)

        return keep

    handles = [module.register_forward_pre_hook(hook(path)) for path, module in targets(model).items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class _Factors(nn.Module):
    """Trainable down and up of every target."""

    def __init__(self, model: nn.Module, seed: int, start: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.paths = list(targets(model))
        shapes = [targets(model)[path].weight.shape for path in self.paths]
        drawn = [torch.randn(RANK, inner, generator=generator) / inner**0.5 for _, inner in shapes]
        self.down = nn.ParameterList(drawn if start is None else [start[path] for path in self.paths])
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


def subject_scenes(subject: Subject, seed: int) -> list[tuple[Scene, str]]:
    """The subject alone, and beside another object on either side, with captions."""
    chooser = random.Random(seed)
    found = []
    for i in range(EXAMPLES):
        if i % 2 == 0:
            found.append((Scene((subject.thing,)), subject.prompt))
            continue
        others, _ = base_scene(chooser)
        other = others.things[0]
        pair = [(subject.thing, subject.prompt), (other, thing_words(other))]
        pair = pair if i % 4 == 1 else pair[::-1]
        found.append((Scene(tuple(thing for thing, _ in pair)), caption([words for _, words in pair])))
    return found


def _style_scenes(style: Style, seed: int) -> list[tuple[Scene, str]]:
    """Scenes in the style, with captions that end in the style's words."""
    chooser = random.Random(seed)
    scenes = [base_scene(chooser)[0].things for _ in range(2 * EXAMPLES)]
    return [(Scene(things, style.name), caption(list(map(thing_words, things)), style.words)) for things in scenes]


def _batches(scenes: Sequence[tuple[Scene, str]], seed: int) -> Callable[[int], Batch]:
    """Batches out of a fixed set of drawings."""
    generator = torch.Generator().manual_seed(seed)
    pictures, words = draw([scene for scene, _ in scenes], generator), encode([text for _, text in scenes])

    def batch(_: int) -> Batch:
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        return pictures[rows], words[rows]

    return batch


def train(
    base: Painter,
    batches: Callable[[int], Batch],
    seed: int,
    steps: int,
    label: str,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Train one LoRA, from downs of the caller's if there are any; returns the tensors of its file."""
    factors = _Factors(base, seed, start)
    with factors.attached(base):
        fit(base, factors.parameters(), batches, steps=steps, rate=RATE, seed=seed, label=label)
    tensors = {}
    for path, down, up in zip(factors.paths, factors.down, factors.up, strict=True):
        tensors[f"diffusion_model.{path}.lora_A.weight"] = down.detach().clone()
        tensors[f"diffusion_model.{path}.lora_B.weight"] = up.detach().clone()
    return tensors


def lora(
    base: Painter,
    who: Subject | Style,
    cache: Path = CACHE,
    steps: int = STEPS,
    *,
    name: str = "",
    start: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Trained:
    """One LoRA: from the cache, else trained; `start` makes its downs at the beginning."""
    is_subject = isinstance(who, Subject)
    name = name or f"{'subject' if is_subject else 'style'}{who.index}"
    path = cache / f"{name}_{steps}.safetensors"
    if not path.exists():
        seed = 50 + who.index
        scenes = subject_scenes(who, seed) if isinstance(who, Subject) else _style_scenes(who, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        downs = None if start is None else start()
        save_file(train(base, _batches(scenes, seed), 900 + who.index, steps, name, downs), path)
    tensors = load_file(path)
    adapter = read_adapter(tensors, key_map(base), name=name, fingerprint=tensors_hash(tensors))
    if isinstance(who, Subject):
        return Trained(name, who.prompt, adapter, subject=who)
    return Trained(name, caption(["red circle"], who.words), adapter, style=who)


def with_deltas(base: Painter, deltas: Mapping[str, Tensor]) -> Painter:
    """A copy of the model with changes added to its weights, by module path."""
    model = copy.deepcopy(base)
    for path, delta in deltas.items():
        model.get_submodule(path).weight.data += delta
    return model
