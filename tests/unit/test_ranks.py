"""Several processes calibrate what one would, to rounding; a lost one leaves an error and no file."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import rel
from rank_worker import PROMPTS, SCENES, calibration_of

from ssr_core import CalibrationError, GramStats, Ranks, SampleOptions, SSRMerge, Target, load_calibration, merge
from ssr_core.ranks import PATIENCE
from ssr_core.scenes import SceneStats

WORKER = Path(__file__).with_name("rank_worker.py")


def start(size, folder, *more):
    """As torchrun would, without its supervisor: its variables, one process for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *more],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def assert_same_scenes(found, expected, sampled):
    """Each scene ran in one process: no sum is rounded but by the exchange."""
    if expected is None:
        assert found is None
        return
    assert rel(found.packed, expected.packed) < 1e-10
    assert bool((expected.tokens > 0).all())
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.active, expected.active)
    assert (found.samples is None) == (expected.samples is None) == (not sampled)


@pytest.mark.parametrize(
    ("size", "more"),
    [(2, ()), (4, ()), (2, ("sample",)), (4, ("sample",)), (2, ("scenes",)), (2, ("sample", "scenes"))],
)
def test_many_processes_equal_one(size, more, tmp_path):
    running = start(size, tmp_path, *more)
    messages = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * size, messages
    sampled = "sample" in more
    scenes = SCENES if "scenes" in more else ()
    tasks, expected = calibration_of(Ranks(), sample=SampleOptions(8) if sampled else None, scenes=scenes)
    merged = merge(tasks, SSRMerge(), expected)
    for rank in range(size):
        found = load_calibration(tmp_path / f"rank{rank}.safetensors")
        assert found.stats.keys() == expected.stats.keys() and found.settings == expected.settings
        assert found.scenes == expected.scenes == scenes
        for target, stats in expected.stats.items():
            assert found.stats[target].gram.dtype == torch.float64
            assert rel(found.stats[target].gram, stats.gram) < 1e-10
            assert torch.equal(found.stats[target].tokens, stats.tokens)
            assert torch.equal(found.stats[target].nonfinite, stats.nonfinite)
            held, own = found.stats[target].held, stats.held
            if sampled:  # all prompts of a LoRA in one process: the same tokens are held out
                assert (held.packed - own.packed).norm() <= 1e-10 * own.packed.norm()
                assert torch.equal(held.tokens, own.tokens)
            # and else as many of them, in other places
            assert (held.tokens - own.tokens).abs().max() <= size * max(map(len, PROMPTS))
            assert (stats.samples is None) == (found.stats[target].samples is None) == (not sampled)
            for one, other in zip(stats.all_samples, found.stats[target].all_samples, strict=True):
                assert torch.equal(one.rows, other.rows) and torch.equal(one.weights, other.weights)
                assert other.held is None if one.held is None else torch.equal(one.held, other.held)
            assert_same_scenes(found.stats[target].scenes, stats.scenes, sampled)
        again = merge(tasks, SSRMerge(), found)
        for target, layer in merged.layers.items():
            assert rel(again.layers[target].delta(), layer.delta()) < 1e-10


def test_a_lost_process_is_an_error_on_all_and_no_file(tmp_path):
    assert timedelta(hours=12) <= PATIENCE  # a slow process may take as long; a lost one is noticed all the same
    running = start(3, tmp_path, "lost")
    messages = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [1, -9, 1]
    for rank in (0, 2):
        assert f"process {rank} of 3 lost another one" in messages[rank], messages[rank]
        assert "What to do" in messages[rank]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs SIGSTOP")
def test_a_process_that_hangs_is_an_error_on_the_others_after_their_patience(tmp_path):
    running = start(3, tmp_path, "stopped")
    try:
        messages = {rank: running[rank].communicate(timeout=240)[1] for rank in (0, 2)}
    finally:
        running[1].kill()
        running[1].communicate()
    assert [running[rank].returncode for rank in (0, 2)] == [1, 1]
    for rank, message in messages.items():
        assert f"process {rank} of 3 lost another one" in message, message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nothing", [False, True])
def test_all_hear_what_the_first_process_says(tmp_path, nothing):
    running = start(3, tmp_path, "told", *(["nothing"] if nothing else []))
    messages = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 3, messages
    heard = [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(3)]
    assert heard == (["", "", ""] if nothing else ["process 0 says: größer"] * 3)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("whole", [False, True])
def test_every_pass_has_one_process_and_the_loads_are_even(size, whole):
    counts = [len(prompts) for prompts in PROMPTS] + [0, 4]
    dealt = [Ranks(rank, size).shares(counts, whole) for rank in range(size)]
    for index, count in enumerate(counts):
        assert sorted(i for shares in dealt for i in shares[index]) == list(range(count))
    loads = [sum(map(len, shares)) for shares in dealt]
    assert max(loads) - min(loads) <= (max(counts) if whole else 1)
    if whole:
        assert all(len(shares[i]) in (0, count) for shares in dealt for i, count in enumerate(counts))


def test_other_joint_prompts_than_the_others_are_noticed(monkeypatch):
    """Their LoRAs and layers are alike; the sums would not fit, or fit wrongly."""
    described = []

    def all_reduce(total):
        described.append(total[0].item())
        total[1] = 1.0

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    gram, nothing = torch.ones(2, 2, 2), torch.zeros(2, dtype=torch.int64)
    for active in ([[True, True]], [[False, False]], [[True, True], [False, False]]):
        count = len(active)
        counts = torch.ones(count), torch.zeros(count, dtype=torch.int64)
        seen = SceneStats(torch.ones(count, 3), *counts, torch.tensor(active))
        stats = {Target("a"): GramStats(gram, torch.ones(2), nothing, (1, 1), scenes=seen)}
        with pytest.raises(CalibrationError, match="process 0 of 2 has other LoRAs"):
            Ranks(0, 2).combined(stats)
    assert len(set(described)) == 3


def test_other_layers_than_the_others_are_refused(monkeypatch):
    """Process 1's number arrives beside that of process 0, and is another one."""
    stats = {Target("a"): GramStats(torch.ones(1, 2, 2), torch.ones(1), torch.zeros(1, dtype=torch.int64), (2,))}
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.add_(torch.tensor([0.0, 12345.0])))
    with pytest.raises(CalibrationError, match="process 0 of 2 has other LoRAs"):
        Ranks(0, 2).combined(stats)
