"""Thousands of broken adapter files: each is merged with every key accounted for, or refused by name. Nothing else."""

import random
import time
from pathlib import Path

import pytest
import torch
from helpers import lora, randn, task
from perturbations import KINDS, perturb, random_file
from safetensors.torch import save_file
from torch import nn

from ssr_core import (
    KEY_STYLES,
    ConvertOptions,
    KeyTarget,
    SSRMerge,
    SSRMergeError,
    SumMerge,
    Target,
    Task,
    build_stacks,
    calibrate,
    convert,
    merge,
    read_adapter,
    read_safetensors,
    to_tensors,
)
from ssr_core.file_account import FATE_WORDS

OUT, IN = 12, 8
CONV = (12, 4, 3, 3)
SLOW = 5.0
CASES, BATCHES = 250, 8


def _aliases(path, entry):
    """The names that ComfyUI has for every layer."""
    return {f"{prefix}{path}": entry for prefix in ("lora_unet_", "diffusion_model_", "")}


ORDER = (6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5)
KEYS = {
    **_aliases("lin", KeyTarget(Target("lin"), (OUT, IN))),
    **_aliases("conv", KeyTarget(Target("conv"), CONV)),
    **_aliases("qkv", KeyTarget(Target("qkv"), (OUT, IN))),
    **{f"to_{c}": KeyTarget(Target("qkv", (4 * i, 4)), (OUT, IN)) for i, c in enumerate("qkv")},
    "norm": KeyTarget(Target("norm"), (OUT,)),
    "lin_scale": KeyTarget(Target("lin"), (OUT,), parameter="scale"),
    "lin_bias": KeyTarget(Target("lin"), (OUT,), parameter="bias"),
    "embed": KeyTarget(Target("embed"), (OUT, IN), tapped=False),
    "mod": KeyTarget(Target("mod"), (OUT, IN), ORDER),
    **_aliases("mod", KeyTarget(Target("mod"), (OUT, IN))),
    "lora_te_fc": KeyTarget(Target("te_fc", part="clip"), (OUT, IN)),
    "text_encoders_fc": KeyTarget(Target("te_fc", part="clip"), (OUT, IN)),
}
SHAPES = {name: (entry.out_features, *entry.weight_shape[1:]) for name, entry in KEYS.items()}
OTHER = task(
    "other", {Target(p): lora(i, OUT, IN, 2, dtype=torch.float32) for i, p in enumerate(("lin", "qkv", "mod"))}
)
ROOT = nn.ModuleDict(
    {
        **{name: nn.Linear(IN, OUT) for name in ("lin", "qkv", "mod")},
        "conv": nn.Conv2d(4, 12, 3),
    }
).requires_grad_(False)
TOKENS = [randn(80 + k, 20, IN, dtype=torch.float32) for k in range(2)]
PIXELS = randn(90, 1, 4, 6, 6, dtype=torch.float32)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many small matrices: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Dense:
    """Stands in for the host: a change of the group's shape, now and then one that is wrong."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, group):
        rows, *rest = group.change_shape
        wide = torch.Size(rest).numel()
        seed, fate = self.rng.getrandbits(20), self.rng.random()
        change = (randn(seed, rows, 2) @ randn(seed + 1, 2, wide)).reshape(group.change_shape).float()
        if fate < 0.05:
            return change * torch.nan
        if fate < 0.1:
            return change[1:]
        return change * self.rng.choice((1.0, 1.0, 1e-30, 1e30, 0.0))


def read(path, rng):
    tensors, _ = read_safetensors(path)
    adapter = read_adapter(tensors, KEYS, name=path.name, fingerprint="file")
    assert [record.key for record in adapter.records] == list(tensors), "a key without a record, or with two"
    options = ConvertOptions(rng.choice((0, 1, 3, 64)), rng.choice((0.0, 1e-3, 0.5)))
    return convert(adapter, options, Dense(rng), parts=rng.choice((("model",), ("model", "clip"))))


def merge_both(adapter, rng):
    strengths = rng.choice((1.0, -0.5, 3.0)), rng.choice((0.0, 1.0, 0.7))
    tasks = [Task(adapter, *strengths, ("p",)), OTHER]
    unsupported = rng.choice(("refuse", "pass_through"))
    account(merge(tasks, SumMerge(), unsupported=unsupported), adapter)
    used = [s for s in build_stacks(tasks) if s.target.part == "model"]

    def run_pass(index, tap):
        for name in ("lin", "qkv"):  # mod never runs
            ROOT[name](TOKENS[index])
        ROOT["conv"](PIXELS)

    calibration = calibrate(ROOT, tasks, used, run_pass)
    account(merge(tasks, SSRMerge(), calibration, unsupported=unsupported), adapter)


def account(result, adapter):
    """Every key has one fate; the merge can be written and read back with every key matched."""
    mine = result.report.files[0]
    assert mine.keys == len(adapter.records) == sum(mine.fates.values()) and set(mine.fates) <= set(FATE_WORDS)
    for layer in result.layers.values():
        assert bool(torch.isfinite(layer.up).all()) and bool(torch.isfinite(layer.down).all())
    if result.layers and not any(target.module_path == "embed" for target, _ in result.vectors):
        tensors = to_tensors(result, EMITTED, KEY_STYLES[0])
        again = read_adapter(tensors, EMITTED, name="again", fingerprint="again")
        assert not again.keys_with("unmatched") and not again.keys_with("shadowed")


def _emitted():
    """The same layers under the names that merges are written with."""
    names = {}
    for entry in KEYS.values():
        prefix = "text_encoders." if entry.target.part == "clip" else "diffusion_model."
        if entry.row_order is None:
            name = prefix + entry.target.module_path
            name += "" if entry.target.out_slice is None else f".{entry.target.out_slice[0]}"
            names[name + ("" if entry.parameter == "weight" else f".{entry.parameter}")] = entry
    return names


EMITTED = _emitted()


def outcome(path, rng):
    """How far a file came; the message of a refusal names the file while it is read."""
    try:
        adapter = read(path, rng)
    except SSRMergeError as err:
        assert path.name in str(err) and str(err).startswith("SSR-Merge: "), err
        return "refused"
    try:
        merge_both(adapter, rng)
    except SSRMergeError as err:
        assert err.file or err.layer or "LoRA number 1" in str(err), err
        return "not merged"
    return "merged"


def write(path, tensors):
    save_file(tensors, path)


def run_case(seed, folder):
    rng = random.Random(seed)
    file = random_file(rng, SHAPES)
    damaged, done = perturb(rng, file)
    path = Path(folder) / "case.safetensors"
    write(path, damaged)
    start = time.monotonic()
    try:
        found = outcome(path, rng)
    except Exception as err:
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in damaged.items()}
        raise AssertionError(f"seed {seed}: {done}\n{shapes}") from err
    assert time.monotonic() - start < SLOW, f"seed {seed}: {done}"
    return found


@pytest.mark.parametrize("batch", range(BATCHES))
def test_broken_files(batch, tmp_path):
    found = [run_case(batch * CASES + i, tmp_path) for i in range(CASES)]
    assert min(found.count(one) for one in ("merged", "refused")) > CASES // 20, "the fuzz no longer reaches both"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stranger"])
def test_the_files_that_the_fuzz_starts_from_are_sound(kind, tmp_path):
    """Otherwise it would only ever see refusals."""
    rng = random.Random(1)
    for name, shape in SHAPES.items():
        if len(shape) > 1:
            tensors = {name + suffix: value for suffix, value in KINDS[kind](rng, shape).items()}
            adapter = read_adapter(tensors, KEYS, name="sound", fingerprint="sound")
            assert {r.status for r in adapter.records} <= {"low_rank", "vector", "unsupported"}
            assert len(adapter.layers) + len(adapter.dense) + len(adapter.vectors) > 0


def test_random_bytes(tmp_path):
    """Header length, header and data of a sound file, overwritten or cut anywhere."""
    rng, path = random.Random(5), tmp_path / "case.safetensors"
    found = []
    for seed in range(600):
        save_file({k: v.contiguous() for k, v in random_file(rng, SHAPES).items()}, path)
        data = bytearray(path.read_bytes())
        header = int.from_bytes(data[:8], "little")
        for _ in range(rng.choice((1, 1, 2, 20))):
            end = rng.choice((8, 8 + header, len(data)))
            data[rng.randrange(end)] = rng.getrandbits(8)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        if rng.random() < 0.1:
            data += bytes(rng.getrandbits(8) for _ in range(rng.randint(1, 50)))
        path.write_bytes(data)
        try:
            found.append(outcome(path, rng))
        except Exception as err:
            raise AssertionError(f"case {seed}: {bytes(data[:200])!r}") from err
    assert min(found.count(one) for one in ("merged", "refused")) > 20
