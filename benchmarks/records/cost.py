"""What one LoRA's record costs at Flux's dimensions: measured on one block of each kind, multiplied for the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ssr_core import (
    Adapter,
    KeyTarget,
    LoRALayer,
    Recorder,
    RecordIdentity,
    RecordLibrary,
    RecordOptions,
    Share,
    Target,
    Task,
    finished,
    from_records,
    records_of,
)

IMAGE, TEXT, RANK = 1024, 512, 32
"""Tokens of a 512 x 512 picture and of its text; rank of the LoRAs."""


@dataclass(frozen=True)
class Block:
    """Layers of one kind of block: name -> (inputs, outputs, tokens), and how often the model has it."""

    layers: dict[str, tuple[int, int, int]]
    count: int


def flux(d: int = 3072) -> dict[str, Block]:
    """FLUX.1's blocks: 19 double and 38 single ones."""
    double: dict[str, tuple[int, int, int]] = {}
    for stream, tokens in (("img", IMAGE), ("txt", TEXT)):
        double |= {
            f"{stream}_mod.lin": (d, 6 * d, 1),
            f"{stream}_attn.qkv": (d, 3 * d, tokens),
            f"{stream}_attn.proj": (d, d, tokens),
            f"{stream}_mlp.0": (d, 4 * d, tokens),
            f"{stream}_mlp.2": (4 * d, d, tokens),
        }
    joint = IMAGE + TEXT
    single = {"modulation.lin": (d, 3 * d, 1), "linear1": (d, 7 * d, joint), "linear2": (5 * d, d, joint)}
    return {"double": Block(double, 19), "single": Block(single, 38)}


def _task(block: Block, seed: int) -> Task:
    layers = {}
    for number, (name, (inner, outer, _)) in enumerate(block.layers.items()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        down = torch.randn(RANK, inner, generator=generator) / inner**0.5
        layers[Target(name)] = LoRALayer(down, torch.zeros(outer, RANK), None)
    return Task(Adapter(f"lora{seed}", f"lora{seed}", layers), prompts=("a",))


def _model(block: Block) -> nn.ModuleDict:
    """Stand-ins that hooks can sit on; what the layers themselves cost is left out."""
    root = nn.ModuleDict()
    for path in block.layers:
        parent: nn.ModuleDict = root
        *folders, name = path.split(".")
        for folder in folders:
            if folder not in parent:
                parent[folder] = nn.ModuleDict()
            parent = parent[folder]  # type: ignore[assignment]
        parent[name] = nn.Identity()
    return root


def _inputs(block: Block) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, n, inner, generator=generator) for name, (inner, _, n) in block.layers.items()}


def measure(kind: str, block: Block, options: RecordOptions) -> dict[str, float | str | int]:
    """Seconds and bytes of one block's part of a record, and of merging two LoRAs from records of it."""
    root, inputs = _model(block), _inputs(block)
    key_map = {name: KeyTarget(Target(name), (outer, inner)) for name, (inner, outer, _) in block.layers.items()}
    found: dict[str, float | str | int] = {"block": kind, "count": block.count}
    with TemporaryDirectory() as folder:
        library, shares = RecordLibrary(Path(folder)), []
        for seed in (1, 2):
            task = _task(block, seed)
            begin = time.perf_counter()
            recorder = Recorder(task, key_map, "model", options)
            recorder.collector.tasks = ()  # the LoRA's own output is no cost of recording
            with recorder.task(0) as tap, tap.attached(root):
                tap.prepare(torch.device("cpu"), torch.float32)
                for path, x in inputs.items():
                    root.get_submodule(path)(x)
            found["pass_seconds"] = time.perf_counter() - begin
            begin = time.perf_counter()
            layers = finished(recorder.factors(), options)
            identity = RecordIdentity(records_of([task])[0], "model")
            file = library.save(identity, options, layers)
            found["finish_seconds"] = time.perf_counter() - begin
            found["bytes"] = file.path.stat().st_size
            shares.append([Share(file)])
        begin = time.perf_counter()
        from_records([_task(block, seed) for seed in (1, 2)], shares)
        found["merge_seconds"] = time.perf_counter() - begin
    return found


def whole(rows: list[dict[str, float | str | int]]) -> dict[str, float]:
    """The model's total: each block's figure times how often it is there."""
    names = ("bytes", "pass_seconds", "finish_seconds", "merge_seconds")
    return {name: sum(float(row[name]) * int(row["count"]) for row in rows) for name in names}
