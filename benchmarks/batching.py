"""Would K LoRAs in one batched forward pass be faster than K passes? The upper bound of what it could save.

Transformer blocks of real DiT shape with random weights; K sequential passes of batch 1 against one
pass of batch K, no adapters and no hooks in either. The ratio is the most that batching could gain.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

OUT = Path("docs/benchmarks")
K, REPEATS = 4, 9


class Block(nn.Module):
    """Attention and MLP of a DiT block, Flux-like proportions."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.down(nn.functional.gelu(self.up(x)))


def seconds(block: Block, x: Tensor, times: int) -> float:
    """Median wall time of `times` passes."""
    found = []
    for _ in range(REPEATS):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            block(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@torch.inference_mode()
def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    sizes = (
        [(3072, 24, n) for n in (256, 1024, 1536, 4608)] if cuda else [(512, 8, 256), (1024, 8, 256), (1024, 8, 1024)]
    )
    rows = []
    for d, heads, tokens in sizes:
        block = Block(d, heads).to(device, torch.bfloat16 if cuda else torch.float32)
        x = torch.randn(K, tokens, d, device=device, dtype=block.qkv.weight.dtype)
        seconds(block, x, 1)
        times = 20 if cuda else 1
        ratio = seconds(block, x[:1], K * times) / seconds(block, x, times)
        rows.append({"device": name, "d": d, "tokens": tokens, "K": K, "sequential_over_batched": round(ratio, 3)})
        print(rows[-1])
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"batching_{device.type}.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = ["# K LoRAs in one batched pass?", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [f"{name}, PyTorch {torch.__version__}, median of {REPEATS}. `make bench-batching` writes this page.", ""]
    lines += ["| width | tokens | K | K passes / one pass of batch K |", "|---|---|---|---|"]
    lines += [f"| {r['d']} | {r['tokens']} | {r['K']} | {r['sequential_over_batched']} |" for r in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
