"""The tensors of one factor as a record's file holds them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..sampling import InputSample


def fits(parts: Mapping[str, Tensor]) -> list[bool]:
    """Checks: columns (d, l), norms (l,) and the sampled rows (n, d) are of a factor's dtypes and shapes."""
    columns, norms = parts["columns"], parts["norms"]
    checks = [columns.ndim == 2, columns.dtype == torch.float16, norms.dtype == torch.float32]
    checks += [norms.shape == columns.shape[1:], bool((norms >= 0).all())]
    if "rows" in parts:
        rows, scales, weights = parts["rows"], parts["scales"], parts["weights"]
        checks += [(rows.dtype, scales.dtype, weights.dtype) == (torch.float16, torch.float32, torch.float64)]
        checks += [len(rows) > 0, bool((scales >= 0).all()), bool((weights > 0).all())]
        checks += [rows.ndim == 2, rows.shape[1:] == columns.shape[:1], scales.shape == weights.shape == rows.shape[:1]]
    return checks


def packed(sample: InputSample) -> dict[str, Tensor]:
    """Tokens in half precision, whatever their size: each has a power of two of its own."""
    rows = sample.rows.float()
    scales = torch.exp2(torch.frexp(rows.abs().amax(dim=1)).exponent.float())
    return {"rows": (rows / scales[:, None]).half(), "scales": scales, "weights": sample.weights.double()}


def unpacked(parts: Mapping[str, Tensor], narrow: bool) -> InputSample:
    """The sample that was packed; `narrow` if its rows are bfloat16."""
    rows = parts["rows"].float() * parts["scales"][:, None]
    return InputSample(rows.to(torch.bfloat16) if narrow else rows, parts["weights"])


def crc(tensor: Tensor) -> int:
    """Of the bytes; a few hundred MB take well below a second."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy().data)
