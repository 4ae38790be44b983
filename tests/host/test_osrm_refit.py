"""OSRM Refit through the real server, against dense formulas on inputs that core's nodes recorded; Cancel of both."""

import json
from statistics import median

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .loras import family_lora
from .merging import MergeGraph, Task
from .osrm import FAMILIES, deltas, init, record
from .reference import Recording
from .test_interrupt import state_of
from .weights import assert_added, base_weights, dumped


def refit_loras(base, family):
    return [
        Task(family_lora(base, family, "kohya", seed=seed, name=f"refit_{family}_{seed}"), strength, text)
        for seed, strength, text in ((41, 1.0, 801), (42, 0.7, 802))
    ]


def refit(server, graph, family, tasks, **options):
    loras = [graph.lora(family, task) for task in tasks]
    model = graph.checkpoint(family)
    values = {"model": model, "latent": graph.latent(family), "sigmas": graph.first_sigmas(model, 1)}
    return graph.join("SSROSRMRefit", loras, **{**values, "exact_limit": 4096, **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["contrast", "project", "analytic"])
def test_refit_is_the_dense_formula_and_its_report_is_true(server, base, family, mode):
    tasks = refit_loras(base, family)
    graph = MergeGraph(server)
    node = refit(server, graph, family, tasks, mode=mode)
    graph.pack("SSRSaveLoRA", lora=node.out(1), filename_prefix=f"loras/refit_{family}_{mode}")
    report = server.run(graph.prompt).ok()
    text = report.text(node)
    files = sorted((base / "output" / "loras").glob(f"refit_{family}_{mode}_*.safetensors"))
    assert len(files) == 2
    recordings = []
    for task in tasks:
        prefix = f"refit_{family}_{task.text_seed}"
        record(server, family, task.text_seed, prefix, (task.file.name, task.strength))
        recordings.append(Recording(base, prefix))
    for index, (task, path) in enumerate(zip(tasks, files, strict=True)):
        kept, falls = [], []
        with safe_open(path, "pt") as file:  # a list of files: only the metadata says which LoRA is which
            about = json.loads(file.metadata()["ssr_osrm_refit"])
        assert (about["source"]["name"], about["mode"]) == (task.file.name, mode)
        new = deltas(load_file(path))
        assert new.keys() == task.file.truth.keys()
        for name, truth in task.file.truth.items():
            old = truth.delta.flatten(1)
            x, y = recordings[index].rows(name), recordings[1 - index].rows(name)
            own, other = x.T @ x / len(x), y.T @ y / len(y)
            change, function = new[name] - old, float((old @ own * old).sum())
            expected = expected_change(mode, old, own, other)
            if expected is not None:
                assert float((change - expected).norm() / old.norm()) < 2e-3, name
            kept.append(1 - float((change @ own * change).sum()) / function)
            falls.append([float((d @ other * d).sum()) / function for d in (old, new[name])])
        row = next(line for line in text.splitlines() if line.startswith(f"| {task.file.name}"))
        _, _, count, keeps, before, after, _ = (cell.strip() for cell in row.split("|"))
        assert int(count) == len(kept)
        assert float(keeps.removesuffix(" %")) == pytest.approx(100 * median(kept), abs=0.3)
        assert float(before) == pytest.approx(median(f[0] for f in falls), rel=0.02)
        assert float(after) == pytest.approx(median(f[1] for f in falls), rel=0.02, abs=1e-4)
        assert float(after) < float(before)


def expected_change(mode, old, own, other):
    """Dense change of the weight; None where the paper leaves a choice of basis."""
    eye = torch.eye(len(own)).double()
    if mode == "contrast":
        ridge = 0.1 * float((own + other).trace()) / len(own) * eye
        return -old @ other @ torch.linalg.inv(own + other + ridge)
    if mode == "project":
        values, vectors = torch.linalg.eigh(other)
        values, vectors = values.flip(0), vectors.flip(1)
        top = vectors[:, : int((values.cumsum(0) / values.sum() < 0.9).sum()) + 1]
        return -old @ top @ top.T
    return None


def test_refit_needs_two_loras(server, base):
    graph = MergeGraph(server)
    node = refit(server, graph, "lumina2", refit_loras(base, "lumina2")[:1])
    graph.add("PreviewAny", source=node.out(2))
    assert "no others" in server.run(graph.prompt).error


def test_refit_loras_merge_and_train_further(server, base):
    """The refit chain goes into SSR Merge; strengths and prompts travel along."""
    tasks = refit_loras(base, "flux")
    graph = MergeGraph(server)
    node = refit(server, graph, "flux", tasks)
    graph.pack("SSRSaveLoRA", lora=node.out(1), filename_prefix="loras/refit_merge")
    values = {"model": graph.checkpoint("flux"), "latent": graph.latent("flux"), "mode": "sum"}
    merged = graph.join("SSRMerge", [node], **values)
    graph.dump(merged, "refit_merge")
    server.run(graph.prompt).ok()
    total = {}
    for task, path in zip(tasks, sorted((base / "output" / "loras").glob("refit_merge_*")), strict=True):
        for name, delta in deltas(load_file(path)).items():
            total[name] = total.get(name, 0) + task.strength * delta
    assert_added(dumped(base, "refit_merge"), base_weights(base, "flux"), total, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["SSROSRMInit", "SSROSRMRefit"])
def test_cancel_leaves_nothing_behind(server, base, kind):
    family = "flux"
    before = state_of(server, family, f"osrm_before_{kind}")
    graph = MergeGraph(server)
    options = {"steps": 100, "latent": graph.latent(family, 512), "exact_limit": 64}
    if kind == "SSROSRMInit":
        node = init(graph, family, (601,), "cancelled", **options)
        del graph.prompt[node.id]["inputs"]["sigmas"]
    else:
        node = refit(server, graph, family, refit_loras(base, family), **options)
        del graph.prompt[node.id]["inputs"]["sigmas"]
        graph.add("PreviewAny", source=node.out(2))
    prompt = server.submit(graph.prompt)
    server.wait_event(prompt, lambda event, data: event == "progress" and data["node"] == node.id and data["value"])
    server.interrupt()
    assert server.wait(prompt, timeout=60).status == "interrupted"
    after = state_of(server, family, f"osrm_after_{kind}")
    assert after == before and after["hooks"] == 0
    assert not list((base / "output" / "loras").glob("*cancelled*"))
