"""Reading dumped weights and comparing them with what they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .server import Result


def dumped(base: Path, prefix: str) -> dict[str, Tensor]:
    """What a DumpWeights node wrote."""
    return load_file(base / "output" / "probes" / f"{prefix}.safetensors")


def facts(result: Result, node: object) -> dict[str, Any]:
    """Hooks, lazily applied patches and the hash of the base weights, as DumpWeights saw them."""
    return json.loads(result.text(node))


def base_weights(base: Path, family: str) -> dict[str, Tensor]:
    """The checkpoint's weights by the host's names."""
    stored = load_file(base / "models" / "diffusion_models" / f"tiny_{family}.safetensors")
    return {f"diffusion_model.{name}": value for name, value in stored.items()}


def assert_added(
    seen: Mapping[str, Tensor], base: Mapping[str, Tensor], deltas: Mapping[str, Tensor], tolerance: float
) -> None:
    """Weights are the base plus these float64 deltas, and untouched where there is none.

    `tolerance` is relative: norm of the difference over the delta's norm, layer by layer.
    """
    assert deltas.keys() <= seen.keys(), f"no such weights: {sorted(deltas.keys() - seen.keys())[:5]}"
    wrong = {}
    for name, before in base.items():
        added = seen[name].double() - before.double()
        expected = deltas.get(name)
        if expected is None:
            if bool(added.any()):
                wrong[name] = float("inf")
            continue
        error = float((added - expected).norm() / expected.norm())
        if not error < tolerance:
            wrong[name] = error
    worst = sorted(wrong.items(), key=lambda item: -item[1])[:8]
    assert not wrong, f"{len(wrong)} of {len(deltas)} layers differ; worst: {worst}"


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of every matrix among dumped weights."""
    return {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in weights.items()
        if name.endswith(".weight") and value.ndim >= 2
    }
