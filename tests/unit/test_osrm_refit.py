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
from ssr_core.osrm_layer import REFIT_MODES, RefitOptions, energy, refit_layer, white_energy
from ssr_core.osrm_refit import compare, osrm_refit, refit_markdown

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


COARSE = MomentOptions("tokens", exact_limit=0, sketch=24)


def slowly_decaying():
    """Two LoRAs and inputs of 256 directions with eigenvalues 1/k, of which a sketch of 24 knows a part."""
    adapters = [Adapter(f"lora{k}", f"lora{k}", {LAYER: lora(90 + k, 32, 256, 4)}) for k in range(2)]
    sizes = torch.arange(1, 257, dtype=F64) ** -0.5
    frames = [torch.linalg.qr(randn(92 + k, 256, 256))[0] for k in range(2)]
    return adapters, [(randn(94 + k, 800, 256) * sizes @ frames[k].T)[None] for k in range(2)]


@pytest.mark.parametrize("mode", REFIT_MODES)
def test_the_report_of_sketched_layers_is_a_range_that_holds_the_truth(mode):
    adapters, inputs = slowly_decaying()
    options = RefitOptions(mode)
    result = osrm_refit(adapters, [{LAYER: moments_of(x, COARSE)} for x in inputs], options)
    for k, report in enumerate(result.reports):
        own, other = inputs[k][0], inputs[1 - k][0]
        old, new = (one.layers[LAYER].delta() for one in (adapters[k], result.adapters[k]))
        function = float((own @ old.T).square().sum())
        truth = {
            "kept": 1 - float((own @ (new - old).T).square().sum()) / function,
            "before": float((other @ old.T).square().sum()) / function,
            "after": float((other @ new.T).square().sum()) / function,
        }
        (row,) = report.layers
        for name, value in truth.items():
            low, high = getattr(row, name)
            assert low < value < high, name
    text = refit_markdown(result.reports, options)
    assert " to " in text and "wide layers are sketched" in text
    exact = osrm_refit(adapters, [{LAYER: moments_of(x)} for x in inputs], options)
    assert "sketched" not in refit_markdown(exact.reports, options)


def test_contrast_under_a_sketch_spreads_what_it_does_not_know_and_does_better_for_it():
    adapters, inputs = slowly_decaying()
    moments = [moments_of(x, COARSE).per_token() for x in inputs]
    eye, truth = EYE(256, dtype=F64), [x[0].T @ x[0] / 800 for x in inputs]
    known = [(m.spectrum.vectors * m.spectrum.values) @ m.spectrum.vectors.T for m in moments]
    outside = [eye - m.spectrum.vectors @ m.spectrum.vectors.T for m in moments]
    filled = [c + m.spectrum.rest / float(p.trace()) * p for c, m, p in zip(known, moments, outside, strict=True)]
    ridge = RefitOptions().ridge * float((truth[0] + truth[1]).trace()) / 256 * eye
    old = adapters[0].layers[LAYER]
    found = refit_layer(old, moments[0], moments[1], RefitOptions(), rng(0)).delta()
    for (own, others), same in ((filled, True), (known, False)):
        delta = old.delta() @ (own + ridge) @ torch.linalg.inv(own + others + ridge)
        assert (rel(found, delta) < 1e-9) == same
    after, sketch_alone = (float((one @ truth[1] * one).sum()) for one in (found, delta))
    costs = [float(((one - old.delta()) @ truth[0] * (one - old.delta())).sum()) for one in (found, delta)]
    assert after < 0.5 * sketch_alone and after + costs[0] < 0.7 * (sketch_alone + costs[1])


def test_the_bound_of_an_energy_is_the_rest_times_the_largest_singular_value():
    adapters, inputs = slowly_decaying()
    a, b = (one.layers[LAYER] for one in adapters)
    moments = moments_of(inputs[0], COARSE)
    low, high = energy(a, moments, b)
    largest = float(torch.linalg.matrix_norm(a.delta() - b.delta(), 2))
    assert high - low == pytest.approx(moments.per_token().spectrum.rest * largest**2, rel=1e-9)


def test_without_own_inputs_weights_are_compared_and_said_so():
    layer, others = lora(1, 9, 12, 3), moments_of(decaying(70, 200, 12, 0.7))
    adapters = [Adapter("a", "a", {LAYER: layer}), Adapter("b", "b", {})]
    result = osrm_refit(adapters, [{}, {LAYER: others}], RefitOptions("project"))
    (row,) = result.reports[0].layers
    change = result.adapters[0].layers[LAYER].delta() - layer.delta()
    assert row.weights_only and row.kept.low == pytest.approx(1 - float(change.norm() ** 2 / layer.delta().norm() ** 2))
    assert "judged by weights" in refit_markdown(result.reports, RefitOptions("project"))
    contrast = osrm_refit(adapters, [{}, {LAYER: others}], RefitOptions("contrast", ridge=1e-9))
    c = others.total / 200
    white = float(c.trace()) / 12 * EYE(12, dtype=F64)
    expected = layer.delta() @ white @ torch.linalg.inv(white + c)
    assert rel(contrast.adapters[0].layers[LAYER].delta(), expected) < 1e-5


def test_a_layer_that_no_other_pass_reached_is_unchanged_and_named():
    layer = lora(1, 9, 12, 3)
    adapters = [Adapter("a", "a", {LAYER: layer}), Adapter("b", "b", {})]
    result = osrm_refit(adapters, [{LAYER: moments_of(randn(0, 1, 9, 12))}, {}], RefitOptions())
    assert result.adapters[0].layers[LAYER] is layer
    assert "1 layers unchanged (no other LoRA's pass reached them), e.g. layer" in refit_markdown(
        result.reports, RefitOptions()
    )


def test_tokens_that_are_not_finite_are_reported():
    x = decaying(71, 50, 12, 0.8)
    x[0, :3, 1] = torch.nan
    lost = torch.full_like(x, torch.inf)
    adapters = [Adapter(name, name, {LAYER: lora(1, 9, 12, 3), Target("b"): lora(2, 9, 12, 3)}) for name in ("a", "b")]
    shared, bad = moments_of(x), moments_of(lost)
    moments = [{LAYER: shared, Target("q"): shared, Target("b"): shared}, {LAYER: shared, Target("b"): bad}]
    first, second = osrm_refit(adapters, moments, RefitOptions()).reports
    assert sum(first.nonfinite.values()) == 3 and second.nonfinite == {LAYER: 3, Target("b"): 50}
    assert first.unchanged == {Target("b"): "all other LoRAs' inputs were NaN or infinite"} and not second.unchanged
    text = refit_markdown([first, second], RefitOptions())
    assert "Warning: b: 53 tokens were NaN or infinite and were left out, most of them in b. Run" in text
    clean = osrm_refit(adapters, [{LAYER: moments_of(decaying(k, 50, 12, 0.8))} for k in (1, 2)], RefitOptions())
    assert "NaN" not in refit_markdown(clean.reports, RefitOptions())


def test_white_inputs_are_no_matrix(monkeypatch):
    a, b = lora(1, 9, 12, 3, alpha=1.5), lora(2, 9, 12, 3)
    assert white_energy(a, 0.3, b).low == pytest.approx(0.3 * float((a.delta() - b.delta()).square().sum()))
    others = moments_of(decaying(72, 200, 256, 0.9), COARSE)
    old = lora(3, 9, 256, 3)
    new = replace(old, up=old.up + 0.1 * lora(4, 9, 256, 3).up)
    monkeypatch.setattr(torch, "eye", lambda *size, **more: pytest.fail("dense"))
    row = compare(LAYER, old, new, None, others)
    change, function = ((new.delta() - old.delta()).square().sum(), old.delta().square().sum())
    assert row.kept.low == row.kept.high == pytest.approx(1 - float(change / function))


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
