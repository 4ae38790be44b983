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


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_solve_at_other_strengths_converts_nothing_again(server, base, kind):
    files = [(adapter_file(base, FAMILY, kind, 5), 1.0), (other_file(base, FAMILY), 0.8)]
    probe(server, f"start {kind}")
    solved(server, files, "conv_ours", mode="sum")
    assert probe(server, f"first {kind}") == len(changed_weights(FAMILY))
    for strength in (0.5, -0.25):
        solved(server, files, "conv_ours", mode="sum", strengths=f"{strength}\n0.8")
        core = ConversionGraph(server, FAMILY)
        core.dump(core.chain((files[0][0], strength), files[1]), "conv_core")
        server.run(core.prompt).ok()
        errors = change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), base_weights(base, FAMILY))
        assert set(errors) == changed_weights(FAMILY) and max(errors.values()) < 1e-5
    assert probe(server, f"then {kind}") == 0


@pytest.mark.parametrize("kind", ["oft", "boft", "difference"])
def test_kinds_that_bend_are_converted_at_each_strength(server, base, kind):
    files = [(adapter_file(base, FAMILY, kind, 6), 1.0), (other_file(base, FAMILY), 0.8)]
    solved(server, files, "conv_ours", mode="sum", strengths="0.5\n0.8")
    core = ConversionGraph(server, FAMILY)
    core.dump(core.chain((files[0][0], 0.5), files[1]), "conv_core")
    server.run(core.prompt).ok()
    errors = change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), base_weights(base, FAMILY))
    assert max(errors.values()) < 1e-5


def test_another_model_converts_again(server, base):
    files = [(adapter_file(base, FAMILY, "glora", 7), 1.0), (other_file(base, FAMILY), 0.8)]
    graph, model, calibration = calibrated(server, files)
    changed = graph.core_lora(model, other_file(base, FAMILY), 0.5)
    graph.dump(graph.pack("SSRSolve", model=changed, calibration=calibration, mode="sum"), "conv_ours")
    probe(server, "before other model")
    server.run(graph.prompt).ok()
    assert probe(server, "after other model") == 2 * len(changed_weights(FAMILY))
    core = ConversionGraph(server, FAMILY)
    core.dump(core.chain((other_file(base, FAMILY), 0.5), *files), "conv_core")
    server.run(core.prompt).ok()
    errors = change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), base_weights(base, FAMILY))
    assert max(errors.values()) < 1e-5


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
