"""The example graphs: opened in the real frontend without a warning, then run on tiny models.

The browser turns each workflow into what it would queue; the loaders in that are swapped for tiny
ones, pictures for latents, and the server runs it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from .conftest import PACK
from .loras import family_lora

sys.path.append(str(PACK / "tests" / "web"))

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
SIZE = 128
MADE_HERE = (
    "SSRMerge",
    "SSRCalibrate",
    "SSRSolve",
    "SSRNPLoRAMerge",
    "SSRLoRA",
    "SSROSRMInit",
    "SSROSRMRefit",
    "SSRReport",
    "SSRCompare",
)
MADE_HERE += ("SSRMergeFromRecords", "SSRRecordLibrary", "SSRCombineCalibrations")

CHOSEN = ("prompts", "joint_prompts", "strengths", "lora", "filename_prefix")
"""Inputs that examples fill in."""

if not Path("/usr/bin/chromium").exists():
    pytest.skip("chromium is not installed: the example workflows were not opened", allow_module_level=True)
pytest.importorskip("playwright", reason="playwright is not installed: the example workflows were not opened")


@pytest.fixture(scope="module")
def prompts(server):
    """What the frontend would queue for each workflow, and what it said on its console."""
    from browser import comfy_page

    found = {}
    with comfy_page(server.url) as page:
        for path in WORKFLOWS:
            page.messages.clear()
            page.evaluate("async (graph) => { await app.loadGraphData(graph); }", json.loads(path.read_text()))
            page.wait_for_timeout(800)
            prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
            # Missing model files and LoRAs are the one thing that a user's machine has and this one has not.
            dialogs = page.evaluate("() => document.querySelectorAll('.comfy-missing-nodes, .p-dialog').length")
            found[path.stem] = (prompt, list(page.messages), dialogs)
    return found


def swap(prompt, family, loras):
    """The same graph on tiny models."""
    swapped = json.loads(json.dumps(prompt))
    lora_names = itertools.cycle(loras)
    for node_id, node in prompt.items():
        inputs = swapped[node_id]["inputs"]
        kind = node["class_type"]
        if kind in ("CheckpointLoaderSimple", "UNETLoader"):
            swapped[node_id] = _loader(family)
        elif kind in ("DualCLIPLoader", "CLIPLoader"):
            swapped[node_id] = _clip("flux" if family == "wan21" else family)  # as wide as the tiny Wan's text
        elif kind == "SSRLoRA":
            inputs["lora"] = next(lora_names)
        elif kind in ("KSampler", "TrainLoraNode"):
            inputs["steps"] = 2
        elif kind == "VAEEncode":
            swapped[node_id] = {
                "class_type": "EmptyLatentImage",
                "inputs": {"batch_size": 1, "width": SIZE, "height": SIZE},
            }
            del swapped[inputs["pixels"][0]]
        elif kind == "KSamplerAdvanced":
            inputs.update(steps=2, start_at_step=inputs["start_at_step"] // 10, end_at_step=inputs["end_at_step"] // 10)
        elif kind in ("SaveImage", "SaveVideo"):
            source = inputs["images"] if kind == "SaveImage" else prompt[inputs["video"][0]]["inputs"]["images"]
            decode = prompt[source[0]]
            swapped[node_id] = {
                "class_type": "SaveLatent",
                "inputs": {"samples": decode["inputs"]["samples"], "filename_prefix": "host/workflow"},
            }
        for name in ("width", "height"):
            if name in inputs:
                inputs[name] = SIZE
        if "length" in inputs:
            inputs["length"] = 5
    for node_id, node in prompt.items():
        if node["class_type"] in ("VAEDecode", "VAELoader", "CreateVideo"):
            del swapped[node_id]
    return _rewire_checkpoint(prompt, swapped, family)


def _loader(family):
    return {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": f"tiny_{family}.safetensors", "weight_dtype": "default"},
    }


def _clip(family):
    return {"class_type": "TinyCLIP", "inputs": {"kind": family, "seed": 3}}


def _rewire_checkpoint(prompt, swapped, family):
    """A checkpoint loader's CLIP output comes from a node of its own now."""
    loaders = [i for i, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple"]
    if loaders:
        swapped["900"] = _clip(family)
        for node in swapped.values():
            for name, value in node["inputs"].items():
                if value == [loaders[0], 1]:
                    node["inputs"][name] = ["900", 0]
    return swapped


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} >= {
        "two_subjects",
        "subject_and_style",
        "np_lora_subject_and_style",
        "calibrate_once",
        "compare_methods",
        "save_and_reuse",
        "wan22_two_models",
        "osrm_refit",
        "osrm_train",
        "records",
        "several_servers",
    }


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_workflow_opens_without_a_warning(prompts, name):
    _, messages, dialogs = prompts[name]
    assert messages == []
    assert dialogs == 0


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_settings_are_the_nodes_defaults(server, prompts, name):
    """The frontend keeps widget values by node id from one graph to the next: another graph's would slip in."""
    prompt, _, _ = prompts[name]
    nodes = [n for n in prompt.values() if n["class_type"] in MADE_HERE]
    assert nodes
    for node in nodes:
        schema = server.schemas()[node["class_type"]]["input"]
        settings = {**schema.get("required", {}), **schema.get("optional", {})}
        for key, value in node["inputs"].items():
            options = settings.get(key, [None])[1:]
            if options and "default" in options[0] and key not in CHOSEN:
                assert value == options[0]["default"], (node["class_type"], key, value)


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_workflow_runs_on_tiny_models(server, base, prompts, name):
    prompt, _, _ = prompts[name]
    kinds = [node["class_type"] for node in prompt.values()]
    family = "wan21" if "CLIPLoader" in kinds else "flux" if "UNETLoader" in kinds else "sdxl"
    loras = [family_lora(base, family, "kohya", seed=seed).name for seed in (31, 32)]
    server.schemas(refresh=True)
    result = server.run(swap(prompt, family, loras)).ok()
    expected = {node_id for node_id, node in prompt.items() if node["class_type"].startswith("SSR")}
    assert expected <= set(result.executed) | result.cached
    if name == "save_and_reuse":
        written = sorted((base / "output" / "loras").glob("dog_and_cat_*.safetensors"))
        calibrations = sorted((base / "output" / "calibrations").glob("dog_and_cat_*.calibration.safetensors"))
        assert written and calibrations
        shutil.rmtree(base / "output" / "calibrations")
