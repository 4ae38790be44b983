"""How good and how fast is the conversion of a dense change to low rank?

A LoKr (full-rank w2, factor 8), a DoRA and a LoHa (rank 16) change a square weight with random values;
`truncate` at its defaults against a dense SVD of the same change (torch.linalg.svd). The
optimum is the error of the best rank-p approximation (Eckart and Young), from the dense SVD.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssr_core import ConvertOptions
from ssr_core.truncation import truncate

OUT = Path("docs/benchmarks")
WIDTHS = (1024, 3072)
REPEATS = 3


def changes(width: int) -> dict[str, Tensor]:
    """Dense changes of three kinds, float32."""
    generator = torch.Generator().manual_seed(width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight, down, up = rand(width, width) / width**0.5, rand(16, width), 0.02 * rand(width, 16)
    bent = weight + up @ down / width**0.5
    magnitude = weight.norm(dim=1, keepdim=True) * (1 + 0.02 * rand(width, 1))
    return {
        "LoHa, rank 8 x 8": (rand(width, 8) @ rand(8, width)) * (rand(width, 8) @ rand(8, width)),
        "LoKr, 8 x 8 and full w2": torch.kron(rand(8, 8), rand(width // 8, width // 8)),
        "DoRA, rank 16": magnitude / weight.norm(dim=1, keepdim=True) * bent - weight,
    }


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(width: int, kind: str, change: Tensor) -> dict[str, object]:
    """One row of the table."""
    options = ConvertOptions()
    found = truncate(change, options.max_rank, options.tolerance)
    singular = torch.linalg.svdvals(change.double())
    best = float((singular[found.rank :].square().sum() / singular.square().sum()).sqrt())
    fast = median_seconds(lambda: truncate(change, options.max_rank, options.tolerance), REPEATS)
    dense = median_seconds(lambda: torch.linalg.svd(change, full_matrices=False), 1 if width > 2000 else REPEATS)
    return {
        "width": width,
        "kind": kind,
        "rank": found.rank,
        "error": found.error,
        "optimum": best,
        "time_over_dense_svd": fast / dense,
    }


def main() -> None:
    """Measure, and write the page."""
    rows = [measure(width, kind, change) for width in WIDTHS for kind, change in changes(width).items()]
    lines = [
        "# Conversion to low rank",
        "",
        *(line for line in (__doc__ or "").splitlines()[2:]),
        "",
        f"CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}.",
        "`make bench-conversion` writes this page.",
        "",
        "| width | change | rank kept | relative error | optimum at that rank | time / dense SVD |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['width']} | {r['kind']} | {r['rank']} | {r['error']:.4g} | {r['optimum']:.4g} "
        f"| {r['time_over_dense_svd']:.3f} |"
        for r in rows
    ]
    lines += [
        "",
        "A LoKr with a full w2 and a DoRA spread over the whole spectrum: rank 128 keeps only a part of them. The",
        "rest is what SSR LoRA's `residual` decides about.",
    ]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "conversion.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (OUT / "conversion.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
