"""Processes that share the calibration passes: each runs some, the statistics are summed over all.

Statistics are sums over tokens (SSR-Merge, section 3.2), so LoRAs and prompts can be run anywhere. The
steps of one sampling cannot: each starts from what the one before it gave.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CalibrationError
from .gram import GramStats
from .sampling import InputSample
from .targets import Target
from .token_sums import shapes_of, sums_of, with_sums

Sampled = tuple[str, int]
"""Module path and task of a sample; scenes have negative numbers."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ranks:
    """This process among those that calibrate together; the default is one process alone.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        device: Where sums are exchanged: the CPU over gloo, a GPU over nccl.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def shares(self, counts: Sequence[int], whole: bool = False) -> list[list[int]]:
        """Which passes this process runs.

        Args:
            counts: Number of passes of each LoRA, then of each scene (`scenes`).
            whole: Run all passes of a LoRA in one process, the longest LoRAs dealt out first: its samples
                are then those of one process alone. Else passes are dealt out in turn over all LoRAs.

        Returns:
            For each LoRA and scene the numbers of its passes.
        """
        if whole:
            loads, owner = [0] * self.size, {}
            for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
                owner[index] = loads.index(min(loads))
                loads[owner[index]] += counts[index]
            return [list(range(count)) if owner[i] == self.rank else [] for i, count in enumerate(counts)]
        shares, at = [], 0
        for count in counts:
            shares.append([i for i in range(count) if (at + i) % self.size == self.rank])
            at += count
        return shares

    def combined(self, stats: Mapping[Target, GramStats]) -> dict[Target, GramStats]:
        """The sum of all processes' statistics, on each of them.

        Args:
            stats: What this process gathered, for every stack; zeros where it ran nothing.

        Raises:
            CalibrationError: A process was lost, or has other LoRAs.
        """
        if self.size == 1:
            return dict(stats)
        order = sorted(stats, key=str)
        self._agree(order, stats)
        # A process that ran nothing of a layer does not know how wide the others' Grams are.
        wide = self._sum(torch.tensor([float(stats[t].gram.dtype == torch.float64) for t in order]))
        double = {target for target, one in zip(order, wide.tolist(), strict=True) if one}
        found: dict[Target, dict[str, Tensor]] = {target: {} for target in order}
        for bucket in _buckets(order, stats):
            total = self._sum(torch.cat([value.flatten().double() for _, _, value in bucket]))
            parts = total.split([value.numel() for _, _, value in bucket])
            for (target, name, value), part in zip(bucket, parts, strict=True):
                dtype = torch.float64 if target in double else torch.float32
                found[target][name] = part.view_as(value).to(dtype if name in _GRAMS else value.dtype)
        return {target: with_sums(stats[target], found[target]) for target in order}

    def told(self, text: str) -> str:
        """What the first process says, on every process.

        Args:
            text: Its words; those of the others do not matter.

        Raises:
            CalibrationError: A process was lost.
        """
        if self.size == 1:
            return text
        mine = text.encode() if self.rank == 0 else b""
        length = int(self._sum(torch.tensor([float(len(mine))])))
        letters = torch.zeros(length, dtype=torch.float64)
        letters[: len(mine)] = torch.tensor(list(mine), dtype=torch.float64)
        return bytes(self._sum(letters).long().tolist()).decode() if length else ""

    def least(self, number: int) -> int:
        """The smallest of a number, not negative, that every process has.

        Raises:
            CalibrationError: A process was lost.
        """
        every = torch.zeros(self.size, dtype=torch.float64)
        every[self.rank] = number
        return number if self.size == 1 else int(self._sum(every).min())

    def gathered(self, samples: Mapping[Sampled, InputSample], keys: Sequence[Sampled]) -> dict[Sampled, InputSample]:
        """All processes' samples, on each of them.

        Args:
            samples: Those of this process; each sample is on one process only.
            keys: Layer and task of all samples that may exist, the same on every process.

        Raises:
            CalibrationError: A process was lost.
        """
        if self.size == 1:
            return dict(samples)
        shapes = torch.zeros(len(keys), 4)
        for row, key in zip(shapes, keys, strict=True):
            if key in samples:
                one = samples[key]
                row[:] = torch.tensor([*one.rows.shape, DTYPES.index(one.rows.dtype), one.held is not None])
        found = {}
        for key, (count, width, kind, marked) in zip(keys, self._sum(shapes).long().tolist(), strict=True):
            if count == 0:
                continue
            block = torch.zeros(count, width + 2, dtype=torch.float64)
            if key in samples:
                one = samples[key]
                block[:, :width], block[:, width] = one.rows, one.weights
                block[:, width + 1] = 0.0 if one.held is None else one.held
            total = self._sum(block)  # the others' zeros change no bit
            held = total[:, width + 1] > 0 if marked else None
            found[key] = InputSample(total[:, :width].to(DTYPES[kind]), total[:, width].clone(), held)
        return found

    def _agree(self, order: Sequence[Target], stats: Mapping[Target, GramStats]) -> None:
        described = ";".join(f"{target}{stats[target].ranks}{shapes_of(stats[target])}" for target in order)
        every = torch.zeros(self.size, dtype=torch.float64)
        every[self.rank] = float(zlib.crc32(described.encode()))
        if len(set(self._sum(every).tolist())) > 1:
            raise CalibrationError(
                f"process {self.rank} of {self.size} has other LoRAs, layers or joint prompts than the others.",
                remedy="give every process the same recipe, files and model.",
            )

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over processes, in float64, on the CPU."""
        total = value.to(self.device, torch.float64, copy=True).contiguous()
        try:
            dist.all_reduce(total)
        except (RuntimeError, ValueError) as err:
            raise CalibrationError(
                f"process {self.rank} of {self.size} lost another one before its statistics arrived "
                f"({str(err).splitlines()[0]}). Nothing was written.",
                remedy="look for that process's own message, and start all of them again.",
            ) from err
        return total.cpu()


PATIENCE = timedelta(hours=12)
"""As long as the slowest process may take longer than the fastest; one that was killed is noticed at once."""

_BUCKET = 1 << 23
"""Numbers exchanged at once: a message for each layer would mostly wait."""

_Entry = tuple[Target, str, Tensor]

_GRAMS = ("gram", "packed", "scenes")
"""Sums that come in the dtype of the Grams."""


def _buckets(order: Sequence[Target], stats: Mapping[Target, GramStats]) -> Iterator[list[_Entry]]:
    """All tensors that are sums over tokens, in messages of a bounded size."""
    bucket: list[_Entry] = []
    size = 0
    for target in order:
        for name, value in sums_of(stats[target]).items():
            if bucket and size + value.numel() > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append((target, name, value))
            size += value.numel()
    if bucket:
        yield bucket


@contextmanager
def joined(gpu: bool | None = None, patience: timedelta = PATIENCE) -> Iterator[Ranks]:
    """This process among those that torchrun started (by the variables that it sets); alone without it.

    Args:
        gpu: Exchange sums by nccl, not gloo; None: where there is a GPU.
        patience: How long to wait for the others' statistics.

    Raises:
        CalibrationError: The others were not found.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks()
        return
    cuda = torch.cuda.is_available() if gpu is None else gpu
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    except (RuntimeError, ValueError) as err:
        raise CalibrationError(
            f"the other processes were not found ({str(err).splitlines()[0]}).",
            remedy="start the command with torchrun, and look for messages of the other processes.",
        ) from err
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), "cuda" if cuda else "cpu")
    finally:
        dist.destroy_process_group()
