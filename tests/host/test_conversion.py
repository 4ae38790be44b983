"""LoHa, LoKr, GLoRA, OFT, BOFT, DoRA and full differences: converted, they are what ComfyUI's loaders make of them."""

import re

import pytest

from .adapter_files import (
    ADAPTERS,
    ConversionGraph,
    adapter_file,
    change_errors,
    changed_weights,
    plain_file,
    run_both,
)
from .loras import family_lora
from .test_save import saved_name
from .weights import base_weights, dumped

STRENGTHS = (1.0, 0.7, -0.5)


def other_file(base, family):
    """A plain LoRA that shares every layer."""
    paths = {name.removeprefix("diffusion_model.").removesuffix(".weight") for name in changed_weights(family)}
    return family_lora(base, family, "native", 71, name=f"conv_other_{family}", include=paths.__contains__).name


def compare(base, family):
    before = base_weights(base, family)
    errors = change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), before)
    assert set(errors) == changed_weights(family)
    return max(errors.values())


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_the_sum_equals_cores_chained_loaders(server, base, family, kind, strength):
    """Relative to the change, not to the weights."""
    files = (adapter_file(base, family, kind), strength), (other_file(base, family), 0.8)
    ours, core = ConversionGraph(server, family), ConversionGraph(server, family)
    run_both(server, ours, ours.of(*files, mode="sum"), core, core.chain(*files))
    assert compare(base, family) < 1e-5


@pytest.mark.parametrize("strength", STRENGTHS[::2])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_what_rank_four_cuts_off_reaches_the_model_as_a_patch(server, base, family, kind, strength):
    files = (adapter_file(base, family, kind), strength), (other_file(base, family), 0.8)
    ours, core = (
        ConversionGraph(server, family, convert_rank=4, residual="pass_through"),
        ConversionGraph(server, family),
    )
    run_both(server, ours, ours.of(*files, mode="sum"), core, core.chain(*files))
    assert compare(base, family) < 1e-5


@pytest.mark.parametrize("kind", ["loha", "oft", "dora"])
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_dropped_the_model_lacks_what_the_report_says(server, base, family, kind):
    file = adapter_file(base, family, kind)
    ours, core = ConversionGraph(server, family, convert_rank=4, residual="drop"), ConversionGraph(server, family)
    merged = ours.of((file, 1.0), mode="sum")
    report = ours.add("PreviewAny", source=merged.out(4))
    text = run_both(server, ours, merged, core, core.chain((file, 1.0))).text(report)
    assert "is lost" in text and "convert_rank" in text
    largest = float(re.search(r"largest relative error ([\d.e+-]+)", text)[1])
    assert compare(base, family) == pytest.approx(largest, rel=0.06)  # printed with two digits
    assert largest > 0.01


@pytest.mark.parametrize(("rank", "residual"), [(1024, "pass_through"), (4, "drop")])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_the_saved_file_loads_to_the_model(server, base, family, kind, rank, residual):
    files = (adapter_file(base, family, kind), 0.7), (other_file(base, family), 0.8)
    graph = ConversionGraph(server, family, convert_rank=rank, residual=residual)
    merged = graph.of(*files)
    graph.dump(merged, "conv_ours")
    saved = graph.save(merged, f"conv_{kind}_{family}")
    name = saved_name(server.run(graph.prompt).ok(), saved)
    again, mark = ConversionGraph(server, family), len(server.log())
    server.schemas(refresh=True)
    again.dump(again.core_lora(again.checkpoint(family), name, 1.0), "conv_core")
    server.run(again.prompt).ok()
    assert compare(base, family) < 1e-5
    assert "lora key not loaded" not in server.log(mark) and "NOT LOADED" not in server.log(mark)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora", "oft"])
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_routed_it_equals_the_plain_lora_of_the_same_delta(server, base, family, kind):
    file, other, before = adapter_file(base, family, kind), other_file(base, family), base_weights(base, family)
    alone = ConversionGraph(server, family)
    alone.dump(alone.chain((file, 1.0)), "conv_alone")
    server.run(alone.prompt).ok()
    seen = dumped(base, "conv_alone")
    deltas = {name: seen[name].double() - before[name].double() for name in changed_weights(family)}
    plain = plain_file(base, family, deltas, f"plain_of_{kind}_{family}.safetensors")
    texts = []
    for prefix, first in (("conv_ours", file), ("conv_core", plain)):
        graph = ConversionGraph(server, family)
        merged = graph.of((first, 1.0), (other, 0.8), mode="ssr", dtype="float32")
        report = graph.add("PreviewAny", source=merged.out(4))
        graph.dump(merged, prefix)
        texts.append(server.run(graph.prompt).ok().text(report))
    assert "converted to low rank" in texts[0] and "converted" not in texts[1]
    assert compare(base, family) < 5e-4


@pytest.mark.parametrize("kind", ["dora", "oft", "glora"])
def test_kinds_that_depend_on_the_weight_see_the_loras_already_on_the_model(server, base, kind):
    family = "flux"
    first = family_lora(base, family, "kohya", 72, name="conv_first").name
    files = (adapter_file(base, family, kind), 1.0), (other_file(base, family), 0.8)
    ours, core = ConversionGraph(server, family), ConversionGraph(server, family)
    merged = ours.of(*files, mode="sum", model=ours.chain((first, 0.9)))
    run_both(server, ours, merged, core, core.chain((first, 0.9), *files))
    before = base_weights(base, family)
    assert max(change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), before).values()) < 1e-5


def test_two_doras_add_up_each_relative_to_the_model(server, base):
    """A chain would apply the second on top of the first; a merge has no order."""
    family, before, changes = "flux", base_weights(base, "flux"), []
    files = [(adapter_file(base, family, "dora", seed), strength) for seed, strength in ((1, 1.0), (2, 0.6))]
    for file in files:
        core = ConversionGraph(server, family)
        core.dump(core.chain(file), "conv_core")
        server.run(core.prompt).ok()
        seen = dumped(base, "conv_core")
        changes.append({name: seen[name].double() - before[name].double() for name in before})
    ours = ConversionGraph(server, family)
    ours.dump(ours.of(*files, mode="sum"), "conv_ours")
    server.run(ours.prompt).ok()
    expected = {name: before[name].double() + changes[0][name] + changes[1][name] for name in before}
    assert max(change_errors(dumped(base, "conv_ours"), expected, before).values()) < 1e-5


@pytest.mark.parametrize(
    ("first", "second"),
    [("difference", "dora"), ("dora", "difference"), ("difference", "difference"), ("loha", "oft")],
)
def test_what_is_cut_off_several_loras_adds_up(server, base, first, second):
    """Each rest is the one that belongs to the model's own weight, whatever the other LoRA leaves over there."""
    files = (adapter_file(base, "flux", first), 1.0), (adapter_file(base, "flux", second, 2), 1.0)
    short = ConversionGraph(server, "flux", convert_rank=4, residual="pass_through")
    whole = ConversionGraph(server, "flux")
    run_both(server, short, short.of(*files, mode="sum"), whole, whole.of(*files, mode="sum"))
    assert compare(base, "flux") < 1e-5
