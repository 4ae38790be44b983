"""Weights of padded text rows, against weighted Grams written out by hand."""

import pytest
import torch
from helpers import F64, LAYER, conflicting_tasks, linear64, randn, rel, task
from torch import nn

from ssr_core import Target, TextRows, build_stacks, calibrate
from ssr_core.padding import RowWeights, token_weights

REAL = torch.tensor([True, True, False, False, False, False, False, False])
ONE, SHARE = 1.0, 2 / 6
TEXT = {  # weight of each of the eight text tokens
    "balance": [ONE, ONE, *[SHARE] * 6],
    "include": [ONE] * 8,
    "exclude": [ONE, ONE, *[0.0] * 6],
}
IN = 6


def stats_of(path, x, mode, rows):
    """Grams of a module of this name after one described pass, and the coordinates of its tokens."""
    root = nn.Module()
    inner = root
    *parents, last = path.split(".")
    for name in parents:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(last, linear64(IN, 5))
    target = Target(path)
    tasks = [task(t.name, {target: t.adapter.layers[LAYER]}) for t in conflicting_tasks(2, 5, IN, 2, seed=1)]
    stacks = build_stacks(tasks)

    def run_pass(index, tap):
        tap.describe_text(rows)
        root.get_submodule(path)(x)

    stats = calibrate(root, tasks, stacks, run_pass, padding=mode).stats[target]
    return stats, x.reshape(-1, IN) @ stacks[0].basis.T


def check(path, x, mode, rows, weights):
    stats, z = stats_of(path, x, mode, rows)
    w = torch.tensor(weights, dtype=F64).reshape(-1)
    expected = torch.einsum("n,na,nb->ab", w, z, z)
    for k in range(2):
        assert rel(stats.gram[k], expected) < 1e-6  # weights are float32
        assert float(stats.tokens[k]) == pytest.approx(float(w.sum()), rel=1e-6)


@pytest.mark.parametrize("mode", TEXT)
@pytest.mark.parametrize(
    "path", ["blocks.0.txt_q", "txt_in", "b.0.attn2.to_k", "cap_embedder", "b.cross_attn.k", "add_k"]
)
def test_layers_that_read_only_text(path, mode):
    check(path, randn(1, 3, 8, IN), mode, TextRows(REAL), [TEXT[mode]] * 3)


@pytest.mark.parametrize("joint", ["first", "last"])
@pytest.mark.parametrize("mode", TEXT)
def test_joint_sequences(mode, joint):
    image = [ONE] * 5
    weights = TEXT[mode] + image if joint == "first" else image + TEXT[mode]
    check("single_blocks.0.linear1", randn(2, 2, 13, IN), mode, TextRows(REAL, joint), [weights] * 2)


@pytest.mark.parametrize(
    ("path", "shape", "rows"),
    [
        ("single_blocks.0.linear1", (2, 13), TextRows(REAL, "unknown")),  # nobody said where the text stands
        ("double_blocks.0.img_attn.qkv", (2, 13), TextRows(REAL, "first")),  # image rows, more than text rows
        ("img_in", (2, 13), TextRows(REAL, "first")),
        ("final_layer.linear", (2, 13), TextRows(REAL, "first")),
        ("noise_refiner.0.attention.qkv", (2, 13), TextRows(REAL, "first")),
        ("blocks.0.img_mlp", (2, 8), TextRows(REAL, "first")),  # an image that is as long as the text
        ("txt_in", (2, 7), TextRows(REAL)),  # shorter than the text
        ("txt_in", (2, 13), TextRows(REAL, "first")),  # a text layer, but of another length
        ("modulation", (2,), TextRows(REAL, "first")),  # one vector a sample
        ("single_blocks.0.linear1", (2, 2, 8), TextRows(REAL, "first")),
        ("blocks.0.qkv", (2, 13), None),
    ],
)
def test_no_match_weighs_one(path, shape, rows):
    count = torch.Size(shape).numel()
    check(path, randn(3, *shape, IN), "exclude", rows, [ONE] * count)


@pytest.mark.parametrize("mode", TEXT)
def test_text_encoder_reads_text_everywhere(mode):
    real = torch.stack([REAL, torch.arange(8) < 4])  # 6 real tokens, 10 padded ones
    weights = {
        "balance": [[ONE if r else 0.6 for r in row] for row in real.tolist()],
        "include": [[ONE] * 8] * 2,
        "exclude": [[ONE if r else 0.0 for r in row] for row in real.tolist()],
    }[mode]
    check("encoder.layers.0.fc1", randn(4, 2, 8, IN), mode, TextRows(real, everywhere=True), weights)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 8)])
def test_text_encoder_with_one_row_of_flags(shape):
    """`TextRows.real` is documented as (T,): it must then hold for every sample."""
    samples = torch.Size(shape).numel() // 8
    rows = TextRows(REAL, everywhere=True)
    check("encoder.layers.0.fc1", randn(4, *shape, IN), "exclude", rows, TEXT["exclude"] * samples)


def test_text_encoder_with_another_length_weighs_one():
    check("encoder.pooler", randn(4, 1, 1, IN), "exclude", TextRows(REAL[None], everywhere=True), [ONE])


def test_each_pass_has_its_own_rows():
    """The second pass describes another prompt; weights must not be left over from the first."""
    weights = RowWeights(TextRows(REAL), "exclude")
    again = RowWeights(TextRows(~REAL), "exclude")
    first = weights("txt_in", (1, 8), torch.device("cpu"))
    assert first.tolist() == TEXT["exclude"]
    assert again("txt_in", (1, 8), torch.device("cpu")).tolist() == [1 - w for w in TEXT["exclude"]]


def test_a_tap_forgets_the_last_description():
    root = nn.ModuleDict({"txt_in": linear64(IN, 5)})
    target = Target("txt_in")
    tasks = [task(t.name, {target: t.adapter.layers[LAYER]}) for t in conflicting_tasks(2, 5, IN, 2, seed=1)]
    x = randn(5, 1, 8, IN)

    def run_pass(index, tap):
        for rows in (TextRows(REAL), None):
            tap.describe_text(rows)
            root["txt_in"](x)

    stats = calibrate(root, tasks, build_stacks(tasks), run_pass, padding="exclude").stats[target]
    assert stats.tokens.tolist() == [10.0, 10.0]


@pytest.mark.parametrize(
    ("real", "share"),
    [([1, 1, 1, 0], 1.0), ([1, 0, 0, 0], 1 / 3), ([0, 0, 0, 0], 0.0), ([1, 0, 0, 0, 0, 0, 0, 0], 1 / 7)],
)
def test_balanced_padding_weighs_at_most_as_much_as_the_prompt(real, share):
    real = torch.tensor(real, dtype=torch.bool)
    weights = token_weights(real, "balance")
    assert torch.allclose(weights[~real], torch.full((int((~real).sum()),), share))
    assert bool((weights[real] == 1).all())


def test_without_padding_there_are_no_weights():
    assert token_weights(torch.ones(5, dtype=torch.bool), "exclude") is None
