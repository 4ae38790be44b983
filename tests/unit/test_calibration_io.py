"""Calibrations on disk: nothing is lost, nothing damaged is believed."""

import json
import math

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, linear64, lora, randn, rel, task, task_tokens
from safetensors.torch import load_file, save_file
from torch import nn

from ssr_core import (
    ConvertOptions,
    FileError,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    load_calibration,
    merge,
    read_safetensors,
    save_calibration,
)

OUT, IN = 7, 9
SETTINGS = {"seed": 1, "sigmas": [1.5, 0.25], "padding": "balance", "nested": {"a": None, "b": True}, "text": "ü\n"}


def example(dtype=torch.float64):
    """Two targets, one a slice of a fused layer, three tasks of which one lacks a layer."""
    rows = Target("qkv", (3, 4))
    tasks = [
        task("ä", {LAYER: lora(1, OUT, IN, 2), rows: lora(2, 4, IN, 3)}, strength=0.7, clip=-0.2, prompts=("p", "ö")),
        task("b", {LAYER: lora(3, OUT, IN, 3)}),
        task("c", {LAYER: lora(4, OUT, IN, 1), rows: lora(5, 4, IN, 12)}),
    ]
    root = nn.ModuleDict({"layer": nn.Linear(IN, OUT), "qkv": nn.Linear(IN, 9)}).to(dtype).requires_grad_(False)

    def run_pass(index, tap):
        x = task_tokens(index, 41 + index, IN).to(dtype)
        x[index, 0] = math.nan
        root["layer"](x)
        root["qkv"](x)

    made = calibrate(root, tasks, build_stacks(tasks), run_pass)
    return tasks, type(made)(made.tasks, made.stats, made.stack_tasks, "model-id", SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip(tmp_path, dtype):
    tasks, calibration = example(dtype)
    path = tmp_path / "c.safetensors"
    save_calibration(calibration, path)
    loaded = load_calibration(path)
    assert loaded.tasks == calibration.tasks and dict(loaded.settings) == SETTINGS and loaded.model == "model-id"
    assert dict(loaded.stack_tasks) == dict(calibration.stack_tasks) and list(loaded.stats) == list(calibration.stats)
    for target, stats in calibration.stats.items():
        again = loaded.stats[target]
        assert again.gram.dtype == stats.gram.dtype == dtype and again.ranks == stats.ranks
        assert torch.equal(again.gram.triu(), stats.gram.triu())
        assert torch.equal(again.gram, again.gram.transpose(1, 2))
        assert (again.gram - stats.gram).abs().max() <= 1e-6 * stats.gram.abs().max()
        assert torch.equal(again.tokens, stats.tokens) and torch.equal(again.nonfinite, stats.nonfinite)
        assert again.nonfinite.tolist() == [1] * len(stats.ranks)
    before, after = merge(tasks, SSRMerge(), calibration), merge(tasks, SSRMerge(), loaded)
    for target, layer in before.layers.items():
        assert rel(after.layers[target].delta(), layer.delta()) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert before.report.warnings == after.report.warnings


def test_saving_twice_gives_the_same_bytes_as_saving_what_was_loaded(tmp_path):
    _, calibration = example()
    save_calibration(calibration, tmp_path / "1")
    save_calibration(load_calibration(tmp_path / "1"), tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_an_existing_file_is_kept(tmp_path):
    _, calibration = example()
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileError, match="exists already"):
        save_calibration(calibration, path)
    assert path.read_bytes() == b"mine"
    save_calibration(calibration, path, overwrite=True)
    assert load_calibration(path).tasks == calibration.tasks


def test_only_a_triangle_is_stored(tmp_path):
    tasks = conflicting_tasks(2, OUT, IN, 4)
    calibration = calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 20, IN)] for k in range(2)])
    save_calibration(calibration, tmp_path / "c")
    assert load_file(tmp_path / "c")["0.gram"].shape == (2, 8 * 9 // 2)


def edited(tmp_path, *, header=None, tensors=None, raw=None):
    """A saved calibration with its header or tensors changed."""
    _, calibration = example()
    path = tmp_path / "damaged.safetensors"
    save_calibration(calibration, path)
    content, metadata = read_safetensors(path)
    data = json.loads(metadata["ssr_calibration"])
    if header:
        header(data)
    if tensors:
        tensors(content)
    save_file(content, path, {"ssr_calibration": raw if raw is not None else json.dumps(data)})
    return path


def refused(path, match="damaged"):
    with pytest.raises(FileError, match=match) as caught:
        load_calibration(path)
    assert "damaged.safetensors" in str(caught.value)


@pytest.mark.parametrize("raw", ["", "{", "[]", "null", "3", "{}", '{"version": 1}', "[" * 5000])
def test_damaged_header(tmp_path, raw):
    refused(edited(tmp_path, raw=raw))


CONVERSION = {"max_rank": 8, "tolerance": 0.1, "rest": "drop"}
HEADER_DAMAGE = {
    "task without name": lambda h: h["tasks"][0].pop("name"),
    "strength is a word": lambda h: h["tasks"][0].update(strength_model="much"),
    "prompts missing": lambda h: h["tasks"][1].update(prompts=None),
    "unknown task": lambda h: h["stacks"][0].update(tasks=[0, 1, 3]),
    "negative task": lambda h: h["stacks"][0].update(tasks=[0, 1, -1]),
    "too few tasks": lambda h: h["stacks"][0].update(tasks=[0, 1]),
    "ranks do not fit": lambda h: h["stacks"][0].update(ranks=[2, 3, 2]),
    "negative rank": lambda h: h["stacks"][0].update(ranks=[3, 4, -1]),
    "no ranks": lambda h: h["stacks"][0].update(ranks=[], tasks=[]),
    "infinite rank": lambda h: h["stacks"][0].update(ranks=[2, 3, math.inf]),
    "part": lambda h: h["stacks"][0].update(part="vae"),
    "slice": lambda h: h["stacks"][1].update(out_slice=[3]),
    "settings": lambda h: h.update(settings=5),
    "one stack more": lambda h: h["stacks"].append(h["stacks"][0]),
    "stacks missing": lambda h: h.pop("stacks"),
    "conversion is a word": lambda h: h["tasks"][0].update(convert_options="fully"),
    "conversion without rank": lambda h: h["tasks"][0].update(convert_options={"tolerance": 1, "rest": "drop"}),
    "conversion of infinite rank": lambda h: h["tasks"][0].update(convert_options={**CONVERSION, "max_rank": math.inf}),
    "conversion of negative rank": lambda h: h["tasks"][0].update(convert_options={**CONVERSION, "max_rank": -1}),
    "conversion within nan": lambda h: h["tasks"][0].update(convert_options={**CONVERSION, "tolerance": math.nan}),
    "conversion of unknown rest": lambda h: h["tasks"][0].update(convert_options={**CONVERSION, "rest": "forget"}),
}


@pytest.mark.parametrize("name", HEADER_DAMAGE)
def test_header_that_contradicts_the_tensors(tmp_path, name):
    refused(edited(tmp_path, header=HEADER_DAMAGE[name]))


def test_a_header_from_before_conversions_is_read(tmp_path):
    path = edited(tmp_path, header=lambda h: [task.pop("convert_options") for task in h["tasks"]])
    assert load_calibration(path).tasks == example()[1].tasks
    path.unlink()
    path = edited(tmp_path, header=lambda h: h["tasks"][1].update(convert_options=CONVERSION))
    assert load_calibration(path).tasks[1].convert_options == ConvertOptions(8, 0.1, "drop")


def test_another_version(tmp_path):
    refused(edited(tmp_path, header=lambda h: h.update(version=4)), "format 4, this version reads up to 3")


TENSOR_DAMAGE = {
    "nan": lambda t: t["0.gram"].__setitem__((0, 1), math.nan),
    "inf": lambda t: t["1.gram"].__setitem__((1, 0), math.inf),
    "missing gram": lambda t: t.pop("0.gram"),
    "missing tokens": lambda t: t.pop("1.tokens"),
    "short gram": lambda t: t.update({"0.gram": t["0.gram"][:, :-1].contiguous()}),
    "half gram": lambda t: t.update({"0.gram": t["0.gram"].half()}),
    "integer gram": lambda t: t.update({"0.gram": t["0.gram"].long()}),
    "short tokens": lambda t: t.update({"0.tokens": t["0.tokens"][:1].contiguous()}),
    "short nonfinite": lambda t: t.update({"0.nonfinite": t["0.nonfinite"][:1].contiguous()}),
    "nan tokens": lambda t: t["0.tokens"].__setitem__(0, math.nan),
    "negative tokens": lambda t: t["0.tokens"].__setitem__(0, -5.0),
}


@pytest.mark.parametrize("name", TENSOR_DAMAGE)
def test_tensors_that_cannot_be_statistics(tmp_path, name):
    refused(edited(tmp_path, tensors=TENSOR_DAMAGE[name]))


def test_a_foreign_file(tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_file({"a.lora_up.weight": randn(1, 3, 3)}, path, {"format": "pt"})
    refused(path, "no SSR calibration")
