"""Second moments of layer inputs against dense float64 references, through real hooks."""

import pytest
import torch
from helpers import F64, SKETCH, TOKENS, decaying, linear64, moments_of, patches, randn, rel
from torch import nn

from ssr_core import CalibrationError, TextRows
from ssr_core.input_hooks import InputLayer, SharingError
from ssr_core.input_taps import InputCollector
from ssr_core.moments import InputMoments, MomentOptions, MomentsAccumulator
from ssr_core.targets import Target


def gather(root, layers, run, options=TOKENS, **more):
    collector = InputCollector(layers, options, **more)
    with collector.task(0) as tap, tap.attached(root):
        run(tap)
    return collector.moments(0)


def test_exact_moments_are_the_dense_product():
    x = randn(0, 2, 30, 7)
    found = moments_of(x)
    rows = x.flatten(0, 1)
    assert rel(found.total, rows.T @ rows) < 1e-12
    assert found.trace == pytest.approx(float((rows**2).sum())) and found.tokens == 60
    probe = randn(5, 3, 7)
    assert rel(found.gram_of(probe), (probe @ rows.T) @ (probe @ rows.T).T) < 1e-12


def test_means_are_taken_over_the_weighted_tokens_of_each_sample():
    x, weight = randn(1, 3, 20, 5), torch.rand(3, 20, generator=torch.Generator().manual_seed(1), dtype=F64)
    weight[2] = 0.0  # a sample with no token that counts
    found = moments_of(x, MomentOptions("means"), weight)
    means = (x * weight[..., None]).sum(1)[:2] / weight.sum(1)[:2, None]
    assert rel(found.total, means.T @ means) < 1e-12 and found.tokens == 2


@pytest.mark.parametrize("options", [TOKENS, SKETCH, MomentOptions("means")], ids=["exact", "sketch", "means"])
def test_moments_are_additive(options):
    first, second = randn(2, 4, 16, 40), randn(3, 3, 16, 40)
    whole = moments_of(torch.cat([first, second]), options)
    parts = moments_of(first, options) + moments_of(second, options)
    assert rel(parts.total, whole.total) < 1e-12
    assert parts.trace == pytest.approx(whole.trace, rel=1e-12) and parts.tokens == whole.tokens


def test_moments_of_different_size_do_not_add_up():
    with pytest.raises(CalibrationError, match="do not add up"):
        moments_of(randn(0, 1, 9, 40)) + moments_of(randn(0, 1, 9, 40), SKETCH)


@pytest.mark.parametrize("rate", [1.0, 0.95, 0.6])
def test_the_sketch_stays_below_the_truth_by_no_more_than_its_bound(rate):
    x = decaying(7, 300, 60, rate)
    exact, sketch = moments_of(x), moments_of(x, SKETCH)
    values, vectors, rest = sketch.spectrum
    known = (vectors * values) @ vectors.T
    gap = exact.total - known
    scale = float(exact.total.trace())
    assert float(torch.linalg.eigvalsh(gap).min()) > -1e-9 * scale  # C' <= C
    assert float(gap.trace()) == pytest.approx(rest, rel=1e-6, abs=1e-9 * scale)
    outside = torch.linalg.qr(torch.eye(60, dtype=F64) - vectors @ vectors.T)[0][:, : 60 - len(values)]
    assert float((outside.T @ exact.total @ outside).trace()) <= rest * (1 + 1e-9)


def test_the_sketch_is_exact_where_its_rank_suffices():
    x = randn(8, 1, 100, 10) @ randn(9, 10, 60)
    exact, sketch = moments_of(x), moments_of(x, SKETCH)
    values, vectors, rest = sketch.spectrum
    assert len(values) == 10 and rest < 1e-9 * exact.trace
    assert rel((vectors * values) @ vectors.T, exact.total) < 1e-9
    probe = randn(10, 4, 60)
    assert rel(sketch.gram_of(probe), exact.gram_of(probe)) < 1e-9


def test_float32_sketch_of_few_samples_finds_their_range():
    x = (randn(11, 1, 9, 3000) * 30).float()
    found = moments_of(x, MomentOptions("tokens", exact_limit=1024, sketch=64))
    _, vectors, rest = found.spectrum
    rows = x[0].double()
    left = rows - (rows @ vectors) @ vectors.T
    assert vectors.shape[1] == 9 and rest < 1e-4 * found.trace
    assert float(left.norm() / rows.norm()) < 1e-3


class Attention(nn.Module):
    """q, k, v of one tensor; o of another."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, linear64(6, 6))

    def forward(self, x, other=None):
        y = self.q(x) + self.k(x) + self.v(x if other is None else other)
        return self.o(y)


def attention_layers(order="qkvo"):
    return [InputLayer(Target(name), 6, 6) for name in order]


@pytest.mark.parametrize("order", ["qkvo", "kvoq", "ovkq"])
def test_layers_that_read_the_same_tensor_share_one_object(order):
    torch.manual_seed(0)
    model, x = Attention(), randn(12, 2, 5, 6)
    found = gather(model, attention_layers(order), lambda tap: [model(x), model(2 * x)])
    q, k, v, o = (found[Target(name)] for name in ("q", "k", "v", "o"))
    assert q is k and q is v and o is not q
    rows = x.flatten(0, 1)
    assert rel(q.total, 5 * rows.T @ rows) < 1e-12
    y = (model.q(x) + model.k(x) + model.v(x)).flatten(0, 1)
    y2 = (model.q(2 * x) + model.k(2 * x) + model.v(2 * x)).flatten(0, 1)
    assert rel(o.total, y.T @ y + y2.T @ y2) < 1e-12


def test_a_tensor_changed_in_place_is_not_shared():
    model, x = Attention(), randn(12, 2, 5, 6)
    before = x.clone().flatten(0, 1)

    def run(tap):
        model.q(x)
        x.mul_(3.0)
        model.k(x)

    found = gather(model, attention_layers()[:2], run)
    assert rel(found[Target("q")].total, before.T @ before) < 1e-12
    assert rel(found[Target("k")].total, 9 * before.T @ before) < 1e-12


def test_layers_that_part_ways_are_gathered_again_without_sharing():
    model, x, other = Attention(), randn(12, 2, 5, 6), randn(13, 2, 5, 6)
    steps = [lambda tap: [model(x), model(x, other)]]
    with pytest.raises(SharingError, match="share=False"):
        gather(model, attention_layers(), steps[0])
    found = gather(model, attention_layers(), steps[0], share=False)
    a, b = x.flatten(0, 1), other.flatten(0, 1)
    assert rel(found[Target("v")].total, a.T @ a + b.T @ b) < 1e-12
    assert rel(found[Target("q")].total, 2 * a.T @ a) < 1e-12


CONVOLUTIONS = [
    (nn.Conv2d(3, 4, 3, stride=2, padding=1), (9, 8)),
    (nn.Conv2d(2, 4, (3, 1), padding="same", padding_mode="circular"), (5, 6)),
    (nn.Conv2d(3, 4, (3, 5), padding=(0, 2)), (6, 7)),
    (nn.Conv1d(3, 4, 3, dilation=2, padding=2), (11,)),
    (nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 2)), (3, 4, 6)),
]


@pytest.mark.parametrize(("conv", "space"), CONVOLUTIONS[:1] + CONVOLUTIONS[2:])
def test_convolutions_gather_their_patches(conv, space):
    conv = conv.double().requires_grad_(False)
    x = randn(14, 2, conv.in_channels, *space)
    rows = patches(x, conv)
    layer = InputLayer(Target("layer"), rows.shape[1], conv.out_channels, conv.kernel_size)
    found = gather(nn.ModuleDict({"layer": conv}), [layer], lambda tap: conv(x))
    assert rel(found[Target("layer")].total, rows.T @ rows) < 1e-12 and found[Target("layer")].tokens == len(rows)


def test_patches_agree_with_the_convolution_itself():
    conv = CONVOLUTIONS[1][0].double().requires_grad_(False)
    x = randn(15, 2, 2, 5, 6)
    layer = InputLayer(Target("layer"), 6, 4, (3, 1))
    found = gather(nn.ModuleDict({"layer": conv}), [layer], lambda tap: conv(x))
    out = (conv(x) - conv.bias[:, None, None]).permute(0, 2, 3, 1).reshape(-1, 4)
    assert rel(found[Target("layer")].gram_of(conv.weight.flatten(1)), out.T @ out) < 1e-12


def test_nonfinite_tokens_are_left_out_and_counted():
    x = randn(16, 1, 8, 5)
    broken = x.clone()
    broken[0, 2, 1], broken[0, 5, 0] = float("nan"), float("inf")
    good = x[0, [0, 1, 3, 4, 6, 7]]
    found = moments_of(broken)
    assert found.nonfinite == 2 and found.tokens == 6 and rel(found.total, good.T @ good) < 1e-12
    means = moments_of(broken, MomentOptions("means"))
    assert rel(means.total, torch.outer(good.mean(0), good.mean(0))) < 1e-12


def test_padding_rows_are_weighted_as_in_calibration():
    layer = linear64(5, 5)
    root = nn.ModuleDict({"txt_in": layer})
    x, real = randn(17, 1, 6, 5), torch.tensor([True, True, False, False, False, False])

    def run(tap):
        tap.describe_text(TextRows(real))
        layer(x)

    found = gather(root, [InputLayer(Target("txt_in"), 5, 5)], run, padding="exclude")
    assert rel(found[Target("txt_in")].total, x[0, :2].T @ x[0, :2]) < 1e-12


def test_siblings_whose_rows_count_differently_do_not_share():
    root = nn.ModuleDict({"txt": linear64(5, 5), "img": linear64(5, 5)})
    x, real = randn(17, 1, 6, 5), torch.tensor([True, True, False, False, False, False])

    def run(tap):
        tap.describe_text(TextRows(real))
        for layer in root.values():
            layer(x)

    found = gather(root, [InputLayer(Target(name), 5, 5) for name in root], run, padding="exclude")
    assert rel(found[Target("txt")].total, x[0, :2].T @ x[0, :2]) < 1e-12
    assert rel(found[Target("img")].total, x[0].T @ x[0]) < 1e-12


@pytest.mark.parametrize("features", ["tokens", "means"])
def test_pieces_of_a_long_sequence_get_their_own_weights(features):
    x, weight = randn(20, 2, 30, 5), torch.rand(2, 30, generator=torch.Generator().manual_seed(2), dtype=F64)
    whole = moments_of(x, MomentOptions(features), weight)
    pieces = MomentsAccumulator(5, MomentOptions(features), None, x.device, x.dtype)
    pieces.add(x.split(7, dim=1), weight)
    assert rel(pieces.result().total, whole.total) < 1e-12


class Cancelled(BaseException):
    """As the host's Cancel: no Exception."""


def test_a_failed_pass_commits_nothing_and_leaves_no_hook():
    layer = linear64(5, 5)
    root = nn.ModuleDict({"layer": layer})
    collector = InputCollector([InputLayer(Target("layer"), 5, 5)], TOKENS)
    with pytest.raises(Cancelled), collector.task(0) as tap, tap.attached(root):
        layer(randn(18, 3, 5))
        raise Cancelled
    assert collector.moments(0) == {} and not layer._forward_pre_hooks and not layer._forward_hooks
    with collector.task(0) as tap, tap.attached(root):
        layer(randn(18, 3, 5))
    assert collector.moments(0)[Target("layer")].tokens == 3


def test_a_pass_that_reaches_no_layer_is_an_error():
    collector = InputCollector([InputLayer(Target("layer"), 5, 5)], TOKENS)
    with pytest.raises(CalibrationError, match="none of the 1 layers"), collector.task(0):
        pass


def test_sums_that_overflow_are_an_error_that_names_the_layer():
    layer = nn.Linear(5, 5)
    root = nn.ModuleDict({"layer": layer})
    with pytest.raises(CalibrationError, match=r"overflow.*layer"):
        gather(root, [InputLayer(Target("layer"), 5, 5)], lambda tap: layer(torch.full((1, 4, 5), 1e25)))


def test_inference_tensors_are_taken():
    model = Attention()
    with torch.inference_mode():
        x = randn(19, 2, 5, 6)
        found = gather(model, attention_layers(), lambda tap: model(x))
    assert found[Target("q")] is found[Target("k")]


def test_no_tokens_have_an_empty_spectrum():
    values, vectors, rest = InputMoments(torch.zeros(4, 4), 0.0, 0.0).spectrum
    assert values.numel() == 0 and vectors.shape == (4, 0) and rest == 0
