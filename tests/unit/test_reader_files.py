"""Calibrations with readers on disk, and the memory that a scout takes."""

import math

import pytest
import torch
from helpers import F64, LAYER, linear64, lora, rel, task, task_tokens
from safetensors.torch import load_file, save_file
from torch import nn

from ssr_core import (
    FileError,
    IncompatibleError,
    Scout,
    ScoutOptions,
    SSRMerge,
    Tap,
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

IN, OUT, K = 12, 7, 3
OTHER = Target("other")


FOUR = ScoutOptions(limit=4)


def example(scout=FOUR, dtype=F64):
    """Two layers; one of the LoRAs has only the first."""
    tasks = [
        task(f"t{k}", {LAYER: lora(k, OUT, IN, 2), OTHER: lora(9 + k, OUT, IN, 1)}, prompts=(f"p{k}",)) for k in (0, 1)
    ]
    tasks.append(task("t2", lora(2, OUT, IN, 2)))
    root = nn.ModuleDict({"layer": linear64(IN, OUT), "other": linear64(IN, OUT)}).to(dtype)

    def run_pass(index, tap):
        for module in root.values():
            module(task_tokens(index, 40, IN).to(dtype))

    return tasks, calibrate(root, tasks, build_stacks(tasks), run_pass, scout=scout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip(tmp_path, dtype):
    tasks, calibration = example(dtype=dtype)
    save_calibration(calibration, tmp_path / "1")
    loaded = load_calibration(tmp_path / "1")
    for target, stats in calibration.stats.items():
        again = loaded.stats[target]
        assert torch.equal(again.readers, stats.readers) and again.readers.dtype == stats.readers.dtype
        assert torch.equal(again.gram.triu(), stats.gram.triu()) and again.ranks == stats.ranks
    before, after = merge(tasks, SSRMerge(), calibration), merge(tasks, SSRMerge(), loaded)
    for target, layer in before.layers.items():
        assert rel(after.layers[target].delta(), layer.delta()) < (1e-12 if dtype == F64 else 1e-5)
    save_calibration(loaded, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def version_of(path):
    return read_safetensors(path)[1][FORMAT].split('"version":')[1].strip()[0]


def test_only_files_with_readers_need_a_new_release(tmp_path):
    for scout, version in ((None, "1"), (ScoutOptions(limit=0), "1"), (ScoutOptions(limit=2), "2")):
        save_calibration(example(scout)[1], tmp_path / "c", overwrite=True)
        assert version_of(tmp_path / "c") == version
        assert any(key.endswith("readers") for key in load_file(tmp_path / "c")) == (version == "2")


DAMAGE = {
    "lost": lambda t: t.pop("0.readers"),
    "one less": lambda t: t.update({"0.readers": t["0.readers"][:-1].contiguous()}),
    "flat": lambda t: t.update({"0.readers": t["0.readers"][:, 0].contiguous()}),
    "nan": lambda t: t["0.readers"].__setitem__((0, 0), math.nan),
    "integers": lambda t: t.update({"0.readers": t["0.readers"].long()}),
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


def test_readers_of_another_width_name_the_layer(tmp_path):
    tasks, calibration = example()
    path = tmp_path / "c.safetensors"
    save_calibration(calibration, path)
    tensors, metadata = read_safetensors(path)
    save_file({**tensors, "0.readers": tensors["0.readers"][:, :-1].contiguous()}, path, metadata)
    with pytest.raises(IncompatibleError, match="layer") as caught:
        merge(tasks, SSRMerge(), load_calibration(path))
    assert "11 inputs" in str(caught.value) and caught.value.remedy == "calibrate again."


def test_a_subset_keeps_the_readers_on_its_coordinates():
    stats = example()[1].stats[LAYER]
    rows = [4, 5, 0, 1, 6, 7, 8, 9]  # blocks 2 and 0, then four readers
    picked = stats.subset([2, 0])
    assert torch.equal(picked.gram, stats.gram[[2, 0]][:, rows][:, :, rows])
    assert torch.equal(picked.readers, stats.readers) and picked.ranks == (2, 2)


# ---------------------------------------------------------------- memory


def wide_tasks():
    layers = {LAYER: (OUT, IN, 2), OTHER: (5, 30, 3)}
    return [
        task(f"t{k}", {t: lora(k, *size, dtype=torch.float32) for t, size in layers.items() if k < 2 or t == LAYER})
        for k in range(K)
    ]


@pytest.mark.parametrize("limit", [None, 3])
def test_forecast_of_readers_is_what_is_held(limit):
    tasks = wide_tasks()
    stacks, options = build_stacks(tasks), ScoutOptions(tokens=1, limit=limit)
    # R is 6 on the first layer, 6 on the second; at most as many readers
    readers = 6 if limit is None else limit
    plain, wide = memory_need(stacks, torch.float32), memory_need(stacks, torch.float32, options)
    grams = 4 * 2 * ((6 + readers) ** 2 - 6**2)
    rows = 4 * readers * (IN + 30)
    assert wide.device - plain.device == rows + grams
    assert wide.host - plain.host == rows + 4 * (3 + 2) * ((6 + readers) ** 2 - 6**2)
    tap = Tap(stacks, 0, "balance", {stack.target: torch.zeros(readers, stack.in_features) for stack in stacks})
    tap.prepare(torch.device("cpu"), torch.float32)
    assert sum(acc.gram.nbytes for _, acc in tap.accumulators()) == 2 * 4 * (6 + readers) ** 2


def test_forecast_of_samples_covers_what_is_held():
    tasks = wide_tasks()
    stacks, options = build_stacks(tasks), ScoutOptions(tokens=50, limit=1)
    root = nn.ModuleDict({"layer": nn.Linear(IN, OUT), "other": nn.Linear(30, 5)}).bfloat16().requires_grad_(False)
    scout = Scout(stacks, options)
    for index in range(K):
        with scout.task(index) as tap, tap.attached(root):
            root["layer"](torch.ones(80, IN, dtype=torch.bfloat16))
            root["other"](torch.ones(80, 30, dtype=torch.bfloat16))
    held = sum(sample.rows.nbytes for sample in scout._done.values())
    assert held == 2 * 50 * (3 * IN + 2 * 30)
    need, bare = (memory_need(stacks, torch.bfloat16, one) for one in (options, ScoutOptions(tokens=1, limit=1)))
    grams = 4 * (3 + 2) * 7**2
    assert need.host - (bare.host - grams) == 2 * 51 * (3 * IN + 2 * 30) >= held
    assert need.device - (bare.device - 4 * 2 * 7**2) == 2 * 51 * (IN + 30)
