"""Record files: lazily read, half precision, and whatever happens to them refused by name or unchanged."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recording import Attention, identity_of, record_all, recorded_tasks, tokens
from safetensors.torch import load_file, save_file

from ssr_core import (
    ConvertOptions,
    FileError,
    IncompatibleError,
    RecordOptions,
    Share,
    Target,
    from_records,
    open_record,
    read_safetensors,
    save_record,
)
from ssr_core.signals import record_io, record_parts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def saved(tmp_path):
    shares, _ = record_all(tmp_path, Attention(), recorded_tasks(1), [[tokens(0)]])
    return shares[0][0].record.path


def contents(path):
    found = {}
    for target, f in open_record(path).layers().items():
        rows, weights = f.sample.rows.clone(), f.sample.weights.clone()
        found[str(target)] = (f.columns.clone(), f.norms.clone(), rows, weights, f.own, f.trace)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(
        all(map(torch.equal, x[:4], y[:4])) and x[4:] == y[4:] for x, y in zip(a.values(), b.values(), strict=True)
    )


def test_round_trip(saved):
    one = recorded_tasks(1)[0]
    record = open_record(saved)
    assert record.identity == identity_of(one) and record.options == RecordOptions(
        columns=8, exact_limit=0, sampled_tokens=16
    )
    layers = record.layers()
    assert layers[Target("q")] is layers[Target("v")] and set(layers) == {Target(n) for n in "qkvo"}
    again = saved.with_name("again.ssrrecord")
    save_record(again, record.identity, record.options, layers)
    assert again.read_bytes() == saved.read_bytes()


def test_three_layers_with_one_input_store_one_factor_in_half_precision(saved):
    stored = load_file(saved)
    assert len(stored) == 10 and {stored[name].dtype for name in stored if name.endswith("columns")} == {torch.float16}
    kept = sum(len(v) for n, v in stored.items() if n.endswith(("norms", "scales")))
    assert saved.stat().st_size < 2 * 60 * kept + 6000


def test_only_what_is_asked_for_is_read(saved, monkeypatch):
    read = []
    check = record_io.RecordFile.check
    monkeypatch.setattr(record_io.RecordFile, "check", lambda self, i, *more: read.append(i) or check(self, i, *more))
    with open_record(saved).reading() as reader:
        assert read == []
        assert reader(Target("q")) is reader(Target("k"))
        assert reader(Target("stranger")) is None
    assert len(read) == 1


def test_a_converted_lora_and_its_settings_survive(saved):
    record = open_record(saved)
    task = replace(
        record.identity.task, convert_options=ConvertOptions(8, 0.1, "drop"), prompts=("ü", "conditioning:1")
    )
    identity = replace(record.identity, task=task, settings={"custom": [1, {"a": None}]})
    save_record(saved, identity, record.options, record.layers())
    assert open_record(saved).identity == identity


@pytest.mark.parametrize("batch", range(4))
def test_no_damaged_byte_is_ever_believed(saved, batch):
    """Bytes overwritten anywhere, and files cut anywhere: refused by name, or nothing changed."""
    rng = random.Random(batch)
    truth, whole = contents(saved), saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(rng.choice((8, header, len(data))))] = rng.getrandbits(8)
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        saved.write_bytes(data)
        try:
            found = contents(saved)
        except FileError as err:
            assert saved.name in str(err), err
            refused += 1
            continue
        assert same(found, truth)
    assert refused > 100


def rewritten(path, change):
    tensors, metadata = read_safetensors(path)
    digest, _, text = metadata[record_io.FORMAT].partition(" ")
    header = json.loads(text)
    change(header)
    save_file(tensors, path, {record_io.FORMAT: f"{digest} {json.dumps(header)}"})
    return path


def test_a_future_version_is_refused(saved):
    with pytest.raises(FileError, match="record format 2, this version reads 1"):
        open_record(rewritten(saved, lambda h: h.update(version=2)))


def test_a_header_that_somebody_edited_is_refused(saved):
    with pytest.raises(FileError, match="header was changed"):
        open_record(rewritten(saved, lambda h: h.update(model="mine")))


def resealed(path, change, **tensors):
    """As `rewritten`, by somebody who knows how headers are sealed."""
    known, metadata = read_safetensors(path)
    header = json.loads(metadata[record_io.FORMAT].partition(" ")[2])
    change(header)
    for name, value in tensors.items():
        index, part = name.removeprefix("t").split("_")
        known[f"{index}.{part}"] = value
        header["factors"][int(index)]["crc32"][part] = record_parts.crc(value)
    text = json.dumps(header)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(known, path, {record_io.FORMAT: f"{digest} {text}"})
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["factors"][0].update(layers=[1]),
        lambda h: h["factors"][0].update(layers=[["model", 3]]),
        lambda h: h["factors"][0].update(layers=[["nowhere", "q"]]),
        lambda h: h["factors"][0].update(layers={"a": 1}),
        lambda h: h["factors"][0].update(trace="1.5"),
        lambda h: h["factors"][0].update(tokens=True),
        lambda h: h["factors"][0].update(own=-1),
        lambda h: h["factors"][0].update(own=1.5),
        lambda h: h["factors"][0].update(nonfinite="0"),
        lambda h: h["factors"][0].update(bfloat16="no"),
        lambda h: h["factors"][0]["crc32"].update(norms="1"),
        lambda h: h.update(settings=[1]),
        lambda h: h.update(model=3),
        lambda h: h.update(text_encoder=None),
        lambda h: h["task"].update(strength_model="1"),
        lambda h: h["task"].update(prompts="ab"),
        lambda h: h["task"].update(prompts=[1]),
        lambda h: h["task"].update(name=None),
        lambda h: h["task"].update(convert_options={"max_rank": "8", "tolerance": 0.1, "rest": "drop"}),
        lambda h: h["options"].update(columns="64"),
        lambda h: h["options"].update(columns=0),
        lambda h: h["options"].update(budget_mb="1"),
    ],
)
def test_headers_of_another_shape_are_refused(saved, change):
    with pytest.raises(FileError, match="the record is damaged") as found:
        open_record(resealed(saved, change))
    assert saved.name in str(found.value)


def test_samples_that_weigh_less_than_nothing_are_refused(saved):
    stored = load_file(saved)
    for part in ("weights", "scales", "norms"):
        resealed(saved, lambda h: None, **{f"t0_{part}": -stored[f"0.{part}"]})
        with pytest.raises(FileError, match="values are damaged"):
            open_record(saved).layers()
        resealed(saved, lambda h: None, **{f"t0_{part}": stored[f"0.{part}"]})
    open_record(saved).layers()


def test_a_factor_of_another_width_is_refused(tmp_path):
    tasks = recorded_tasks(2)
    shares, _ = record_all(tmp_path, Attention(), tasks, [[tokens(0)], [tokens(1)]])
    path = shares[0][0].record.path
    stored = load_file(path)
    cut = {f"t0_{part}": stored[f"0.{part}"][..., :40, :].contiguous() for part in ("columns",)}
    resealed(path, lambda h: None, **cut, t0_rows=stored["0.rows"][:, :40].contiguous())
    with pytest.raises(IncompatibleError, match="inputs of 40 features here, the LoRAs read 60") as found:
        from_records(tasks, [[Share(open_record(path))], shares[1]])
    assert path.name in str(found.value)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.ssrrecord"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(FileError, match="no SSR record"):
        open_record(path)
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(FileError, match="pickle"):
        open_record(path)
    with pytest.raises(FileError, match="does not exist"):
        open_record(tmp_path / "missing.ssrrecord")


def test_swapped_tensors_are_noticed(saved):
    tensors, metadata = read_safetensors(saved)
    tensors["0.norms"], tensors["1.norms"] = tensors["1.norms"].clone(), tensors["0.norms"].clone()
    save_file(tensors, saved, metadata)
    with pytest.raises(FileError, match="values are damaged"):
        open_record(saved).layers()


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
from recording import identity_of, recorded_tasks
from ssr_core import Calibration, FileError, GramStats, InputFactor, RecordOptions, Target
from ssr_core import save_calibration, save_record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
factor = InputFactor(torch.ones(4096, 32).half(), torch.ones(32), 8, 40.0, 10.0)
identity, q = identity_of(recorded_tasks(1)[0]), Target("q")
stats = GramStats(torch.ones(2, 256, 256), torch.ones(2), torch.zeros(2), (128, 128))
for name in ("new.record", "earlier.record", "new.calibration", "earlier.calibration"):
    path = Path({folder!r}) / name
    if "earlier" in name:
        path.write_bytes(b"earlier")
    for limit in (0, 100, 5000, 200_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            if "record" in name:
                save_record(path, identity, RecordOptions(), {{q: factor}})
            else:
                save_calibration(Calibration((identity.task,) * 2, {{q: stats}}, {{q: (0, 1)}}), path, overwrite=True)
            raise SystemExit(f"{{name}} fits into {{limit}} bytes")
        except FileError as err:
            assert "free disk space" in str(err) and str(path) in str(err), err
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The operating system refuses the bytes: nothing half-written, an earlier file untouched."""
    code = FULL_DISK.format(root=str(ROOT), tests=str(ROOT / "tests" / "unit"), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier.calibration", "earlier.record"]
    assert {p.read_bytes() for p in tmp_path.iterdir()} == {b"earlier"}
