"""Jobs in processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from .parts import Job
from .records import Kept, Record
from .world.building import Scale, World, load


def measure(todo: Sequence[Job], kept: Kept, scale: Scale, files: Path, processes: int, *, add: bool) -> None:
    """Measure jobs in processes of one thread each, so that values do not depend on how many there are.

    Args:
        todo: The jobs.
        kept: Where values are kept as soon as a job ends.
        scale: Of the world.
        files: Where the world's files are.
        processes: How many run at a time.
        add: Keep earlier values of a job's other methods.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin) as pool:
        begun: dict[Future[tuple[list[Record], float]], Job] = {
            pool.submit(_measured, job, scale, files): job for job in todo
        }
        try:
            for number, done in enumerate(as_completed(begun), 1):
                found, seconds = done.result()
                job = begun[done]
                kept.write(job.name, job.methods, found, add=add)
                print(f"{job.name}: {seconds:.0f} s ({number} of {len(todo)})", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin() -> None:
    """One thread, and no life of its own: a killed parent does not tell its workers."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _measured(job: Job, scale: Scale, files: Path) -> tuple[list[Record], float]:
    start = time.perf_counter()
    return job.records(_world(files, scale)), time.perf_counter() - start


@cache
def _world(files: Path, scale: Scale) -> World:
    """A process loads the world once."""
    return load(files, scale)
