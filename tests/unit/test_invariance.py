"""What must not change the answer: factorisation, scale, order, duplicated tokens."""

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, factors_of, linear64, randn, rel, task, task_tokens

from ssr_core import LoRALayer, PaperMerge, SSRMerge, merge

IN, OUT, RANK = 11, 8, 3
TOKENS = [task_tokens(k, 30 + 10 * k, IN) for k in range(3)]


def solve(tasks, tokens=TOKENS, method=None):
    calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens])
    return merge(tasks, method or SSRMerge(), calibration).layers[LAYER].delta()


def refactored(tasks, change):
    """Every LoRA as another pair of factors of the same delta; change gives (M, M^-1) for a task."""
    out = []
    for k, one in enumerate(tasks):
        layer = one.adapter.layers[LAYER]
        mix, inverse = change(k)
        out.append(task(one.name, LoRALayer(mix @ layer.down, layer.up @ inverse, layer.alpha)))
    return out


def generic_mix(k):
    mix = randn(400 + k, RANK, RANK) + 2 * torch.eye(RANK, dtype=torch.float64)
    return mix, torch.linalg.inv(mix)


TASKS = conflicting_tasks(3, OUT, IN, RANK, seed=3, alpha=1.5)


@pytest.mark.parametrize("anchor", ["sum", "average", "gains", "zero"])
def test_ssr_does_not_see_how_a_lora_is_factored(anchor):
    method = SSRMerge(ridge=0.05, anchor=anchor)
    assert rel(solve(refactored(TASKS, generic_mix), method=method), solve(TASKS, method=method)) < 1e-9


@pytest.mark.parametrize("c", [1e-3, 1e-2, 0.3, 10.0, 1e3])
def test_ssr_does_not_see_how_scale_is_shared(c):
    eye = torch.eye(RANK, dtype=torch.float64)
    scaled = refactored(TASKS, lambda k: (eye * c, eye / c) if k != 1 else (eye, eye))
    assert rel(solve(scaled), solve(TASKS)) < 1e-9


@pytest.mark.parametrize("c", [1e-3, 1e-2, 1e3])
def test_paper_mode_does_see_it(c):
    eye = torch.eye(RANK, dtype=torch.float64)
    method = PaperMerge(ridge=1e-2)
    scaled = refactored(TASKS, lambda k: (eye * c, eye / c))
    before, after = solve(TASKS, method=method), solve(scaled, method=method)
    assert rel(after, before) > 1e-3
    if c == 1e-3:
        assert after.norm() < 1e-2 * before.norm()


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("method", [SSRMerge(), SSRMerge(anchor="gains", ridge=0.1), PaperMerge()])
def test_order_of_the_tasks(order, method):
    permuted = solve([TASKS[i] for i in order], [TOKENS[i] for i in order], method)
    assert rel(permuted, solve(TASKS, method=method)) < 1e-10


def test_report_follows_the_order_of_the_tasks():
    calibration = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS])
    straight = merge(TASKS, SSRMerge(), calibration).report.layers[0]
    turned = merge(TASKS[::-1], SSRMerge(), calibration).report.layers[0]
    assert turned.tokens == straight.tokens[::-1] == (50.0, 40.0, 30.0)
    flipped = torch.tensor(turned.crosstalk["result"], dtype=torch.float64).flip(0, 1)
    assert rel(flipped, torch.tensor(straight.crosstalk["result"], dtype=torch.float64)) < 1e-9


def test_balance_ignores_that_a_task_has_its_tokens_twice():
    doubled = [torch.cat([TOKENS[0]] * 2), TOKENS[1], TOKENS[2]]
    assert rel(solve(TASKS, doubled), solve(TASKS)) < 1e-12
    loose = SSRMerge(balance=False)
    assert rel(solve(TASKS, doubled, loose), solve(TASKS, method=loose)) > 1e-3


@pytest.mark.parametrize("scale", [1e-4, 7.0, 1e4])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_scale_of_all_activations(scale, ridge):
    method = SSRMerge(ridge=ridge)
    assert rel(solve(TASKS, [x * scale for x in TOKENS], method), solve(TASKS, method=method)) < 1e-8


def test_paper_mode_depends_on_the_scale_of_activations():
    method = PaperMerge(ridge=1e-2)
    assert rel(solve(TASKS, [x * 1e-2 for x in TOKENS], method), solve(TASKS, method=method)) > 1e-2


def test_rotating_outputs_rotates_the_result():
    rotation = torch.linalg.qr(randn(9, OUT, OUT)).Q
    turned = [
        task(t.name, LoRALayer(layer.down, rotation @ layer.up, layer.alpha))
        for t, layer in ((t, t.adapter.layers[LAYER]) for t in TASKS)
    ]
    assert rel(solve(turned), rotation @ solve(TASKS)) < 1e-10


def test_rotating_inputs_and_adapters_together_rotates_the_result():
    rotation = torch.linalg.qr(randn(10, IN, IN)).Q
    turned = [
        task(t.name, LoRALayer(layer.down @ rotation.T, layer.up, layer.alpha))
        for t, layer in ((t, t.adapter.layers[LAYER]) for t in TASKS)
    ]
    assert rel(solve(turned, [x @ rotation.T for x in TOKENS]), solve(TASKS) @ rotation.T) < 1e-10


def test_factors_leave_with_even_norms_and_the_same_product():
    eye = torch.eye(RANK, dtype=torch.float64)
    scaled = refactored(TASKS, lambda k: (eye * 1e3, eye / 1e3))
    calibration = calibrated(linear64(IN, OUT), scaled, [[x] for x in TOKENS])
    layer = merge(scaled, SSRMerge(ridge=0.02), calibration).layers[LAYER]
    assert torch.allclose(layer.down.norm(dim=1), layer.up.norm(dim=0), rtol=1e-10)
    assert layer.rank == sum(len(down) for down, _ in factors_of(TASKS))
    assert rel(layer.delta(), solve(TASKS, method=SSRMerge(ridge=0.02))) < 1e-9
