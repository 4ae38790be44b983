"""Jobs in processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from .parts import Job
from .records import Kept, Record
from .world.building import Scale, World, load


def measure(todo: Sequence[Job], kept: Kept, scale: Scale, files: Path, workers: int, only: Sequence[str]) -> None:
    """Measure jobs in processes of one thread each, so that values do not depend on how many there are."""
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        begun: dict[Future[tuple[list[Record], float]], Job] = {
            pool.submit(_measured, job, scale, files, only): job for job in todo
        }
        try:
            for number, done in enumerate(as_completed(begun), 1):
                found, seconds = done.result()
                kept.write(begun[done].name, found)
                print(f"{begun[done].name}: {seconds:.0f} s ({number} of {len(todo)})", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _measured(job: Job, scale: Scale, files: Path, only: Sequence[str]) -> tuple[list[Record], float]:
    start = time.perf_counter()
    return job.records(_world(files, scale), only), time.perf_counter() - start


@cache
def _world(files: Path, scale: Scale) -> World:
    """A process loads the world once."""
    return load(files, scale)
