"""OSRM from the command: what the nodes give, file by file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from .merging import SEED, MergeGraph
from .osrm import init_file
from .test_headless import EQUAL, FAMILY, PROMPTS, difference, files, recipe_of, run

SETTINGS = {"seed": SEED, "steps": 2, "width": 128, "height": 128}


def model_and_clip(graph):
    return {"model": graph.checkpoint(FAMILY), "clip": graph.add("TinyCLIP", kind=FAMILY, seed=0), **SETTINGS}


def written(tmp_path, value):
    path = tmp_path / "osrm.json"
    path.write_text(json.dumps(value))
    return path


def test_a_start_is_that_of_the_node(server, checkout, base, tmp_path):
    options = {"rank": 3, "layers": "all", "features": "tokens", "key_style": "kohya", "only": "attn|conv"}
    graph = MergeGraph(server)
    texts = [text for prompts in PROMPTS for text in prompts]
    node = graph.pack(
        "SSROSRMInit", {**model_and_clip(graph), "prompts": "\n".join(texts), "filename_prefix": "command", **options}
    )
    expected = load_file(init_file(server.run(graph.prompt).ok(), node))
    value = {
        "model": recipe_of(files(base))["model"],
        "osrm_init": {"prompts": texts, **options},
        "calibration": {"settings": SETTINGS},
    }
    recipe, output = written(tmp_path, value), tmp_path / "start.safetensors"
    code, out, err = run(checkout, base, recipe, "--output", output)
    assert code == 0 and out.strip() == str(output), err
    made = load_file(output)
    assert made.keys() == expected.keys() and len(made) > 100
    assert all(torch.allclose(made[name], expected[name], atol=1e-6) for name in made)
    assert (tmp_path / "start.report.md").read_text().startswith("# OSRM Init")
    code, _, err = run(checkout, base, recipe, "--output", output)
    assert code == 1 and "--overwrite" in err and "Traceback" not in err
    value["osrm_init"] = {"prompts": texts, "only": "no such layer"}
    code, _, err = run(checkout, base, written(tmp_path, value), "--output", tmp_path / "none.safetensors")
    assert code == 1 and "none of the model's" in err and not (tmp_path / "none.safetensors").exists()


def test_refit_loras_are_those_of_the_node(server, checkout, base, tmp_path):
    tasks, options = files(base), {"mode": "project", "strength": 0.8}
    graph = MergeGraph(server)
    loras = [
        graph.pack(
            "SSRLoRA",
            lora=task.file.name,
            strength_model=task.strength,
            strength_clip=task.strength,
            prompts="\n".join(prompts),
        )
        for task, prompts in zip(tasks, PROMPTS, strict=True)
    ]
    node = graph.join("SSROSRMRefit", loras, **model_and_clip(graph), **options)
    graph.pack("SSRSaveLoRA", lora=node.out(1), filename_prefix="loras/command_refit")
    server.run(graph.prompt).ok()
    expected = sorted((base / "output" / "loras").glob("command_refit_*.safetensors"))
    value = {**recipe_of(tasks), "osrm_refit": options, "calibration": {"settings": SETTINGS}}
    value["sources"].append({"name": tasks[0].file.name, "strength_model": 0, "prompts": ["x"]})
    value["sources"][2]["name"] = "third.safetensors"
    (base / "models" / "loras" / "third.safetensors").write_bytes(tasks[0].file.path.read_bytes())
    folder = tmp_path / "made"
    code, out, err = run(checkout, base, written(tmp_path, value), "--output", folder)
    assert code == 0, err
    made = [folder / f"{task.file.path.stem}_refit.safetensors" for task in tasks]
    assert out.split() == [str(path) for path in made] and sorted(folder.glob("*.safetensors")) == sorted(made)
    for one, other in zip(expected, made, strict=True):
        assert difference(one, other) < EQUAL
    report = (folder / "osrm_refit.report.md").read_text()
    assert report.startswith("# OSRM Refit") and "Left out, with strength 0: third.safetensors." in report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["sources"][1].update(name=r["sources"][0]["name"]), "two of the LoRAs have this name"),
        (lambda r: r["sources"][1].update(strength_model=0), "no others to keep away from"),
    ],
    ids=["same name", "one left"],
)
def test_refit_errors_leave_nothing(server, checkout, base, tmp_path, change, words):
    value = {**recipe_of(files(base)), "osrm_refit": {}, "calibration": {"settings": SETTINGS}}
    change(value)
    code, _, err = run(checkout, base, written(tmp_path, value), "--output", tmp_path / "made")
    assert code == 1 and words in err and "Traceback" not in err, err
    assert not list(tmp_path.rglob("*.safetensors"))
