"""What the speed benchmark says about itself: its operation counts, its memory meter, its published algorithm."""

import math

import pytest
import torch
from helpers import rel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.arithmetic import Cell, added_operations, factor_bytes, forward_operations, gram_bytes
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.model import Shape
from benchmarks.speed.solving import exponent
from benchmarks.speed.workbench import Workbench
from ssr_core import PaperMerge, build_stacks, memory_need

CPU = torch.device("cpu")
SHAPES = [Shape(32, 1, 0, 48, 16), Shape(16, 2, 1, 24, 8), Shape(16, 1, 0, 64, 0, 4)]


class Products(TorchDispatchMode):
    """Counts the operations of every matrix product that really runs."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        pair = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "addmm_": args[1:3], "baddbmm": args[1:3]}.get(
            name
        )
        if pair is not None:
            self.operations += 2 * math.prod(pair[0].shape) * pair[1].shape[-1]
        return func(*args, **(kwargs or {}))


def products(run):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Products() as counted:
        run()
    return counted.operations


@pytest.mark.parametrize("shape", SHAPES)
def test_operation_counts_are_those_of_the_products_that_run(shape):
    cell = Cell(shape, 3, 2)
    bench = Workbench(cell, CPU, torch.float32)
    bare = products(bench.bare)
    assert bare == cell.count * forward_operations(shape)
    assert products(bench.calibrate) - bare == cell.count * added_operations(cell)


def test_peak_memory_by_hand():
    def run():
        one = torch.ones(1000)  # 4000
        two = torch.ones(3000)  # 16000
        del one  # 12000
        three = torch.ones(500)  # 14000
        del two, three
        return torch.ones(2000)  # 8000

    assert peak_bytes(run, CPU) == 16000
    assert peak_bytes(lambda: torch.ones(1000, dtype=torch.float64).exp_(), CPU) == 8000


def test_memory_of_calibration_is_what_the_engine_forecasts():
    """The benchmark's prediction, written down apart from the engine's own, agrees with it."""
    cell = Cell(SHAPES[0], 3, 2)
    need = memory_need(build_stacks(Workbench(cell, CPU, torch.float32).tasks), torch.float32)
    device = factor_bytes(cell, 4, on_cpu=False) + gram_bytes(cell, on_cpu=False)
    assert need.device == device
    ups = factor_bytes(cell, 4, on_cpu=True) - (need.host - gram_bytes(cell, on_cpu=True))
    assert ups == 4 * cell.rank * 2 * 9 * 32  # two streams of 9 d outputs


def test_published_algorithm_and_paper_mode_agree_and_the_weights_come_back():
    cell = Cell(SHAPES[0], 3, 4)
    with torch.no_grad():
        bench = Workbench(cell, CPU, torch.float64)
        before = {name: value.clone() for name, value in bench.model.state_dict().items()}
        bench.calibrate()
        bench.published()
        assert bench.router_difference() < 1e-6  # the LoRAs' files are float32
        assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in bench.model.modules())
        stacks = build_stacks(bench.tasks, like=bench.calibration.stack_tasks)
        stats = [bench.calibration.stats_for(stack, [0, 1, 2]) for stack in stacks]
        for stack, ours in zip(stacks, PaperMerge().merge(stacks, stats, CPU), strict=True):
            down, up = bench.answer.factors[stack.target.module_path]
            assert rel(ours.up @ ours.down, up.double() @ down.double()) < 1e-6


def test_plain_pass_is_the_pass_of_a_patched_model():
    cell = Cell(SHAPES[1], 1, 2)
    with torch.no_grad():
        bench = Workbench(cell, CPU, torch.float32)
        outputs = []
        handle = bench.model.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
        bench.bare()
        bench.plain()
        for target, layer in bench.tasks[0].adapter.layers.items():
            bench.model.get_parameter(target.module_path + ".weight").add_(layer.delta(torch.float32))
        bench.bare()
        handle.remove()
    bare, plain, patched = outputs
    assert rel(plain, patched) < 1e-4 < rel(bare, patched)


def test_fitted_exponent_of_a_power_law():
    rows = [
        {"d": 8, "K": k, "r": r, "engine_layers_per_second": 5.0 / (k * r) ** 2.5} for k in (2, 4) for r in (8, 16, 32)
    ]
    rows.append({"d": 9, "K": 2, "r": 8, "engine_layers_per_second": 1e9})
    assert exponent(rows, "engine", d=8) == pytest.approx(2.5)
