"""Calibrations with sampled inputs on disk, and the memory that they take."""

import math

import pytest
import torch
from helpers import F64, LAYER, linear64, lora, rel, task, task_tokens
from safetensors.torch import load_file, save_file
from torch import nn

from ssr_core import (
    FileError,
    IncompatibleError,
    SampleOptions,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    load_calibration,
    memory_need,
    merge,
    read_safetensors,
    save_calibration,
)
from ssr_core.calibration_io import FORMAT
from ssr_core.calibrator import Calibrator

IN, OUT, K = 12, 7, 3
OTHER = Target("other")
TEN = SampleOptions(tokens=10)


def example(sample=TEN, dtype=F64):
    """Two layers; one of the LoRAs has only the first."""
    tasks = [
        task(f"t{k}", {LAYER: lora(k, OUT, IN, 2), OTHER: lora(9 + k, OUT, IN, 1)}, prompts=(f"p{k}",)) for k in (0, 1)
    ]
    tasks.append(task("t2", lora(2, OUT, IN, 2)))
    root = nn.ModuleDict({"layer": linear64(IN, OUT), "other": linear64(IN, OUT)}).to(dtype)

    def run_pass(index, tap):
        for module in root.values():
            module(task_tokens(index, 40, IN).to(dtype))

    return tasks, calibrate(root, tasks, build_stacks(tasks), run_pass, sample=sample)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip(tmp_path, dtype):
    tasks, calibration = example(dtype=dtype)
    save_calibration(calibration, tmp_path / "1")
    loaded = load_calibration(tmp_path / "1")
    for target, stats in calibration.stats.items():
        for mine, again in zip(stats.samples, loaded.stats[target].samples, strict=True):
            assert torch.equal(again.rows, mine.rows) and again.rows.dtype == mine.rows.dtype == dtype
            assert torch.equal(again.weights, mine.weights)
    before, after = merge(tasks, SSRMerge(), calibration), merge(tasks, SSRMerge(), loaded)
    for target, layer in before.layers.items():
        assert rel(after.layers[target].delta(), layer.delta()) < (1e-12 if dtype == F64 else 1e-5)
    save_calibration(loaded, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_rows_of_one_module_are_written_once(tmp_path):
    parts = [Target("qkv", (0, 4)), Target("qkv", (4, 3))]
    tasks = [
        task(f"t{k}", {one: lora(5 * k + i, one.out_slice[1], IN, 2) for i, one in enumerate(parts)}) for k in (0, 1)
    ]
    root = nn.ModuleDict({"qkv": linear64(IN, 7)})
    calibration = calibrate(
        root, tasks, build_stacks(tasks), lambda k, _: root["qkv"](task_tokens(k, 40, IN)), sample=TEN
    )
    save_calibration(calibration, tmp_path / "c")
    assert sum(key.endswith(".rows") for key in load_file(tmp_path / "c")) == 2
    loaded = load_calibration(tmp_path / "c")
    for part in parts:
        for k in (0, 1):
            assert torch.equal(loaded.stats[part].samples[k].rows, calibration.stats[part].samples[k].rows)


def version_of(path):
    return read_safetensors(path)[1][FORMAT].split('"version":')[1].strip()[0]


def test_only_files_with_samples_need_a_new_release(tmp_path):
    for sample, version in ((None, "1"), (TEN, "2")):
        save_calibration(example(sample)[1], tmp_path / "c", overwrite=True)
        assert version_of(tmp_path / "c") == version
        assert any(key.endswith("rows") for key in load_file(tmp_path / "c")) == (version == "2")


ROWS, WEIGHTS, MARKS = "0.sample.0.rows", "0.sample.0.weights", "0.sample.0.held"
DAMAGE = {
    "lost": lambda t: t.pop(ROWS),
    "one less": lambda t: t.update({ROWS: t[ROWS][:-1].contiguous()}),
    "none": lambda t: t.update({ROWS: t[ROWS][:0].contiguous(), WEIGHTS: t[WEIGHTS][:0].contiguous()}),
    "flat": lambda t: t.update({ROWS: t[ROWS][:, 0].contiguous()}),
    "nan": lambda t: t[ROWS].__setitem__((0, 0), math.nan),
    "integers": lambda t: t.update({ROWS: t[ROWS].long()}),
    "no weight": lambda t: t[WEIGHTS].__setitem__(0, 0.0),
    "other marks": lambda t: t.update({MARKS: t[MARKS][:-1].contiguous()}),
    "marks that are numbers": lambda t: t.update({MARKS: t[MARKS].double()}),
    "endless weight": lambda t: t[WEIGHTS].__setitem__(0, math.inf),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    save_calibration(example()[1], path)
    tensors, metadata = read_safetensors(path)
    DAMAGE[damage](tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(FileError, match="damaged"):
        load_calibration(path)


def test_samples_of_another_width_name_the_layer(tmp_path):
    tasks, calibration = example()
    path = tmp_path / "c.safetensors"
    save_calibration(calibration, path)
    tensors, metadata = read_safetensors(path)
    save_file({**tensors, ROWS: tensors[ROWS][:, :-1].contiguous()}, path, metadata)
    with pytest.raises(IncompatibleError, match="layer") as caught:
        merge(tasks, SSRMerge(), load_calibration(path))
    assert "11 wide" in str(caught.value) and caught.value.remedy == "calibrate again."


def test_a_subset_keeps_the_samples_of_its_blocks():
    stats = example()[1].stats[LAYER]
    picked = stats.subset([2, 0])
    assert picked.samples == (stats.samples[2], stats.samples[0])


# ---------------------------------------------------------------- memory


def wide_tasks():
    layers = {LAYER: (OUT, IN, 2), OTHER: (5, 30, 3)}
    return [
        task(f"t{k}", {t: lora(k, *size, dtype=torch.float32) for t, size in layers.items() if k < 2 or t == LAYER})
        for k in range(K)
    ]


def test_forecast_of_samples_is_what_is_held():
    tasks = wide_tasks()
    stacks, options = build_stacks(tasks), SampleOptions(tokens=50)
    root = nn.ModuleDict({"layer": nn.Linear(IN, OUT), "other": nn.Linear(30, 5)}).bfloat16().requires_grad_(False)
    calibrator = Calibrator(stacks, sample=options)
    for index in range(K):
        with calibrator.task(index) as tap, tap.attached(root):
            root["layer"](torch.ones(80, IN, dtype=torch.bfloat16))
            root["other"](torch.ones(80, 30, dtype=torch.bfloat16))
    held = sum(sample.rows.nbytes for sample in calibrator._samples.values())
    need, bare = (memory_need(stacks, torch.bfloat16, one) for one in (options, None))
    assert held == need.host - bare.host == 2 * 50 * (3 * IN + 2 * 30)
    assert need.device - bare.device == 2 * 51 * (IN + 30)


def test_many_loras_share_what_a_layer_may_keep():
    """The second layer has more inputs than refinement solves equations, the first has not."""
    tasks = wide_tasks()  # three LoRAs on the first layer, two on the second
    options = SampleOptions(tokens=70, most=20)
    assert IN <= 20
    root = nn.ModuleDict({"layer": nn.Linear(IN, OUT), "other": nn.Linear(30, 5)}).requires_grad_(False)
    calibrator = Calibrator(build_stacks(tasks), sample=options)
    for index in range(K):
        with calibrator.task(index) as tap, tap.attached(root):
            root["layer"](torch.ones(80, IN))
            root["other"](torch.ones(80, 30))
    sizes = {key: len(sample.rows) for key, sample in calibrator._samples.items()}
    assert sizes == {("layer", 0): 26, ("layer", 1): 26, ("layer", 2): 26, ("other", 0): 10, ("other", 1): 10}
    need, bare = (memory_need(build_stacks(tasks), torch.float32, one) for one in (options, None))
    assert need.host - bare.host == 4 * (78 * IN + 20 * 30)
    assert need.device - bare.device == 4 * (27 * IN + 11 * 30)
