"""Properties over random shapes, ranks, numbers of LoRAs and file dtypes."""

import torch
from helpers import LAYER, calibrated, deltas_of, linear64, output_error, randn, rel, task, task_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ssr_core import KEY_STYLES, KeyTarget, LoRALayer, SSRMerge, SumMerge, Target, merge, read_adapter, to_tensors

COMMON = settings(
    deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=list(HealthCheck)
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = {"seed": st.integers(0, 10**6), "inp": st.integers(2, 12), "out": st.integers(1, 9)}
RANKS = st.lists(st.integers(1, 7), min_size=2, max_size=4)


def tasks_of(seed, inp, out, ranks, dtypes):
    return [
        task(f"t{k}", LoRALayer(randn(seed + k, r, inp).to(d), randn(seed + k + 50, out, r).to(d), 0.5 * r))
        for k, (r, d) in enumerate(zip(ranks, dtypes, strict=True))
    ]


def tokens_of(seed, inp, counts):
    return [task_tokens(seed + 1000 * k, n, inp) for k, n in enumerate(counts)]


@COMMON
@given(ranks=RANKS, data=st.data(), **SIZES)
def test_never_worse_than_the_sum_on_the_calibration_tokens(seed, inp, out, ranks, data):
    """Rt minimises the error plus mu |Rt - I|^2, so it cannot lose to I, however few tokens there are."""
    dtypes = [data.draw(DTYPES) for _ in ranks]
    counts = [data.draw(st.integers(1, 30)) for _ in ranks]
    tasks, tokens = tasks_of(seed, inp, out, ranks, dtypes), tokens_of(seed, inp, counts)
    module = nn.Linear(inp, out).requires_grad_(False)
    calibration = calibrated(module, tasks, [[x.float()] for x in tokens])
    ridge = data.draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    result = merge(tasks, SSRMerge(ridge=ridge), calibration, dtype=torch.float32)
    deltas = deltas_of(tasks)
    error = output_error(result.layers[LAYER].delta(), deltas, tokens)
    assert error <= output_error(sum(deltas), deltas, tokens) * (1 + 1e-3) + 1e-3


@COMMON
@given(ranks=RANKS, data=st.data(), **SIZES)
def test_refactoring_changes_nothing(seed, inp, out, ranks, data):
    tasks = tasks_of(seed, inp, out, ranks, [torch.float64] * len(ranks))
    tokens = tokens_of(seed, inp, [data.draw(st.integers(1, 20)) for _ in ranks])
    turned = []
    for k, one in enumerate(tasks):
        layer = one.adapter.layers[LAYER]
        scale = 10.0 ** data.draw(st.integers(-3, 3))
        # Orthogonal times diagonal in [1, 2]: condition at most 2, so rounding stays small.
        mix = torch.linalg.qr(randn(seed + 300 + k, layer.rank, layer.rank)).Q
        mix = mix * (1 + torch.rand(layer.rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
        turned.append(
            task(one.name, LoRALayer(scale * mix @ layer.down, layer.up @ torch.linalg.inv(scale * mix), layer.alpha))
        )
    answers = []
    for which in (tasks, turned):
        calibration = calibrated(linear64(inp, out), which, [[x] for x in tokens])
        answers.append(merge(which, SSRMerge(ridge=1e-2), calibration).layers[LAYER].delta())
    assert rel(answers[1], answers[0]) < 1e-6


@COMMON
@given(seed=st.integers(0, 10**6), data=st.data(), style=st.sampled_from(KEY_STYLES), dtype=DTYPES)
def test_emission_round_trip(seed, data, style, dtype):
    inp, rows = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    kernel = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
    width = inp * torch.Size(kernel).numel()
    plain = KeyTarget(Target("m"), (rows * 3, inp, *kernel))
    keys = {"lora_unet_m": plain, "diffusion_model.m": plain, "transformer.m": plain}
    fused = KeyTarget(Target("f"), (rows * 3, inp, *kernel))
    keys |= {"lora_unet_f": fused, "diffusion_model.f": fused}
    for i in range(3):
        keys[f"transformer.f{i}"] = KeyTarget(Target("f", (i * rows, rows)), fused.weight_shape)

    def layer(k, out):
        rank = data.draw(st.integers(1, 5))
        alpha = data.draw(st.sampled_from([None, 0.5, 4.0]))
        return LoRALayer(
            randn(seed + k, rank, width).to(dtype), randn(seed + k + 9, out, rank).to(dtype), alpha, kernel
        )

    split = {Target("f", (i * rows, rows)): layer(i, rows) for i in range(3)}
    first = {
        Target("m"): layer(3, rows * 3),
        **(split if data.draw(st.booleans()) else {Target("f"): layer(4, rows * 3)}),
    }
    tasks = [task("a", first, strength=0.5), task("b", {Target("m"): layer(5, rows * 3)})]
    result = merge(tasks, SumMerge())
    again = read_adapter(to_tensors(result, keys, style), keys, name="x", fingerprint="")
    for path in ("m", "f"):
        total = [torch.zeros(rows * 3, width, dtype=torch.float64) for _ in range(2)]
        for whole, layers in zip(total, (result.layers, again.layers), strict=True):
            for target, one in layers.items():
                if target.module_path == path:
                    start, length = target.out_slice or (0, rows * 3)
                    whole[start : start + length] += one.delta()
        # Fusing slices folds alpha into ups of the file's dtype; everything else is exact.
        assert rel(total[1], total[0]) < (1e-2 if dtype != torch.float32 else 1e-5)
