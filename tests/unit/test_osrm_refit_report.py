"""Reports of OSRM Refit: what is known under a sketch, what layers are judged by, and what was left out."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import F64, LAYER, decaying, lora, moments_of, randn, rel, rng

from ssr_core import Adapter, FileError, LoRALayer, Target, read_any, write_safetensors
from ssr_core.metadata import REFIT_KEY, refit_metadata
from ssr_core.moments import MomentOptions
from ssr_core.osrm_layer import REFIT_MODES, Range, RefitOptions, energy, refit_layer, white_energy
from ssr_core.osrm_refit import RefitLayerReport, RefitReport, compare, osrm_refit, refit_markdown

EYE = torch.eye


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
            low, likely, high = getattr(row, name)
            assert low < value < high and low < likely < high, name
            missed = 1 - likely if name == "kept" else likely
            assert missed == pytest.approx(1 - value if name == "kept" else value, rel=0.5), name
    text = refit_markdown(result.reports, options)
    assert " to " in text and "Wide layers are sketched" in text
    exact = osrm_refit(adapters, [{LAYER: moments_of(x)} for x in inputs], options)
    assert "estimates" not in refit_markdown(exact.reports, options)


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
    low, likely, high = energy(a, moments, b)
    change, known = a.delta() - b.delta(), moments.per_token().spectrum
    assert high - low == pytest.approx(known.rest * float(torch.linalg.matrix_norm(change, 2)) ** 2, rel=1e-9)
    outside = change - change @ known.vectors @ known.vectors.T
    spread = known.rest / (256 - len(known.values))  # evenly over all that the sketch does not know
    assert likely - low == pytest.approx(spread * float(outside.square().sum()), rel=1e-9)


def test_without_own_inputs_weights_are_compared_and_said_so():
    layer, others = lora(1, 9, 12, 3), moments_of(decaying(70, 200, 12, 0.7))
    adapters = [Adapter("a", "a", {LAYER: layer}), Adapter("b", "b", {})]
    result = osrm_refit(adapters, [{}, {LAYER: others}], RefitOptions("project"))
    (row,) = result.reports[0].layers
    change = result.adapters[0].layers[LAYER].delta() - layer.delta()
    assert row.judged_by == "never reached" and row.kept.low == pytest.approx(
        1 - float(change.norm() ** 2 / layer.delta().norm() ** 2)
    )
    assert "judged by weights" in refit_markdown(result.reports, RefitOptions("project"))
    contrast = osrm_refit(adapters, [{}, {LAYER: others}], RefitOptions("contrast", ridge=1e-9))
    c = others.total / 200
    white = float(c.trace()) / 12 * EYE(12, dtype=F64)
    expected = layer.delta() @ white @ torch.linalg.inv(white + c)
    assert rel(contrast.adapters[0].layers[LAYER].delta(), expected) < 1e-5


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


def test_layers_that_are_judged_by_weights_say_why():
    zero = replace(lora(1, 9, 12, 3), up=torch.zeros(9, 3, dtype=F64))
    blind = LoRALayer(EYE(12, dtype=F64)[:3], randn(73, 9, 3))
    names = ["zero", "silent", "lost", "unseen", "own"]
    targets = [Target(name) for name in names]
    layers = dict(zip(targets, [zero, blind, *[lora(4, 9, 12, 3)] * 3], strict=True))
    x = decaying(74, 60, 12, 0.8)
    away = x.clone()
    away[..., :3] = 0
    own = dict(zip(targets, map(moments_of, (x, away, torch.full_like(x, torch.nan))), strict=False))
    moments = [{**own, Target("own"): moments_of(x)}, {name: moments_of(decaying(75, 60, 12, 0.8)) for name in targets}]
    report = osrm_refit([Adapter("a", "a", layers), Adapter("b", "b", {})], moments, RefitOptions()).reports[0]
    assert report.unchanged == {targets[0]: "they change nothing: their product is zero"}
    judged = {row.target.module_path: row.judged_by for row in report.layers}
    assert judged == {"silent": "leave it silent", "lost": "not finite", "unseen": "never reached", "own": "inputs"}
    text = refit_markdown([report], RefitOptions())
    assert "1 layer was judged by weights; its own prompts never" in text and "they put out nothing" in text


def test_the_file_of_a_refit_lora_says_which_it_is_and_is_no_recipe(tmp_path):
    options, moments = RefitOptions("project", 0.5), MomentOptions("tokens")
    metadata = refit_metadata("dog.safetensors", "ab", ["a dog"], ["cat"], options, moments)
    about = json.loads(metadata[REFIT_KEY])
    assert about["source"] == {"name": "dog.safetensors", "sha256": "ab", "prompts": ["a dog"]}
    assert (about["others"], about["mode"], about["strength"]) == (["cat"], "project", 0.5)
    assert MomentOptions(**about["moments"]) == moments and "dog.safetensors" in metadata["modelspec.title"]
    path = tmp_path / "refit.safetensors"
    write_safetensors(path, {"x": torch.zeros(1)}, metadata)
    with pytest.raises(FileError):
        read_any(path)


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


@pytest.mark.parametrize("mode", REFIT_MODES)
def test_the_table_has_medians_no_nan_and_advice_of_its_mode(mode):
    def row(kept, after):
        return RefitLayerReport(
            LAYER,
            Range(kept, kept, kept),
            "inputs",
            Range(100 * after, 150 * after, 200 * after),
            Range(after, after, after),
        )

    rows = (row(0.25, 1.0), row(-9.0, 2.0), row(0.375, 1000.0))
    report, bare = RefitReport("a", rows, {}), RefitReport("b", (), {LAYER: "reason"})
    assert report.kept == (0.25, 0.25, 0.25) and report.interference == ((200, 300, 400), (2, 2, 2))
    text = refit_markdown([report, bare], RefitOptions(mode))
    assert "Medians" in text and "| a | 3 | 25 % | 300 (200 to 400) | 2 |" in text
    assert "| b | 0 | all | - | - |" in text and "nan" not in text
    warning = next(line for line in text.splitlines() if line.startswith("Warning: a loses most"))
    assert ("use mode contrast" in warning.lower()) == (mode != "contrast")
    assert ("Lower the strength" in warning) == (mode != "analytic")
    head = text.splitlines()[2]
    assert ("strength" in head, "energy" in head, "ridge" in head) == (
        mode != "analytic",
        mode != "contrast",
        mode == "contrast",
    )
