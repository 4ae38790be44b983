"""Calibration on quantised bases: the statistics are those of the inputs that the layers really get, and
those inputs are the ones of a float model with the same weights and the LoRA in full."""

import pytest
import torch
from safetensors.torch import save_file

from .merging import SEED, MergeGraph, pair
from .quantised import STORED, base_hash, load_base, saved_deltas
from .reference import Recording
from .test_rounds import MIDDLE
from .test_router import RIDGE, expected_deltas
from .weights import facts, relative_error

CASES = [(case, kind) for case in ("flux-fused-split", "wan21") for kind in STORED]
CASES += [("sd15-convolutions", "unscaled_fp8_e4m3fn")]

# How far inputs of the median layer may be from the float model's. Formats that round activations to 8 or 4 bits
# are bounded by that rounding (measured, times two); the others by float32.
ACTIVATIONS = {"int8": 0.03, "int8_convrot": 0.03, "convrot_w4a4": 0.4, "asym_w4a8_int8": 0.03}


def calibrate(server, base, case, kind, rounds=1):
    """One merge on the quantised base, its passes recorded; the deltas that were saved."""
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    prefix = f"passes_{case}_{kind}_{rounds}"
    model = load_base(graph, family, kind)
    watched = graph.add("RecordPasses", model=model, prefix=prefix)
    merged = graph.merge(family, tasks, model=watched, ridge=RIDGE, sampled_tokens=0, rounds=rounds)
    saved = graph.save(merged, prefix)
    dump = graph.dump(merged, prefix, base_only=True)
    result = server.run(graph.prompt).ok()
    return prefix, saved_deltas(base, family, result, saved), facts(result, dump)


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_router_equals_the_dense_reference_on_the_recorded_inputs(server, base, case, kind):
    untouched = base_hash(server, case, kind)
    _, tasks = pair(base, case)
    prefix, found, state = calibrate(server, base, case, kind)
    expected = expected_deltas(base, tasks, prefix)
    errors = {name: relative_error(found[name], delta) for name, delta in expected.items()}
    assert found.keys() == expected.keys() and max(errors.values()) < 1e-3
    assert state["base_hash"] == untouched and state["hooks"] == 0


@pytest.mark.parametrize("kind", STORED)
def test_recorded_inputs_are_those_of_the_dense_float_model(server, base, kind):
    case = "flux-fused-split"
    family, tasks = pair(base, case)
    prefix, _, _ = calibrate(server, base, case, kind)
    for index, task in enumerate(tasks):
        save_file(
            {name: delta.contiguous() for name, delta in task.scaled().items()}, base / "output" / "task.safetensors"
        )
        sample_twin(server, family, kind, task, f"twin_{kind}_{index}")
        ours, twin = Recording(base, f"{prefix}_{index}"), Recording(base, f"twin_{kind}_{index}")
        errors = [relative_error(ours.rows(name), twin.rows(name)) for name in task.file.truth]
        print(f"{kind} LoRA {index}: inputs differ by {torch.tensor(errors).median():.1e}")
        assert torch.tensor(errors).median() < ACTIVATIONS.get(kind, 1e-5)


@pytest.mark.parametrize("kind", ["int8", "nvfp4", "unscaled_fp8_e4m3fn"])
def test_a_second_round_runs_on_the_merge_of_the_first(server, base, kind):
    case = "flux-fused-split"
    family, tasks = pair(base, case)
    prefix, found, _ = calibrate(server, base, case, kind, rounds=2)
    expected = expected_deltas(base, tasks, prefix, rounds=2)
    assert max(relative_error(found[name], delta) for name, delta in expected.items()) < 1e-3
    for index, task in enumerate(tasks):
        graph = MergeGraph(server)
        once = graph.merge(family, tasks, model=load_base(graph, family, kind), ridge=MIDDLE, sampled_tokens=0)
        merged = f"merged_{kind}_{index}"
        sample_once(server, graph, graph.add("RecordInputs", model=once, prefix=merged), family, task)
        ours, theirs, alone = (
            Recording(base, one) for one in (f"{prefix}_{len(tasks) + index}", merged, f"{prefix}_{index}")
        )
        names = sorted(task.file.truth)
        errors = torch.tensor([relative_error(ours.rows(name), theirs.rows(name)) for name in names])
        moved = torch.tensor([relative_error(ours.rows(name), alone.rows(name)) for name in names])
        assert errors.max() < 1e-5 and moved.median() > 1e-2


def sample_twin(server, family, kind, task, prefix):
    """What every layer of the dense model sees in the pass of one LoRA; sampled by core nodes."""
    graph = MergeGraph(server)
    twin = graph.add(
        "TwinModel",
        {"salt": prefix},
        plain=graph.checkpoint(family),
        quantised=load_base(graph, family, kind),
        deltas="task.safetensors",
    )
    sample_once(server, graph, graph.add("RecordInputs", model=twin, prefix=prefix), family, task)


def sample_once(server, graph, watched, family, task):
    """Core's sampling of one step with a task's conditioning."""
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED),
        guider=graph.add("BasicGuider", model=watched, conditioning=graph.conditioning(family, task.text_seed)),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.first_sigmas(watched, 1),
        latent_image=graph.latent(family),
    )
    graph.add("SaveLatent", samples=sampled, filename_prefix="host/twin")
    server.run(graph.prompt).ok()
