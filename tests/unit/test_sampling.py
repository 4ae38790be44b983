"""A few tokens of all calls: which are drawn, what they weigh, and how the hooks read them."""

import math

import pytest
import torch
from helpers import F64, conflicting_tasks, linear64, lora, patches, randn, task
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssr_core import SampleOptions, Target, TextRows, build_stacks
from ssr_core.calibrator import Calibrator
from ssr_core.sampling import TokenSampler, thinned

IN, OUT, RANK, K = 14, 9, 2, 3


def sample_of(x, options, weight=None, usable=None, split=()):
    sampler = TokenSampler(options)
    weight = torch.ones(len(x), dtype=F64) if weight is None else weight
    usable = torch.ones(len(x), dtype=torch.bool) if usable is None else usable
    sizes = split or [len(x)]
    for rows, some, ones in zip(x.split(sizes), usable.split(sizes), weight.split(sizes), strict=True):
        sampler.add([rows[None]], some, ones)
    return sampler.result()


def numbered(count):
    return torch.arange(count, dtype=F64)[:, None]


def test_few_tokens_are_kept_all_with_their_own_weights():
    weight = torch.tensor([1.0, 0.25, 0.0, 2.0, 1.0])
    usable = torch.tensor([True, True, True, True, False])
    sample = sample_of(numbered(5), SampleOptions(tokens=4), weight, usable)
    found = dict(zip(sample.rows[:, 0].tolist(), sample.weights.tolist(), strict=True))
    assert found == {0.0: 1.0, 1.0: 0.25, 3.0: 2.0}


def test_the_split_into_calls_does_not_matter_and_the_seed_does():
    def drawn(seed, split):
        return sample_of(numbered(500), SampleOptions(tokens=20, seed=seed), split=split).rows.flatten().sort().values

    assert torch.equal(drawn(0, [500]), drawn(0, [3, 200, 1, 296]))
    assert not torch.equal(drawn(0, [500]), drawn(1, [500]))


def test_every_call_is_drawn_from_alike():
    """Of 4 calls of 250 tokens each gets about its quarter: 256 draws have a standard deviation of 7."""
    for seed in range(5):
        rows = sample_of(numbered(1000), SampleOptions(tokens=256, seed=seed), split=[250] * 4).rows.flatten()
        assert len(rows.unique()) == 256
        assert all(36 <= int(((rows >= at) & (rows < at + 250)).sum()) <= 92 for at in range(0, 1000, 250))


def test_weighted_sums_over_samples_are_unbiased():
    weight = torch.where(numbered(400).flatten() < 300, 0.1, 1.0)
    value = 1 + (numbered(400).flatten() % 7)
    estimates = []
    for seed in range(400):
        sample = sample_of(torch.stack([value, weight], dim=1), SampleOptions(tokens=30, seed=seed), weight)
        assert len(sample.rows) == 30 and bool((sample.weights >= sample.rows[:, 1] - 1e-7).all())
        estimates.append(float((sample.rows[:, 0] * sample.weights).sum()))
    estimates = torch.tensor(estimates)
    exact = float((value * weight).sum())
    assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / 20
    assert float(estimates.std()) < 0.2 * exact


def sampled(root, tasks, run_pass, options=None):
    calibrator = Calibrator(build_stacks(tasks), sample=options or SampleOptions(tokens=10_000, most=30_000))
    for index in range(len(tasks)):
        with calibrator.task(index) as tap, tap.attached(root):
            run_pass(index, tap)
    return calibrator._samples


def test_linear_layers_are_sampled_where_they_are_finite():
    tasks, x = conflicting_tasks(2, OUT, IN, RANK), randn(1, 3, 5, IN)
    x[1, 2, 4], x[0, 0, 0] = math.nan, math.inf
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    samples = sampled(root, tasks, lambda index, tap: root["layer"](x))
    rows = samples[("layer", 0)].rows
    kept = [i for i in range(15) if i not in (0, 7)]
    assert rows.dtype == F64 and torch.equal(
        rows[rows[:, 1].argsort()], x.reshape(-1, IN)[kept][x.reshape(-1, IN)[kept, 1].argsort()]
    )


def test_convolutions_are_sampled_by_patches():
    conv = nn.Conv2d(2, OUT, 3, padding=1, stride=2).double().requires_grad_(False)
    tasks, x = conflicting_tasks(2, OUT, 18, RANK, kernel=(3, 3)), randn(2, 3, 2, 5, 6)
    root = nn.ModuleDict({"layer": conv})
    x[0, 0, 4, 5] = math.nan
    rows = sampled(root, tasks, lambda index, tap: conv(x))[("layer", 1)].rows
    expected = patches(x, conv)
    expected = expected[torch.isfinite(expected).all(dim=1)]
    assert len(expected) == 3 * 9 - 1
    assert torch.equal(rows[rows[:, 4].argsort()], expected[expected[:, 4].argsort()])


def test_padding_weighs_as_it_does_in_the_statistics():
    real = torch.tensor([True, True, False, False, False, False])
    layer = Target("txt_in")
    tasks = [task(f"t{k}", {layer: lora(k, OUT, IN, RANK)}) for k in range(2)]
    x, root = randn(3, 1, 6, IN), nn.ModuleDict({"txt_in": linear64(IN, OUT)})
    for mode, wanted in (("balance", [0.5] * 4 + [1.0] * 2), ("exclude", [1.0] * 2), ("include", [1.0] * 6)):
        calibrator = Calibrator(build_stacks(tasks), mode, SampleOptions(tokens=9))
        with calibrator.task(0) as tap, tap.attached(root):
            tap.describe_text(TextRows(real))
            root["txt_in"](x)
        assert sorted(calibrator._samples[("txt_in", 0)].weights.tolist()) == wanted


def test_what_is_kept_is_bounded_and_as_narrow_as_the_activations():
    tasks = conflicting_tasks(2, OUT, IN, RANK, dtype=torch.float32)
    root = nn.ModuleDict({"layer": nn.Linear(IN, OUT).bfloat16().requires_grad_(False)})
    x = randn(1, 40, IN, dtype=torch.bfloat16)
    samples = sampled(root, tasks, lambda index, tap: [root["layer"](x) for _ in range(5)], SampleOptions(tokens=16))
    assert all(one.rows.dtype == torch.bfloat16 and one.rows.shape == (16, IN) for one in samples.values())
    assert all(one.rows.untyped_storage().nbytes() == 2 * 16 * IN for one in samples.values())


class NoLooking(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, or counting where a mask is True."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"), name
        masks = [one for one in args[1] if one is not None and one.dtype == torch.bool] if name == "index" else []
        assert not masks, "indexed with a mask"
        return func(*args, **(kwargs or {}))


def test_drawing_never_waits_for_the_device():
    sampler, weight = TokenSampler(SampleOptions(tokens=4)), torch.rand(9, generator=torch.Generator().manual_seed(0))
    with NoLooking():
        for _ in range(3):
            sampler.add([numbered(9)[None]], torch.ones(9, dtype=torch.bool), weight)
    assert len(sampler.result().rows) == 4
    with pytest.raises(AssertionError), NoLooking():
        sampler.result()


def test_a_thinned_sample_is_the_smaller_sample_that_would_have_been_drawn():
    x, usable = randn(7, 1, 300, 4), torch.ones(300, dtype=torch.bool)

    def drawn(tokens):
        sampler = TokenSampler(SampleOptions(tokens))
        sampler.add([x], usable)
        return sampler.result()

    small, cut = drawn(20), thinned(drawn(50), 20)
    assert torch.equal(cut.rows, small.rows) and float(cut.weights.std()) == 0
    assert float(cut.weights.sum()) == pytest.approx(float(drawn(50).weights.sum()))
    assert thinned(small, 20) is small
