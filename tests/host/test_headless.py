"""The command without a server: recipes, merged files made again, several processes, faults."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import PACK
from .loras import family_lora
from .merging import SEED, MergeGraph, Task

FAMILY = "sd15"
PROMPTS = (("a photo of a red fox", "a fox in the snow"), ("a watercolour of a heron",))
JOINT, NEUTRAL = "[2, headless_80] a fox and a heron", "an empty street"
EQUAL = 1e-5
"""Relative difference of float32 factors that were solved twice."""
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(checkout, base, arguments, **more):
    """Start the command; ComfyUI's folders are the tests' own."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    launcher = more.pop("launcher", [sys.executable])
    full = [*launcher, str(PACK / "headless"), *map(str, arguments), "--comfyui", str(checkout)]
    full += ["--", "--cpu", "--base-directory", str(base)]
    # A shell has its background jobs, and so a test run among them, ignore Ctrl-C.
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(full, env=env, text=True, preexec_fn=hear, **pipes)


def run(checkout, base, *arguments, **more):
    process = command(checkout, base, arguments, **more)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def files(base):
    strengths = ((1.0, 80), (0.7, 81))
    return [Task(family_lora(base, FAMILY, "kohya", seed, name=f"headless_{seed}"), s, 0) for s, seed in strengths]


def recipe_of(tasks):
    """The same merge as `node_file`, written by hand."""
    graph = {
        "u": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": f"tiny_{FAMILY}.safetensors", "weight_dtype": "default"},
        },
        "c": {"class_type": "TinyCLIP", "inputs": {"kind": FAMILY, "seed": 0}},
    }
    return {
        "model": {"graph": graph, "model": ["u", 0], "clip_link": ["c", 0], "custom_nodes": ["tiny"]},
        "sources": [
            {"name": task.file.name, "strength_model": task.strength, "prompts": list(prompts)}
            for task, prompts in zip(tasks, PROMPTS, strict=True)
        ],
        "calibration": {
            "settings": {
                "seed": SEED,
                "steps": 2,
                "width": 128,
                "height": 128,
                "joint_prompts": [JOINT],
                "neutral_prompts": NEUTRAL,
            }
        },
    }


@pytest.fixture(scope="module")
def node_file(server, base):
    """A merge that the nodes made and saved, with prompts, compressed."""
    tasks = files(base)
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
    model, clip = graph.checkpoint(FAMILY), graph.add("TinyCLIP", kind=FAMILY, seed=0)
    scenes = {"joint_prompts": JOINT, "neutral_prompts": NEUTRAL}
    merged = graph.join("SSRMerge", loras, model=model, clip=clip, steps=2, **scenes)
    saved = graph.save(merged, "headless_whole")
    small = graph.pack(
        "SSRCompress",
        model=model,
        clip=clip,
        lora=merged.out(2),
        calibration=merged.out(3),
        limit="share",
        share=0.5,
    )
    saved_small = graph.pack(
        "SSRSaveLoRA", lora=small.out(2), filename_prefix="loras/headless_small", key_style="kohya"
    )
    result = server.run(graph.prompt).ok()
    assert "Limit: 50% of the size" in result.text(small)
    folder = base / "output" / "loras"
    return [folder / re.split(r"[\\/]", result.text(node))[-1] for node in (saved, saved_small)]


def difference(one, other):
    """Largest relative difference of the changes that two files make."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    worst = 0.0
    for key in [name for name in first if name.endswith("lora_up.weight")]:
        down = key.replace("lora_up", "lora_down")
        a, b = (t[key].double().flatten(1) @ t[down].double().flatten(1) for t in (first, second))
        worst = max(worst, float((a - b).norm() / a.norm()))
    return worst


@pytest.mark.parametrize("which", [0, 1], ids=["whole", "compressed"])
def test_a_merged_file_is_made_again_from_its_own_metadata(checkout, base, node_file, which, tmp_path):
    output = tmp_path / "again.safetensors"
    code, _, err = run(checkout, base, node_file[which], "--output", output)
    assert code == 2 and "TinyCLIP" in err and "--trust-graph" in err and not output.exists()
    code, out, err = run(checkout, base, node_file[which], "--again", "--trust-graph", "--output", output)
    assert code == 0, err
    assert out.strip() == str(output)
    assert difference(node_file[which], output) < EQUAL
    assert float(re.search(r"largest relative difference to \S+: (\S+)", err)[1]) < EQUAL
    with safe_open(node_file[which], "pt") as then, safe_open(output, "pt") as now:
        before, after = (json.loads(file.metadata()["ssr_merge"]) for file in (then, now))
    assert before["calibration"] == after["calibration"]
    for key in ("sources", "method", "parameters", "compress", "key_style", "dtype", "model"):
        assert before[key] == after[key], key
    assert (tmp_path / "again.report.md").read_text().startswith("# SSR-Merge report")
    report = json.loads((tmp_path / "again.report.json").read_text())
    assert len(report["layers"]) > 50 and ("compression" in report) == (which == 1)


def test_a_recipe_gives_what_the_nodes_give_and_torchrun_too(checkout, base, node_file, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(files(base))))
    code, out, err = run(checkout, base, recipe, "--save-calibration", tmp_path / "kept.safetensors")
    assert code == 0, err
    alone = base / "output" / "loras" / re.split(r"[\\/]", out.strip())[-1]
    assert difference(node_file[0], alone) < EQUAL
    two = tmp_path / "two.safetensors"
    code, _, err = run(checkout, base, recipe, "--output", two, launcher=TWO_PROCESSES)
    assert code == 0, err
    assert difference(alone, two) < EQUAL
    values = recipe_of(files(base)) | {"calibration": {"file": "kept.safetensors"}}
    recipe.write_text(json.dumps(values))
    solved = tmp_path / "solved.safetensors"
    code, _, err = run(checkout, base, recipe, "--output", solved)
    assert code == 0, err
    assert difference(alone, solved) < EQUAL


def two_processes(checkout, base, port, arguments):
    """As torchrun would start them."""
    spread = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    processes = []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**spread, "RANK": str(rank)}.items():
                patch.setenv(name, value)
            processes.append(command(checkout, base, arguments[rank]))
    return processes


def test_an_output_that_the_first_process_has_already_stops_all_with_the_same_words(checkout, base, tmp_path):
    """Each machine has a disk of its own: only that of the first one, which writes, counts."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of(files(base))))
    outputs = [tmp_path / "here" / "out.safetensors", tmp_path / "there" / "out.safetensors"]
    outputs[0].parent.mkdir()
    outputs[0].write_bytes(b"earlier")
    arguments = [[recipe, "--output", output, "--patience", "0.1"] for output in outputs]
    for process in two_processes(checkout, base, 29618, arguments):
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 1, err
        assert "exists already" in err and str(outputs[0]) in err and "--overwrite" in err
    assert outputs[0].read_bytes() == b"earlier" and not outputs[1].parent.exists()


def test_a_killed_process_is_an_error_and_leaves_no_file(checkout, base, node_file, tmp_path):
    """torchrun's own variables, without torchrun: each process has to notice by itself."""
    recipe, output = tmp_path / "recipe.json", tmp_path / "out.safetensors"
    values = recipe_of(files(base))
    values["calibration"]["settings"]["steps"] = 100
    recipe.write_text(json.dumps(values))
    processes = two_processes(checkout, base, 29617, [[recipe, "--output", output]] * 2)
    _wait_for_progress(processes[0])
    processes[1].send_signal(signal.SIGKILL)
    err = processes[0].communicate(timeout=300)[1]
    processes[1].communicate(timeout=60)
    assert processes[0].returncode == 1, err
    assert "process 0 of 2 lost another one" in err and "What to do" in err
    assert list(tmp_path.iterdir()) == [recipe]


def test_ctrl_c_leaves_nothing(checkout, base, node_file, tmp_path):
    recipe = tmp_path / "recipe.json"
    values = recipe_of(files(base))
    values["calibration"]["settings"]["steps"] = 100
    recipe.write_text(json.dumps(values))
    process = command(checkout, base, [recipe, "--output", tmp_path / "out.safetensors"])
    _wait_for_progress(process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    # CPython ends by the signal itself where it arrived inside an exec of text; shells say 130 then too
    assert process.returncode in (130, -signal.SIGINT), err
    assert "interrupted; no file is half-written" in err
    assert list(tmp_path.iterdir()) == [recipe]


def _wait_for_progress(process):
    """Until the bar has moved: the passes run."""
    seen, deadline = "", time.monotonic() + 200
    while not re.search(r"[1-9]\d?%", seen):
        assert process.poll() is None and time.monotonic() < deadline, seen
        seen += process.stderr.read(1)


def without(values, path):
    """A recipe with one thing changed."""
    changed = json.loads(json.dumps(values))
    return path(changed) or changed


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda r: r["sources"][0].update(name="absent.safetensors"), 1, ("absent.safetensors", "no loras folder")),
        (lambda r: r["sources"][0].update(sha256="0" * 64), 1, ("headless_80", "not that of the recipe", "What to do")),
        (lambda r: r["model"]["graph"]["u"]["inputs"].update(unet_name="nix.safetensors"), 1, ("nix.safetensors",)),
        (
            lambda r: r["model"]["graph"]["u"]["inputs"].update(unet_name="no_model.safetensors"),
            1,
            ("UNETLoader cannot load it", "no_model.safetensors", "What to do"),
        ),
        (
            lambda r: r["model"].update(clip_link=None),
            1,
            ("a CLIP", "clip and clip_type beside unet"),
        ),
        (lambda r: r["model"].update(custom_nodes=["nowhere"]), 1, ("nowhere", "custom_nodes")),
        (lambda r: r["sources"][0].update(promts=["x"]), 2, ("sources[0].promts", "did you mean prompts?")),
    ],
    ids=["no such LoRA", "another content", "no such model", "no model", "no CLIP", "no such pack", "unknown key"],
)
def test_errors_name_what_is_wrong(checkout, base, node_file, tmp_path, change, code, words):
    (base / "models" / "diffusion_models" / "no_model.safetensors").write_bytes(
        safetensors.torch.save({"x": torch.ones(1)})
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(without(recipe_of(files(base)), change)))
    found, _, err = run(checkout, base, recipe, "--output", tmp_path / "out.safetensors")
    assert found == code, err
    assert all(word in err for word in words), err
    assert "Traceback" not in err and list(tmp_path.iterdir()) == [recipe]
