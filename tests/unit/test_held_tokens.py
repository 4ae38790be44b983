"""Tokens that are held out: which they are, and that everything that is done to statistics is done to them."""

import pytest
import torch
from helpers import F64, LAYER, calibrated, conflicting_tasks, linear64, patches, randn, rel, task_tokens
from safetensors.torch import save_file
from torch import nn

from ssr_core import (
    Calibration,
    Calibrator,
    FileError,
    SampleOptions,
    build_stacks,
    load_calibration,
    read_safetensors,
    save_calibration,
)
from ssr_core.gram import GramAccumulator
from ssr_core.triangles import pack, unpack

OUT, IN, RANK = 7, 10, 3
TASKS = conflicting_tasks(3, OUT, IN, RANK, seed=4)
TOKENS = [task_tokens(k, 41 + k, IN) for k in range(3)]


def held_rows(x):
    """Every eighth token, the fourth of each eight."""
    return torch.stack([row for at, row in enumerate(x) if at % 8 == 3])


def gram(stack, x):
    z = x @ stack.basis.T
    return z.T @ z


def test_one_token_in_eight_is_held_out_and_the_rest_is_fitted():
    stats = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS]).stats[LAYER]
    (stack,) = build_stacks(TASKS)
    fitted, held = stats.fitted(), stats.held_out()
    for k, x in enumerate(TOKENS):
        others = torch.stack([row for at, row in enumerate(x) if at % 8 != 3])
        assert rel(held.gram[k], gram(stack, held_rows(x))) < 1e-12
        assert rel(fitted.gram[k], gram(stack, others)) < 1e-12
        assert rel(stats.gram[k], gram(stack, x)) < 1e-12
        assert (held.tokens[k], fitted.tokens[k]) == (len(held_rows(x)), len(others))
    assert fitted.held is None and held.held is None


@pytest.mark.parametrize("sizes", [[41], [1] * 41, [7, 20, 14], [3, 38]])
def test_counting_goes_on_from_call_to_call_and_from_chunk_to_chunk(sizes, monkeypatch):
    monkeypatch.setattr("ssr_core.gram._CHUNK", 16)
    z = randn(1, 41, 5)
    accumulator = GramAccumulator(5, z.device, F64)
    for part in z.split(sizes):
        accumulator.add(part)
    accumulator.to_host()
    expected = held_rows(z).T @ held_rows(z)
    assert rel(unpack(accumulator.held_gram[None])[0], expected) < 1e-12
    assert float(accumulator.held_tokens) == 5.0


def test_weights_and_tokens_that_are_not_finite_count_as_among_the_others():
    z, weight = randn(2, 40, 4), torch.linspace(0, 2, 40, dtype=F64)
    z[3], z[12] = float("nan"), float("inf")  # the first is a held-out one
    accumulator = GramAccumulator(4, z.device, F64)
    accumulator.add(z, weight)
    accumulator.to_host()
    kept = [11, 19, 27, 35]
    expected = (z[kept] * weight[kept, None]).T @ z[kept]
    assert rel(unpack(accumulator.held_gram[None])[0], expected) < 1e-12
    assert float(accumulator.held_tokens) == pytest.approx(float(weight[kept].sum()), rel=1e-12)


def test_large_grams_are_held_out_whole(monkeypatch):
    monkeypatch.setattr("ssr_core.gram._PANEL", 4)
    z = randn(3, 64, 11)
    accumulator = GramAccumulator(11, z.device, F64)
    accumulator.add(z)
    accumulator.to_host()
    assert rel(unpack(accumulator.held_gram[None])[0], held_rows(z).T @ held_rows(z)) < 1e-12


def test_triangles_by_hand():
    matrix = torch.tensor([[[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]])
    assert pack(matrix).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    assert torch.equal(unpack(pack(matrix)), matrix)


def test_convolutions_hold_out_positions():
    conv = nn.Conv2d(2, OUT, 3).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 18, 2, seed=5, kernel=(3, 3))
    x = randn(6, 2, 2, 7, 6)
    stats = calibrated(conv, tasks, [[x], [2 * x]]).stats[LAYER]
    (stack,) = build_stacks(tasks)
    assert rel(stats.held_out().gram[0], gram(stack, held_rows(patches(x, conv)))) < 1e-12


def test_sampled_inputs_know_which_of_them_are_held_out():
    tasks = conflicting_tasks(2, OUT, IN, 2, seed=6)
    stats = calibrated(linear64(IN, OUT), tasks, [x.split(9) for x in TOKENS[:2]], sample=SampleOptions(30)).stats[
        LAYER
    ]
    for k, x in enumerate(TOKENS[:2]):
        sample = stats.samples[k]
        numbers = [next(i for i, row in enumerate(x) if torch.equal(row, kept)) for kept in sample.rows]
        assert sample.held.tolist() == [i % 8 == 3 for i in numbers] and 0 < int(sample.held.sum()) < 10
        for part, held in ((stats.held_out(), True), (stats.fitted(), False)):
            assert torch.equal(part.samples[k].rows, sample.rows[sample.held == held])
            assert torch.equal(part.samples[k].weights, sample.weights[sample.held == held])


def test_samples_of_convolutions_hold_out_the_same_positions():
    conv = nn.Conv2d(2, OUT, 3).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 18, 2, seed=5, kernel=(3, 3))
    x = randn(6, 2, 2, 7, 6)
    stats = calibrated(conv, tasks, [[x], [2 * x]], sample=SampleOptions(1000)).stats[LAYER]
    held = stats.samples[0].rows[stats.samples[0].held]
    assert rel(held.T @ held, held_rows(patches(x, conv)).T @ held_rows(patches(x, conv))) < 1e-12


def test_subsets_and_other_orders_carry_their_held_out_share():
    stats = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS]).stats[LAYER]
    again = calibrated(linear64(IN, OUT), [TASKS[2], TASKS[0]], [[TOKENS[2]], [TOKENS[0]]]).stats[LAYER]
    picked = stats.subset([2, 0])
    assert rel(picked.held_out().gram, again.held_out().gram) < 1e-12
    assert picked.held.tokens.tolist() == again.held.tokens.tolist()
    assert stats.subset([0, 1, 2]) is stats


def test_a_layer_with_too_few_tokens_has_no_held_out_share():
    stats = calibrated(linear64(IN, OUT), TASKS[:2], [[TOKENS[0]], [TOKENS[1][:3]]]).stats[LAYER]
    assert stats.held_out() is None and stats.fitted().tokens.tolist() == [36.0, 3.0]
    one = calibrated(linear64(IN, OUT), TASKS[:2], [[x[:4]] for x in TOKENS[:2]]).stats[LAYER]
    assert one.held_out().tokens.tolist() == [1.0, 1.0] and one.fitted().tokens.tolist() == [3.0, 3.0]


def test_nothing_is_held_out_if_so_wanted():
    stats = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS], held_out=0).stats[LAYER]
    assert stats.held is None and stats.fitted() is None and stats.held_out() is None
    calibrator = Calibrator(build_stacks(TASKS), held_out=4)
    module = linear64(IN, OUT)
    for k in range(3):
        with calibrator.task(k) as tap, tap.attached(nn.ModuleDict({"layer": module})):
            module(TOKENS[k])
    assert calibrator.result()[LAYER].held.tokens.tolist() == [len(x[3::4]) for x in TOKENS]


# ---------------------------------------------------------------- on disk


def saved(tmp_path, change=lambda tensors: None):
    path = tmp_path / "c.safetensors"
    calibration = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS])
    save_calibration(calibration, path)
    tensors, metadata = read_safetensors(path)
    change(tensors)
    save_file(tensors, path, metadata)
    return calibration, path


def test_files_keep_the_held_out_share(tmp_path):
    calibration, path = saved(tmp_path)
    stats, again = calibration.stats[LAYER], load_calibration(path).stats[LAYER]
    assert torch.equal(again.held.packed, stats.held.packed) and torch.equal(again.held.tokens, stats.held.tokens)


def test_files_from_before_are_read_and_have_none(tmp_path):
    def old(tensors):
        del tensors["0.held_gram"], tensors["0.held_tokens"]

    calibration, path = saved(tmp_path, old)
    loaded = load_calibration(path)
    assert isinstance(loaded, Calibration) and loaded.stats[LAYER].held is None
    assert (loaded.stats[LAYER].gram - calibration.stats[LAYER].gram).abs().max() < 1e-9


DAMAGE = {
    "tokens missing": lambda t: t.pop("0.held_tokens"),
    "more than there are": lambda t: t["0.held_tokens"].__setitem__(1, 1e6),
    "negative": lambda t: t["0.held_tokens"].__setitem__(1, -1.0),
    "short": lambda t: t.update({"0.held_gram": t["0.held_gram"][:, 1:].contiguous()}),
    "nan": lambda t: t["0.held_gram"].__setitem__((0, 0), float("nan")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shares_are_refused(tmp_path, name):
    with pytest.raises(FileError, match="damaged"):
        load_calibration(saved(tmp_path, DAMAGE[name])[1])
