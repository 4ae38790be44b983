"""OSRM Refit against dense float64 references: each mode's formula, the report, and what stays unchanged."""

from dataclasses import replace

import pytest
import torch
from helpers import F64, LAYER, SKETCH, TOKENS, decaying, linear64, lora, moments_of, randn, rel, rng, task
from torch import nn

from ssr_core import Adapter, IncompatibleError, LoRALayer, Target
from ssr_core.input_hooks import InputLayer
from ssr_core.input_taps import InputCollector
from ssr_core.moments import MomentOptions
from ssr_core.osrm_layer import REFIT_MODES, RefitOptions, energy, refit_layer
from ssr_core.osrm_refit import osrm_refit, refit_markdown

EYE = torch.eye


def test_energy_is_that_of_the_dense_outputs():
    x, a, b = randn(10, 1, 50, 12), lora(1, 9, 12, 3, alpha=1.5), lora(2, 9, 12, 3)
    moments = moments_of(x)
    assert energy(a, moments).low == pytest.approx(float((x[0] @ a.delta().T).square().sum()) / 50)
    assert energy(a, moments, b).low == pytest.approx(float((x[0] @ (a.delta() - b.delta()).T).square().sum()) / 50)


def test_analytic_is_the_papers_closed_form():
    x, layer = randn(11, 1, 300, 12) * torch.linspace(1, 3, 12, dtype=F64), lora(3, 9, 12, 3, alpha=1.5)
    found = refit_layer(layer, None, moments_of(x), RefitOptions("analytic", energy=1.0), rng(0))
    _, _, vh = torch.linalg.svd(x[0])
    down = vh[-3:]
    expected = layer.delta() @ torch.linalg.pinv(down) @ down
    assert rel(found.delta(), expected) < 1e-9 and found.alpha == layer.alpha and found.rank == layer.rank


def test_project_removes_a_share_of_the_top_directions():
    x, layer = decaying(12, 300, 12, 0.6), lora(4, 9, 12, 3)
    moments = moments_of(x)
    _, s, vh = torch.linalg.svd(x[0])
    top = vh[: int(((s**2).cumsum(0) / (s**2).sum() < 0.9).sum()) + 1]
    found = refit_layer(layer, None, moments, RefitOptions("project", 0.75, 0.9), rng(0))
    assert rel(found.delta(), layer.delta() @ (EYE(12, dtype=F64) - 0.75 * top.T @ top)) < 1e-9


@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_contrast_minimises_own_change_plus_interference(strength):
    own, others, layer = decaying(13, 300, 12, 0.8), decaying(14, 200, 12, 0.8), lora(5, 9, 12, 3)
    found = refit_layer(
        layer, moments_of(own), moments_of(others), RefitOptions("contrast", strength, ridge=1e-9), rng(0)
    )
    a, b = own[0] / 300**0.5, others[0] * (strength / 200) ** 0.5
    rows, targets = torch.cat([a, b]), torch.cat([a @ layer.delta().T, torch.zeros(200, 9, dtype=F64)])
    expected = torch.linalg.lstsq(rows, targets).solution.T  # every dW at all, none does better
    assert rel(found.delta(), expected) < 1e-6
    assert rel(found.up, layer.up) == 0


@pytest.mark.parametrize("options", [TOKENS, SKETCH], ids=["exact", "sketch"])
def test_contrast_with_sketches_is_contrast_where_their_rank_suffices(options):
    own, others = randn(15, 1, 90, 4) @ randn(16, 4, 40), randn(17, 1, 90, 5) @ randn(18, 5, 40)
    layer = lora(6, 9, 40, 3)
    found = refit_layer(layer, moments_of(own, options), moments_of(others, options), RefitOptions(), rng(0))
    c_t, c_o = own[0].T @ own[0] / 90, others[0].T @ others[0] / 90
    ridge = RefitOptions().ridge * float((c_t + c_o).trace()) / 40 * EYE(40, dtype=F64)
    expected = layer.delta() @ (c_t + ridge) @ torch.linalg.inv(c_t + c_o + ridge)
    assert rel(found.delta(), expected) < 1e-6


@pytest.mark.parametrize(
    ("mode", "moments"),
    [("contrast", TOKENS), ("contrast", SKETCH), ("project", TOKENS), ("project", SKETCH), ("analytic", TOKENS)],
)
def test_refit_of_an_orthogonal_pair_changes_nothing(mode, moments):
    """Each LoRA reads a space of its own, and each task's inputs lie in its LoRA's space and a shared rest."""
    frame = torch.linalg.qr(randn(19, 30, 30))[0].T
    spaces = frame[:3], frame[3:6]
    adapters = [
        Adapter(f"lora{k}", f"lora{k}", {LAYER: LoRALayer(randn(20 + k, 3, 3) @ spaces[k], randn(30 + k, 9, 3), 2.0)})
        for k in range(2)
    ]
    inputs = [randn(40 + k, 1, 80, 3) @ spaces[k] for k in range(2)]
    if mode == "analytic":  # its down is unique only where the others' inputs fill all but the LoRA's own space
        inputs = [randn(40 + k, 1, 80, 27) @ torch.cat([frame[:3] if k else frame[3:6], frame[6:]]) for k in (1, 0)]
    gathered = [{LAYER: moments_of(x, moments)} for x in inputs]
    result = osrm_refit(adapters, gathered, RefitOptions(mode, energy=1.0))
    for old, new, report in zip(adapters, result.adapters, result.reports, strict=True):
        assert rel(new.layers[LAYER].delta(), old.layers[LAYER].delta()) < 1e-9
        assert report.interference[0].high < 1e-9


def test_reports_are_the_dense_truth_and_contrast_keeps_more_than_the_paper():
    layers = [lora(k, 9, 24, 3) for k in (50, 51)]
    adapters = [Adapter(f"lora{k}", f"lora{k}", {LAYER: layers[k]}) for k in range(2)]
    inputs = [decaying(60 + k, 400, 24, 0.7) for k in range(2)]
    gathered = [{LAYER: moments_of(x)} for x in inputs]
    reports = {}
    for mode in REFIT_MODES:
        result = osrm_refit(adapters, gathered, RefitOptions(mode, energy=0.9))
        reports[mode] = result.reports
        for k in range(2):
            own, other = inputs[k][0], inputs[1 - k][0]
            old, new = layers[k].delta(), result.adapters[k].layers[LAYER].delta()
            function = float((own @ old.T).square().sum())
            (row,) = result.reports[k].layers
            assert row.kept.low == pytest.approx(1 - float((own @ (new - old).T).square().sum()) / function)
            assert row.before.low == pytest.approx(float((other @ old.T).square().sum()) / function)
            assert row.after.low == pytest.approx(float((other @ new.T).square().sum()) / function, abs=1e-12)
            assert row.after.high < row.before.low
    for k in range(2):
        kept = {mode: reports[mode][k].kept.low for mode in REFIT_MODES}
        assert kept["contrast"] > kept["project"] and kept["contrast"] > kept["analytic"]
    text = refit_markdown(reports["analytic"], RefitOptions("analytic"))
    assert "Warning: lora0 loses most of its own function" in text and "lora1" in text


def test_a_layer_that_no_other_pass_reached_is_unchanged_and_named():
    layer = lora(1, 9, 12, 3)
    adapters = [Adapter("a", "a", {LAYER: layer}), Adapter("b", "b", {})]
    result = osrm_refit(adapters, [{LAYER: moments_of(randn(0, 1, 9, 12))}, {}], RefitOptions())
    assert result.adapters[0].layers[LAYER] is layer
    assert "1 layer unchanged (no other LoRA's pass reached them), e.g. layer" in refit_markdown(
        result.reports, RefitOptions()
    )


@pytest.mark.parametrize(
    ("mode", "strength", "share"), [("project", 1.5, 0.9), ("contrast", -1, 0.9), ("project", 1, 0)]
)
def test_meaningless_options_are_refused(mode, strength, share):
    with pytest.raises(IncompatibleError, match="has no meaning"):
        RefitOptions(mode, strength, share)


def test_slices_of_a_module_are_refit_by_the_modules_inputs():
    whole = lora(1, 8, 12, 3)
    parts = {
        Target("layer", (0, 4)): replace(whole, up=whole.up[:4]),
        Target("layer", (4, 4)): replace(whole, up=whole.up[4:]),
    }
    moments = [{LAYER: moments_of(decaying(80 + k, 90, 12, 0.8))} for k in range(2)]
    rest = Adapter("b", "b", {})
    fused = osrm_refit([Adapter("a", "a", {LAYER: whole}), rest], moments, RefitOptions()).adapters[0]
    split = osrm_refit([Adapter("a", "a", parts), rest], moments, RefitOptions()).adapters[0]
    assert rel(torch.cat([split.layers[t].delta() for t in parts]), fused.layers[LAYER].delta()) < 1e-12


def test_collected_inputs_are_those_with_the_own_lora_active():
    """The second layer's inputs depend on what the LoRA adds to the first."""
    torch.manual_seed(0)
    model = nn.Sequential(linear64(5, 6), linear64(6, 4))
    one, x = lora(1, 6, 5, 2, alpha=3.0), randn(2, 7, 5)
    layers = [InputLayer(Target("0"), 5, 6), InputLayer(Target("1"), 6, 4)]
    collector = InputCollector(layers, MomentOptions("tokens"), tasks=[task("a", {Target("0"): one}, strength=0.5)])
    with collector.task(0) as tap, tap.attached(model):
        model(x)
    hidden = model[0](x) + 0.5 * x @ one.delta().T
    assert rel(collector.moments(0)[Target("1")].total, hidden.T @ hidden) < 1e-12
    assert rel(collector.moments(0)[Target("0")].total, x.T @ x) < 1e-12
