"""SSR Report, SSR Compare and the report beside a saved LoRA, through the real server."""

import json
import re

import numpy
import pytest
from PIL import Image

from .loras import family_lora
from .merging import MergeGraph, Task, pair, summed
from .test_save import saved_name
from .weights import assert_added, base_weights, dumped

FAMILY, CASE = "flux", "flux-fused-split"


def report_of(graph, source):
    """The report behind a merge's LORA_MODEL, as JSON."""
    return graph.add("DumpReport", lora=source)


def read(result, node):
    return json.loads(result.text(node))


def shown(graph, node, index):
    return graph.add("PreviewAny", source=node.out(index))


def section(text, title):
    """Lines of one section of a report in Markdown."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0].strip()


def pictures(base, result, node):
    names = [image["filename"] for image in result.outputs[node.id]["images"]]
    return [numpy.asarray(Image.open(next(base.rglob(name))).convert("RGB")) for name in names]


def test_report_of_a_merge_in_pictures_and_words(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    nodes = {theme: graph.pack("SSRReport", lora=merged.out(2), theme=theme) for theme in ("light", "dark")}
    texts = [shown(graph, nodes["light"], 1), shown(graph, merged, 4)]
    result = server.run(graph.prompt).ok()
    text, own = (result.text(node) for node in texts)
    assert text == own and "held-out" in text
    assert text.split("## ")[-1].startswith("What to do next")
    for theme, node in nodes.items():
        pages = pictures(base, result, node)
        assert len(pages) == 4 and len({page.shape for page in pages}) == 1
        for page in pages:
            assert (page[0, 0].mean() > 128) == (theme == "light")
            assert len(numpy.unique(page.reshape(-1, 3), axis=0)) > 20


def test_report_before_merging_is_what_the_merge_says_after_it(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    model = graph.checkpoint(family)
    calibration = graph.merge(family, tasks, "SSRCalibrate", model=model)
    before = shown(graph, graph.pack("SSRReport", {"calibration": calibration, "model": model}), 1)
    after = shown(graph, graph.pack("SSRSolve", {"calibration": calibration, "model": model}), 3)
    result = server.run(graph.prompt).ok()
    before, after = result.text(before), result.text(after)
    for title in ("Layers", "Reconstruction error", "Crosstalk", "Compatibility", "Map of the model"):
        assert section(before, title).replace("mode ssr (forecast)", "this merge") == section(after, title)
    assert "nothing was merged" in before and "nothing was merged" not in after


def test_report_of_nothing_of_a_stranger_and_without_a_model_say_what_to_connect(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    graph.pack("SSRReport")
    result = server.run(graph.prompt)
    assert result.status == "error" and "LORA_MODEL" in result.error
    graph = MergeGraph(server)
    graph.pack("SSRReport", lora=graph.add("LoraModelFromFile", name=tasks[0].file.name))
    result = server.run(graph.prompt)
    assert result.status == "error" and "does not come from SSR-Merge" in result.error
    graph = MergeGraph(server)
    graph.pack("SSRReport", calibration=graph.merge(family, tasks, "SSRCalibrate"))
    result = server.run(graph.prompt)
    assert result.status == "error" and "connect the MODEL" in result.error


# ---------------------------------------------------------------- comparing


def compared(server, tasks, **options):
    graph = MergeGraph(server)
    model = graph.checkpoint(FAMILY)
    calibration = graph.merge(FAMILY, tasks, "SSRCalibrate", model=model)
    node = graph.pack("SSRCompare", {"model": model, "calibration": calibration} | options)
    return graph, model, calibration, node


def rows_of(text):
    """Cells of a comparison's lines, by the method as it was written."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    cells = [[cell.strip(" *").removesuffix(" (best)") for cell in line.strip("|").split("|")] for line in lines]
    return {row[1]: row[2:] for row in cells}


def over_shared_layers(report, reports, name):
    """Root mean square over the layers that all of these reports measured: a comparison is about no others."""
    sets = [{layer["target"] for layer in one["layers"] if layer[name]} for one in reports]
    shared = set.intersection(*sets)
    assert 0 < len(shared) < len(set.union(*sets)), "NP-LoRA cannot be measured where rows are divided"
    return numpy.sqrt(
        numpy.mean([layer[name]["result"] ** 2 for layer in report["layers"] if layer["target"] in shared])
    )


METHODS = ("ssr", "ssr ridge=0.5 anchor=gains", "paper", "gains", "sum", "average", "np_lora mu=1")


def test_a_comparison_has_the_numbers_of_each_method_alone(server, base):
    _, tasks = pair(base, CASE)
    graph, model, calibration, node = compared(server, tasks, methods="\n".join(METHODS) + "\n# nothing\n\nosrm")
    table = shown(graph, node, 3)
    alone = {
        "ssr": {},
        "ssr ridge=0.5 anchor=gains": {"ridge": 0.5, "anchor": "gains"},
        "paper": {"mode": "paper"},
        "sum": {"mode": "sum"},
        "np_lora": {"mode": "np_lora"},
    }
    solved = {
        label: report_of(graph, graph.pack("SSRSolve", {"model": model, "calibration": calibration} | values).out(2))
        for label, values in alone.items()
    }
    result = server.run(graph.prompt).ok()
    text = result.text(table)
    rows = rows_of(text)
    assert tuple(rows) == (*METHODS, "osrm") and "osrm: not applicable" in text
    reports = {label: read(result, source) for label, source in solved.items()}
    for label in solved.keys() & rows.keys():
        expected = [over_shared_layers(reports[label], reports.values(), name) for name in ("held_errors", "errors")]
        assert [float(value) for value in rows[label][:2]] == pytest.approx(expected, abs=6e-4)
    assert "Ranked by held-out error" in text and text.count("(best)") == 1
    assert text.split("## ")[-1].startswith("What to do next")
    (page,) = pictures(base, result, node)
    assert len(numpy.unique(page.reshape(-1, 3), axis=0)) > 20


def test_methods_that_cannot_measure_every_layer_say_how_many(server, base):
    """NP-LoRA has no single router where one LoRA is fused and the other has q, k and v apart."""
    _, tasks = pair(base, CASE)
    graph, _, _, node = compared(server, tasks, methods="np_lora mu=1\nsum")
    table = shown(graph, node, 3)
    text = server.run(graph.prompt).ok().text(table)
    assert re.search(r"Measured by every method: [1-9]\d* of \d+ layers\. The others are left out", text)
    assert all(float(value) >= 0 for row in rows_of(text).values() for value in row)


def test_the_best_is_handed_on_unless_another_is_chosen(server, base):
    _, tasks = pair(base, CASE)
    for choose in ("2", "sum"):
        graph, _, _, node = compared(server, tasks, methods="ssr\nsum\naverage", choose=choose)
        graph.dump(node, "compare_sum")
        server.run(graph.prompt).ok()
        assert_added(dumped(base, "compare_sum"), base_weights(base, FAMILY), summed(tasks), tolerance=2e-5)
    graph, model, calibration, node = compared(server, tasks, methods="sum\nssr\naverage")
    graph.dump(node, "compare_best")
    table = shown(graph, node, 3)
    rows = rows_of(server.run(graph.prompt).ok().text(table))
    best = min(rows, key=lambda label: float(rows[label][0]))
    graph.dump(graph.pack("SSRSolve", model=model, calibration=calibration, mode=best), "solve_best")
    server.run(graph.prompt).ok()
    before, solved = base_weights(base, FAMILY), dumped(base, "solve_best")
    deltas = {name: solved[name].double() - before[name].double() for name in summed(tasks)}
    assert_added(dumped(base, "compare_best"), before, deltas, tolerance=1e-6)


def test_one_lora_alone_refuses_np_lora_and_the_rest_go_on(server, base):
    _, tasks = pair(base, CASE)
    graph, _, _, node = compared(server, tasks, methods="np_lora\nsum", strengths="1\n0")
    table = shown(graph, node, 3)
    text = server.run(graph.prompt).ok().text(table)
    assert "np_lora: not applicable" in text and "at least two LoRAs" in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"choose": "9"}, "choose"),
        ({"choose": "nothing"}, "choose"),
        ({"methods": "\n# none\n"}, "nothing to compare"),
        ({"methods": "osrm"}, "none of the methods applies"),
        ({"methods": "sum\nties"}, "there is no method 'ties'"),
        ({"methods": "sum\nssr ridge=much", "choose": "2"}, "ridge"),
    ],
)
def test_what_cannot_be_compared_is_said(server, base, options, word):
    _, tasks = pair(base, CASE)
    graph, _, _, node = compared(server, tasks, **options)
    graph.dump(node, "never")
    result = server.run(graph.prompt)
    assert result.status == "error" and word in result.error and "SSR-Merge" in result.error


# ---------------------------------------------------------------- beside a saved LoRA


def test_a_saved_lora_has_its_report_beside_it(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    saved, dump = graph.save(merged, "with_report"), report_of(graph, merged.out(2))
    result = server.run(graph.prompt).ok()
    path = base / "output" / "loras" / saved_name(result, saved)
    found = json.loads(path.with_name(path.stem + ".report.json").read_text(encoding="utf-8"))
    assert found == read(result, dump) and found["layers"] and found["map"]


def test_no_report_if_so_wanted_and_none_for_other_loras(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    values = {"filename_prefix": "loras/without_report", "key_style": "comfy"}
    graph.pack("SSRSaveLoRA", lora=merged.out(2), report=False, **values)
    foreign = graph.add("LoraModelFromFile", name=tasks[0].file.name)
    graph.pack("SSRSaveLoRA", lora=foreign, filename_prefix="loras/foreign_report", key_style="comfy")
    server.run(graph.prompt).ok()
    folder = base / "output" / "loras"
    assert list(folder.glob("without_report_*.safetensors")) and list(folder.glob("foreign_report_*.safetensors"))
    assert not list(folder.glob("*without_report*.json")) and not list(folder.glob("*foreign_report*.json"))


def test_a_loud_lora_is_named_with_the_strength_that_balances_it(server, base):
    quiet, loud = (family_lora(base, FAMILY, "native", seed=seed, name=f"loud_{seed}") for seed in (121, 122))
    tasks = [Task(quiet, 1.0, 901), Task(loud, 5.0, 902)]
    graph = MergeGraph(server)
    merged = graph.merge(FAMILY, tasks)
    dump = report_of(graph, merged.out(2))
    advice = read(server.run(graph.prompt).ok(), dump)["advice"]
    assert any(one.startswith(f"{loud.name} carries") and "(now 5)" in one for one in advice), advice
