"""Peak memory of a run above what was allocated when it began.

On the CPU every allocation and release of PyTorch's allocator is an event of its profiler, temporaries
inside operators included; their running sum is exact and does not depend on what the C library keeps.
Packing buffers inside the BLAS are not seen, in no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once during `run`, above its start.

    On CUDA this is the device's memory alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    tree: Any = recorded.profiler.kineto_results.experimental_event_tree()
    events = sorted((e.start_time_ns, e.extra_fields.alloc_size) for e in _allocations(tree))
    peak = total = 0
    for _, size in events:
        total += size
        peak = max(peak, total)
    return peak


def _allocations(tree: Iterable[Any]) -> Iterable[Any]:
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
