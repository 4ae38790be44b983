"""Layer inputs gathered by real hooks: shared, masked, weighted, and never half there."""

import pytest
import torch
from helpers import F64, TOKENS, linear64, moments_of, patches, randn, rel
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
