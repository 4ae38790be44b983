"""Conversion is done once: SSR Solve takes it over, a saved calibration keeps its options, Cancel leaves nothing."""

import json

import pytest

from .adapter_files import ConversionGraph, adapter_file, change_errors, changed_weights
from .graphs import Graph
from .test_conversion import other_file
from .test_interrupt import state_of
from .weights import base_weights, dumped

FAMILY = "flux"


def probe(server, tag, delay=0.0):
    """Dense changes since the last probe."""
    graph = Graph()
    node = graph.add("ConversionProbe", delay=delay, tag=tag)
    return json.loads(server.run(graph.prompt).ok().text(node))


def calibrated(server, files, **convert):
    graph = ConversionGraph(server, FAMILY, **convert)
    model = graph.checkpoint(FAMILY)
    return graph, model, graph.of(*files, kind="SSRCalibrate", model=model)


def solved(server, files, prefix, **options):
    graph, model, calibration = calibrated(server, files)
    graph.dump(graph.pack("SSRSolve", {"model": model, "calibration": calibration} | options), prefix)
    return server.run(graph.prompt).ok()


def chained(server, base, files, prefix):
    """Core's loaders; the weights that they give."""
    core = ConversionGraph(server, FAMILY)
    core.dump(core.chain(*files), prefix)
    server.run(core.prompt).ok()
    return dumped(base, prefix)


def assert_same(base, core):
    errors = change_errors(dumped(base, "conv_ours"), core, base_weights(base, FAMILY))
    assert set(errors) >= changed_weights(FAMILY) and max(errors.values()) < 1e-5


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_solve_at_other_strengths_converts_nothing_again(server, base, kind):
    (file, _), other = files = [(adapter_file(base, FAMILY, kind, 5), 1.0), (other_file(base, FAMILY), 0.8)]
    core = {s: chained(server, base, [(file, s), other], "conv_core") for s in (1.0, 0.5, -0.25)}
    probe(server, f"start {kind}")
    for strength, expected in core.items():
        solved(server, files, "conv_ours", mode="sum", strengths=f"{strength}\n0.8")
        assert_same(base, expected)
    assert probe(server, f"end {kind}") == len(changed_weights(FAMILY))  # the calibration's own


@pytest.mark.parametrize("kind", ["oft", "difference"])
def test_kinds_that_bend_are_converted_at_each_strength(server, base, kind):
    """Their change at another strength is not a multiple; these two keep its directions."""
    (file, _), other = files = [(adapter_file(base, FAMILY, kind, 6), 1.0), (other_file(base, FAMILY), 0.8)]
    solved(server, files, "conv_ours", mode="sum", strengths="0.5\n0.8")
    assert_same(base, chained(server, base, [(file, 0.5), other], "conv_core"))


def test_a_change_of_other_directions_at_another_strength_needs_a_calibration(server, base):
    files = [(adapter_file(base, FAMILY, "boft", 6), 1.0), (other_file(base, FAMILY), 0.8)]
    graph, model, calibration = calibrated(server, files)
    graph.dump(graph.pack("SSRSolve", model=model, calibration=calibration, strengths="0.5\n0.8"), "conv_ours")
    result = server.run(graph.prompt)
    assert result.status == "error" and "calibrate again" in result.error


def test_another_model_converts_again(server, base):
    """The factors of a LoKr come out the same; those of a GLoRA, which depend on the weights, do not."""
    other = other_file(base, FAMILY)
    for kind in ("lokr", "glora"):
        files = [(adapter_file(base, FAMILY, kind, 7), 1.0), (other, 0.8)]
        graph, model, calibration = calibrated(server, files)
        changed = graph.core_lora(model, other, 0.5)
        graph.dump(graph.pack("SSRSolve", model=changed, calibration=calibration, mode="sum"), "conv_ours")
        probe(server, f"before {kind}")
        result = server.run(graph.prompt)
        assert probe(server, f"after {kind}") == 2 * len(changed_weights(FAMILY))
        if kind == "lokr":
            result.ok()
            assert_same(base, chained(server, base, [(other, 0.5), *files], "conv_core"))
        else:
            assert result.status == "error" and "calibrate again" in result.error


def test_a_saved_calibration_keeps_the_conversion_options(server, base):
    files = [(adapter_file(base, FAMILY, "lokr", 8), 1.0), (other_file(base, FAMILY), 0.8)]
    graph = ConversionGraph(server, FAMILY, convert_rank=3, convert_error=0.01, residual="drop")
    merged = graph.of(*files)
    graph.dump(merged, "conv_core")
    graph.pack("SSRSaveCalibration", calibration=merged.out(3), filename_prefix="converted")
    server.run(graph.prompt).ok()
    listed = server.schemas(refresh=True)["SSRLoadCalibration"]["input"]["required"]["calibration"][1]["options"]
    again = ConversionGraph(server, FAMILY)
    loaded = again.pack("SSRLoadCalibration", calibration=next(name for name in listed if "converted" in name))
    merge = again.pack("SSRSolve", model=again.checkpoint(FAMILY), calibration=loaded)
    report = again.add("PreviewAny", source=merge.out(3))
    again.dump(merge, "conv_ours")
    text = server.run(again.prompt).ok().text(report)
    errors = change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), base_weights(base, FAMILY))
    assert set(errors) == changed_weights(FAMILY) and max(errors.values()) < 1e-5
    assert "turned into rank 3" in text and "is lost" in text


def test_cancel_during_conversion_leaves_the_model_as_it_was(server, base):
    before = state_of(server, FAMILY, "conv_cancel_before")
    files = [(adapter_file(base, FAMILY, "dora", 9), 1.0), (other_file(base, FAMILY), 0.8)]
    probe(server, "slow", delay=0.5)
    try:
        graph = ConversionGraph(server, FAMILY)
        merged = graph.of(*files)
        graph.add("PreviewAny", source=merged)
        prompt = server.submit(graph.prompt)
        server.wait_event(prompt, lambda kind, data: kind == "progress" and data["node"] == merged.id and data["value"])
        server.interrupt()
        assert server.wait(prompt, timeout=60).status == "interrupted"
    finally:
        calls = probe(server, "fast again")
    assert 0 < calls < len(changed_weights(FAMILY))
    assert state_of(server, FAMILY, "conv_cancel_after") == before
    again = ConversionGraph(server, FAMILY)
    again.dump(again.of(*files, mode="sum"), "conv_ours")
    server.run(again.prompt).ok()
