"""The adapters of all tasks that act on the same rows of one module, stacked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, LoRALayer
from .canonical import row_basis
from .errors import IncompatibleError
from .targets import Part, Target


@dataclass(frozen=True)
class Task:
    """One LoRA at one strength, as the engine sees it.

    Attributes:
        adapter: What the file holds for the connected model.
        strength_model: Strength on the diffusion model; 0 means absent.
        strength_clip: Strength on the text encoder; 0 means absent.
        prompts: Calibration prompts, as text; part of the task's identity.
    """

    adapter: Adapter
    strength_model: float = 1.0
    strength_clip: float = 1.0
    prompts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The LoRA's name."""
        return self.adapter.name

    @property
    def active(self) -> bool:
        """Whether the LoRA acts on anything."""
        return self.strength_model != 0 or self.strength_clip != 0

    def strength(self, part: Part) -> float:
        """Strength on one part of the model."""
        return self.strength_model if part == "model" else self.strength_clip


@dataclass(frozen=True)
class Block:
    """One task's share of a stack. Holds the file's tensors; everything else is made on demand.

    Attributes:
        task: Index of the task.
        parts: The task's layers here, each with its first row inside the stack.
        rows: Output rows of the stack.
        strength: The task's strength on this part.
    """

    task: int
    parts: tuple[tuple[int, LoRALayer], ...]
    rows: int
    strength: float

    @property
    def dtype(self) -> torch.dtype:
        """float64 if the file is, else float32."""
        wide = any(layer.down.dtype == torch.float64 for _, layer in self.parts)
        return torch.float64 if wide else torch.float32

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return sum(layer.rank for _, layer in self.parts)

    @property
    def down(self) -> Tensor:
        """(r, in)."""
        downs = [layer.down.to(self.dtype) for _, layer in self.parts]
        return downs[0] if len(downs) == 1 else torch.cat(downs)

    @property
    def up(self) -> Tensor:
        """(rows, r), with alpha / r and the strength folded in; zero outside a part's rows."""
        ups = []
        for start, layer in self.parts:
            if layer.up.shape[0] == self.rows:
                ups.append(layer.up.to(self.dtype) * (layer.scale * self.strength))
                continue
            padded = torch.zeros(self.rows, layer.rank, dtype=self.dtype)
            padded[start : start + layer.up.shape[0]] = layer.up.to(self.dtype) * (layer.scale * self.strength)
            ups.append(padded)
        return ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)


@dataclass(frozen=True)
class LayerStack:
    """All adapters on one target.

    Attributes:
        target: Module and rows; the union of the rows where slices overlap.
        blocks: One block for each task that has this layer, in task order.
        count: Number of LoRAs in the merge, with or without this layer.
        kernel: Spatial kernel; empty for linear layers.
        origin: Target under which a calibration keeps the statistics; `target` if none was given.
        tapped: Whether hooks can watch the module at work.
    """

    target: Target
    blocks: tuple[Block, ...]
    count: int
    kernel: tuple[int, ...] = ()
    origin: Target | None = None
    tapped: bool = True

    @property
    def tasks(self) -> tuple[int, ...]:
        """Indices of the tasks that act here."""
        return tuple(block.task for block in self.blocks)

    @property
    def rank(self) -> int:
        """R, the sum of the ranks."""
        return sum(block.rank for block in self.blocks)

    @cached_property
    def _coordinates(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Stacked once and for all: hooks on the CPU then read the very tensor that the solve reads."""
        bases, mixes = [], []
        for block in self.blocks:
            basis, mix = row_basis(block.down)
            bases.append(basis.to(block.dtype))
            mixes.append(mix)
        return bases[0] if len(bases) == 1 else torch.cat(bases), tuple(mixes)

    @property
    def basis(self) -> Tensor:
        """(R', in): the blocks' orthonormal coordinates, stacked. Rows of different blocks may overlap."""
        return self._coordinates[0]

    @property
    def mixes(self) -> tuple[Tensor, ...]:
        """For each block `mix` (r, r'), float64, of `down = mix @ basis`."""
        return self._coordinates[1]

    def canonical_up(self, position: int) -> Tensor:
        """`up` of one block for its rows of `basis`: (rows, r')."""
        block = self.blocks[position]
        return block.up @ self.mixes[position].to(block.dtype)

    @property
    def signature(self) -> Tensor:
        """(R',) float64: the coordinates of one fixed vector, to recognise the same basis by."""
        generator = torch.Generator().manual_seed(self.in_features)
        fixed = torch.randn(self.in_features, generator=generator, dtype=torch.float64)
        return self.basis.to("cpu", torch.float64) @ fixed

    @property
    def basis_ranks(self) -> tuple[int, ...]:
        """Rows of `basis` that belong to each block."""
        return tuple(mix.shape[1] for mix in self.mixes)

    @property
    def rank_bounds(self) -> tuple[int, ...]:
        """Upper bounds of `basis_ranks`, which cost no factorisation."""
        return tuple(min(block.rank, self.in_features) for block in self.blocks)

    @property
    def in_features(self) -> int:
        """Columns of every `down`: in * prod(kernel)."""
        return self.blocks[0].parts[0][1].down.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of every `up`."""
        return self.blocks[0].rows


def build_stacks(tasks: Sequence[Task], *, fuse_slices: bool = False, like: Iterable[Target] = ()) -> list[LayerStack]:
    """Stack the layers of all tasks.

    Slices of one module (q, k, v of a fused qkv) stay apart as long as nobody's rows overlap
    somebody else's; where a file with fused rows meets one with split rows, the rows that overlap
    form one stack.

    Args:
        tasks: The LoRAs; those with strength 0 on a part are absent there.
        fuse_slices: Stack all slices of a module together even if they are disjoint. The router can
            then use every slice's coordinates for each, at three to four times the rank.
        like: Targets of stacks that exist already (of a calibration): layers inside one of them join
            it, so that statistics of a larger set of LoRAs fit a subset.

    Returns:
        Stacks sorted by target.
    """
    by_module: dict[tuple[Part, str], list[_Member]] = {}
    for index, task in enumerate(tasks):
        for target, layer in task.adapter.layers.items():
            if task.strength(target.part) != 0:
                by_module.setdefault((target.part, target.module_path), []).append(_Member(target, index, layer))
    known: dict[tuple[Part, str], list[Target]] = {}
    for target in like:
        known.setdefault((target.part, target.module_path), []).append(target)
    stacks = []
    for module, members in by_module.items():
        for group in _group_rows(members, known.get(module, []), fuse_slices):
            stacks.append(_stack(group, tasks))
    return sorted(stacks, key=lambda stack: str(stack.target))


class _Member(NamedTuple):
    """One task's layer on one module."""

    target: Target
    task: int
    layer: LoRALayer


@dataclass
class _Group:
    """Members that form one stack, and the stack of a calibration that they belong to, if any."""

    members: list[_Member]
    origin: Target | None = None


def _covers(rows: tuple[int, int] | None, part: tuple[int, int] | None) -> bool:
    if rows is None or part is None:
        return rows is None
    return rows[0] <= part[0] and part[0] + part[1] <= rows[0] + rows[1]


def _group_rows(members: Sequence[_Member], known: Sequence[Target], fuse_slices: bool) -> list[_Group]:
    """Group the members of one module whose rows overlap, or that a calibration has in one stack."""
    groups = {target: _Group([], target) for target in known}
    rest: list[_Member] = []
    for member in members:
        home = next((target for target in known if _covers(target.out_slice, member.target.out_slice)), None)
        if home is None:
            rest.append(member)
        else:
            groups[home].members.append(member)
    found = [group for group in groups.values() if group.members]
    if fuse_slices or any(member.target.out_slice is None for member in rest):
        return [*found, _Group(rest)] if rest else found
    end = -1
    for member in sorted(rest, key=lambda member: member.target.out_slice or (0, 0)):
        start, length = member.target.out_slice or (0, 0)
        if start >= end:
            found.append(_Group([]))
        found[-1].members.append(member)
        end = max(end, start + length)
    return found


def _stack(group: _Group, tasks: Sequence[Task]) -> LayerStack:
    first = group.members[0].target
    width = group.members[0].layer.down.shape[1]
    slices = [member.target.out_slice for member in group.members]
    rows = None if None in slices else _union([part for part in slices if part is not None])
    target = Target(first.module_path, rows, first.part)
    whole = (member.layer.up.shape[0] for member in group.members if member.target.out_slice is None)
    out = next(whole) if rows is None else rows[1]
    by_task: dict[int, list[tuple[Target, LoRALayer]]] = {}
    for member in group.members:
        if member.layer.down.shape[1] != width:
            raise IncompatibleError(
                f"{tasks[member.task].name} reads {member.layer.down.shape[1]} inputs here, another LoRA {width}.",
                file=tasks[member.task].name,
                layer=str(target),
                remedy="merge without one of the two: they are not made for the same model.",
            )
        by_task.setdefault(member.task, []).append((member.target, member.layer))
    blocks = tuple(_block(index, target, by_task[index], out, tasks[index]) for index in sorted(by_task))
    tapped = not any(member.target in tasks[member.task].adapter.untapped for member in group.members)
    return LayerStack(target, blocks, len(tasks), group.members[0].layer.kernel, group.origin or target, tapped)


def _union(slices: Sequence[tuple[int, int]]) -> tuple[int, int]:
    start = min(first for first, _ in slices)
    return start, max(first + length for first, length in slices) - start


def _block(index: int, target: Target, parts: Sequence[tuple[Target, LoRALayer]], out: int, task: Task) -> Block:
    base = 0 if target.out_slice is None else target.out_slice[0]
    # A fixed order: the block's coordinates must come out the same whatever the file's order is.
    parts = sorted(parts, key=lambda part: part[0].out_slice or (0, 0))
    placed = tuple((0 if member.out_slice is None else member.out_slice[0] - base, layer) for member, layer in parts)
    return Block(index, placed, out, task.strength(target.part))
