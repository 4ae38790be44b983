"""Calibrations that add up, and that LoRAs leave and join, through the real server."""

import pytest
import torch
from safetensors.torch import load_file

from .merging import MergeGraph
from .test_records import FAMILY, counts, distance, library, loras, run, saved

__all__ = ["library"]


def calibrations_of(base, prefix):
    (path,) = (base / "output" / "calibrations").glob(f"{prefix}_*.calibration.safetensors")
    return load_file(path)


def test_calibrations_made_apart_add_up(server, base):
    tasks = loras(base, 2)
    graph = MergeGraph(server)
    model, latent = graph.checkpoint(FAMILY), graph.latent(FAMILY)
    parts = [graph.merge(FAMILY, tasks, "SSRCalibrate", model=model, latent=latent, seed=s) for s in (1, 2)]
    sockets = {f"calibrations.calibration{i}": part for i, part in enumerate(parts)}
    whole = graph.pack("SSRCombineCalibrations", {"weights": "1 0.5"} | sockets)
    for name, node in (("comb_a", parts[0]), ("comb_b", parts[1]), ("comb_sum", whole)):
        graph.pack("SSRSaveCalibration", calibration=node, filename_prefix=name)
    graph.save(graph.pack("SSRSolve", model=model, calibration=whole), "comb")
    text = server.run(graph.prompt).ok().text(whole)
    assert "rec_flux_0" in text and "rec_flux_1" in text
    assert len(saved(base, "comb")) > 10
    a, b, total = (calibrations_of(base, f"comb_{name}") for name in ("a", "b", "sum"))
    grams = [name for name in total if name.endswith((".gram", ".tokens"))]
    assert len(grams) > 10
    for name in grams:
        assert torch.allclose(total[name].double(), a[name].double() + 0.5 * b[name].double(), rtol=1e-12, atol=1e-12)


def test_calibrations_of_other_loras_or_models_are_refused(server, base):
    tasks = loras(base)
    graph = MergeGraph(server)
    parts = [graph.merge(FAMILY, some, "SSRCalibrate") for some in (tasks[:2], tasks[1:])]
    sockets = {f"calibrations.calibration{i}": part for i, part in enumerate(parts)}
    graph.pack("SSRSaveCalibration", calibration=graph.pack("SSRCombineCalibrations", sockets), filename_prefix="no")
    error = server.run(graph.prompt).error
    assert "rec_flux_0.safetensors is only in the first" in error
    assert "rec_flux_2.safetensors is only in number 2" in error


@pytest.mark.parametrize("kind", ["SSRCalibrate", "SSRMergeFromRecords"])
def test_loras_leave_and_join_a_calibration(server, base, library, kind):
    tasks = loras(base)
    graph = MergeGraph(server)
    model, latent = graph.checkpoint(FAMILY), graph.latent(FAMILY)
    run(server, "SSRRecord", tasks[:2], exact_limit=4096)[0].ok()
    made = graph.merge(FAMILY, tasks[:2], kind, model=model, latent=latent)
    made = made if kind == "SSRCalibrate" else made.out(3)
    left = graph.pack("SSREditCalibration", calibration=made, drop="1")
    joined = graph.pack(
        "SSREditCalibration",
        {"loras.lora0": graph.lora(FAMILY, tasks[2])},
        calibration=made,
        drop="rec_flux_0",
        model=model,
        latent=latent,
        exact_limit=4096,
    )
    graph.add("PreviewAny", source=left.out(1))
    solved = graph.pack("SSRSolve", model=model, calibration=joined)
    graph.save(solved, "rec_joined")
    result = server.run(graph.prompt).ok()
    assert counts(result.text(joined)) == (1, 1)
    assert "No pass was run." in result.text(left) and "rec_flux_0" not in result.text(left)
    run(server, "SSRMerge", tasks[1:], "rec_whole")[0].ok()
    assert distance(saved(base, "rec_joined"), saved(base, "rec_whole")) < 0.02


@pytest.mark.parametrize("other", ["latent", "sigmas"])
def test_a_lora_joins_by_the_same_latent_and_sigmas_only(server, base, library, other):
    """Same shapes, other content: refused before a pass is run."""
    tasks, graph = loras(base, 3), MergeGraph(server)
    model, given = graph.checkpoint(FAMILY), {"latent": graph.latent(FAMILY)}
    given["sigmas"] = graph.first_sigmas(model, 2)
    made = graph.merge(FAMILY, tasks[:2], "SSRCalibrate", model=model, **given)
    if other == "latent":
        graph.sample(FAMILY, model, seed=3)
        given["latent"] = [next(key for key, node in graph.prompt.items() if node["class_type"] == "KSampler"), 0]
    else:
        schedule = graph.add("BasicScheduler", model=model, scheduler="simple", steps=10, denoise=1.0)
        given["sigmas"] = graph.add("SplitSigmas", sigmas=schedule, step=2).out(0)
    joined = graph.pack(
        "SSREditCalibration", {"loras.lora0": graph.lora(FAMILY, tasks[2])}, calibration=made, model=model, **given
    )
    graph.add("PreviewAny", source=joined.out(1))
    error = server.run(graph.prompt).error
    assert {"latent": "another LATENT", "sigmas": "its noise levels were"}[other] in error and not library.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": "3"}, "the calibration has no LoRA '3'"),
        ({"drop": "1\n2"}, "cannot be kept"),
        ({"drop": "rec"}, "write a number or a name of: 1 rec_flux_0.safetensors"),
    ],
)
def test_edits_that_make_no_sense_are_refused(server, base, options, words):
    graph = MergeGraph(server)
    made = graph.merge(FAMILY, loras(base, 2), "SSRCalibrate")
    graph.add("PreviewAny", source=graph.pack("SSREditCalibration", calibration=made, **options).out(1))
    assert words in server.run(graph.prompt).error
