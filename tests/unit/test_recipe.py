"""Recipes: what the metadata of every method says is read back as the same merge; wrong ones are named key by key."""

import ast
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import calibrated, conflicting_tasks, linear64, task_tokens

from ssr_core import (
    METHODS,
    PASS_DEFAULTS,
    SCHEMA,
    CompressOptions,
    FileError,
    NPLoRAMerge,
    SSRMerge,
    SumMerge,
    merge_metadata,
    parse_recipe,
    read_recipe,
    with_recipe,
    write_safetensors,
)
from ssr_core.osrm_recipe import OSRM_SCHEMA
from ssr_core.schema import problems

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"sources": [{"name": "a.safetensors"}]}


def tasks_and_calibration():
    tasks = conflicting_tasks(3, 8, 10, 2)
    x = [task_tokens(k, 30, 10) for k in range(3)]
    return tasks, calibrated(linear64(10, 8), tasks, [[one] for one in x])


@pytest.mark.parametrize(
    "method",
    [kind() for kind in METHODS.values()]
    + [SSRMerge(0.3, "gains", False), NPLoRAMerge(mu=2.0, protected=(0, 1), directions="activations")],
    ids=lambda method: f"{method.name}-{hash(method) % 1000}",
)
def test_metadata_reads_back_as_the_same_merge(method, tmp_path):
    tasks, calibration = tasks_and_calibration()
    compress = CompressOptions("share", 0.5, 0.01)
    made = merge_metadata(tasks, method, calibration, {"dtype": "float16", "compress": asdict(compress)})
    made = with_recipe(made, {"key_style": "kohya", "model": {"checkpoint": "base.safetensors"}})
    path = tmp_path / "merged.safetensors"
    write_safetensors(path, {"x": task_tokens(0, 1, 1)}, made)
    recipe = read_recipe(path)
    assert recipe.method == method and recipe.compress == compress
    assert (recipe.dtype, recipe.key_style, recipe.model) == ("float16", "kohya", {"checkpoint": "base.safetensors"})
    for source, task in zip(recipe.sources, tasks, strict=True):
        assert (source.name, source.sha256, source.prompts) == (task.name, task.adapter.fingerprint, task.prompts)
        assert (source.strength_model, source.strength_clip) == (task.strength_model, task.strength_clip)
        assert source.calibrated_at == (1.0, 1.0)
    assert recipe.settings == {"sampled_tokens": 0, **calibration.settings} and recipe.remarks == ()


def test_strengths_of_calibration_follow_the_lora_and_not_its_place():
    """A subset, in another order, at other strengths: what was calibrated is found by content."""
    tasks, calibration = tasks_and_calibration()
    records = [replace(record, strength_model=0.1 * (k + 1)) for k, record in enumerate(calibration.tasks)]
    calibration = replace(calibration, tasks=tuple(records))
    chosen = [replace(tasks[2], strength_model=5.0), tasks[0]]
    recipe = parse_recipe(json.loads(merge_metadata(chosen, SSRMerge(), calibration)["ssr_merge"]), "x", recorded=True)
    assert [source.calibrated_at[0] for source in recipe.sources] == pytest.approx([0.3, 0.1])
    assert [source.strength_model for source in recipe.sources] == [5.0, 1.0]


def test_files_of_the_first_release_are_read():
    """Without model, compress, calibrated_at; the key style in a place of its own."""
    settings = {"seed": 1, "steps": 1, "width": 64, "height": 64, "frames": 1, "scheduler": "simple"}
    settings |= {
        "padding": "balance",
        "custom_latent": False,
        "custom_sigmas": False,
        "sigmas": [1.0],
        "latent": [1, 4, 8, 8],
    }
    source = {
        "name": "a",
        "sha256": "0",
        "strength_model": 1.0,
        "strength_clip": 0.5,
        "prompts": ["p"],
        "convert": None,
    }
    old = {
        "version": "0.1.0",
        "method": "ssr",
        "parameters": {"ridge": 0.01, "anchor": "sum", "balance": True},
        "sources": [source],
        "calibration": {"model": "m", "settings": settings, "strengths": [[0.9, 0.4]]},
        "dtype": "auto",
        "calibrated_on_this_model": True,
    }
    recipe = parse_recipe(old, "old", recorded=True)
    assert recipe.sources[0].calibrated_at == (0.9, 0.4) and recipe.sources[0].convert.max_rank == 0
    assert (
        recipe.method == SSRMerge()
        and recipe.settings == {"sampled_tokens": 0, **settings}
        and recipe.model == {}
        and recipe.remarks == ()
    )


def test_what_a_later_version_wrote_is_said_and_left_out():
    later = {**SMALLEST, "calibration": {"settings": {"seed": 0, "moonlight": 3}}}
    assert "moonlight" in parse_recipe(later, "x", recorded=True).remarks[0]
    with pytest.raises(FileError, match="moonlight is no known key"):
        parse_recipe(later, "x")


def test_options_of_a_later_version_are_said_and_left_out():
    later = {
        "sources": [{"name": "a", "convert": {"max_rank": 4, "moonlight": 1}}],
        "compress": {"limit": "rank", "value": 8, "starlight": 2},
    }
    found = parse_recipe(later, "x", recorded=True)
    assert found.compress == CompressOptions("rank", 8) and found.sources[0].convert.max_rank == 4
    assert all(word in " ".join(found.remarks) for word in ("moonlight", "starlight"))
    with pytest.raises(FileError, match=r"moonlight.*starlight"):
        parse_recipe(later, "x")


HUGE = int("9" * 400)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration": {"strengths": [3]}}, r"calibration.strengths\[0\] is 3, not a list"),
        ({"calibration": {"strengths": [[1.0]]}}, r"strengths\[0\] has 1 entries"),
        ({"calibration": {"strengths": [["x", 1]]}}, r"strengths\[0\]\[0\] is 'x'"),
        ({"sources": [{"name": "a", "strength_model": HUGE}]}, "strength_model is not finite"),
        ({"sources": [{"name": "a", "calibrated_at": [HUGE, 1]}]}, r"calibrated_at\[0\] is not finite"),
        ({"calibration": {"settings": {"seed": -HUGE}}}, "seed is not finite"),
        ({"compress": {"limit": "rank", "value": HUGE}}, "compress.value is not finite"),
        ({"parameters": {"ridge": HUGE}}, "parameters.ridge is not finite"),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_values_of_any_kind_are_refused_by_name(change, words, recorded):
    with pytest.raises(FileError, match=words):
        parse_recipe({**SMALLEST, **change}, "x", recorded=recorded)


def test_bottomless_json_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text("[" * 200_000)
    with pytest.raises(FileError, match="no JSON"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": []}, "sources has 0 entries"),
        ({"sorces": []}, "sorces is no known key .did you mean sources"),
        ({"sources": [{"strength_model": 1}]}, r"sources\[0\].name is missing"),
        ({"sources": [{"name": "a", "strength_model": "x"}]}, r"sources\[0\].strength_model is 'x', not a number"),
        ({"sources": [{"name": "a", "prompts": "x"}]}, "prompts is 'x', not a list"),
        ({"sources": [{"name": "a", "strength_model": True}]}, "strength_model is True, not a number"),
        ({"method": "magic"}, "method is 'magic', not one of ssr"),
        ({"parameters": {"rigde": 1}}, "parameters.rigde is no parameter of ssr, which takes ridge"),
        ({"method": "sum", "parameters": {"ridge": 1}}, "of sum, which takes none"),
        ({"method": "np_lora", "parameters": {"mu": -1}}, "mu is -1"),
        ({"calibration": {"settings": {"steps": 0}}}, "calibration.settings.steps is 0, the least is 1"),
        ({"calibration": {"settings": {"sigmas": [1, 0]}}}, r"sigmas\[1\] is 0, it has to be more than 0"),
        ({"compress": {"limit": "share"}}, "compress.value is missing"),
        ({"compress": {"limit": "share", "value": 2}}, "share is 2"),
        ({"model": {"unet": "a", "checkpoint": "b"}}, "model has checkpoint and unet source"),
        ({"model": {"graph": {}}}, "model.model has to be the link"),
        ({"key_style": "x"}, "key_style is 'x'"),
    ],
)
def test_wrong_keys_are_named_with_a_remedy(change, words):
    with pytest.raises(FileError, match=words) as found:
        parse_recipe({**SMALLEST, **change}, "mine.json")
    assert "mine.json" in str(found.value) and "recipe.schema.json" in str(found.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(FileError) as found:
        parse_recipe({"sources": [{"name": 1}], "dtype": "int8", "x": 0}, "r")
    assert all(word in str(found.value) for word in ("sources[0].name", "dtype", "x is no known key"))


@pytest.mark.parametrize(("text", "words"), [("{", "no JSON"), ("[]", "the recipe is"), ("{}", "sources is missing")])
def test_files_that_are_no_recipes(tmp_path, text, words):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(FileError, match=words):
        read_recipe(path)
    with pytest.raises(FileError, match="cannot read the recipe"):
        read_recipe(tmp_path / "absent.json")
    other = tmp_path / "plain.safetensors"
    write_safetensors(other, {"x": task_tokens(0, 1, 1)}, {})
    with pytest.raises(FileError, match="says nothing of a merge"):
        read_recipe(other)


def test_what_no_file_holds_is_refused():
    with pytest.raises(FileError, match="CONDITIONING"):
        parse_recipe({"sources": [{"name": "a", "prompts": ["", "conditioning:0123"]}]}, "x", recorded=True)
    settings = {"custom_latent": True, "latent": [1, 4, 8, 8]}
    with pytest.raises(FileError, match="LATENT with content"):
        parse_recipe({**SMALLEST, "calibration": {"settings": settings}}, "x", recorded=True)
    assert parse_recipe({**SMALLEST, "calibration": {"settings": settings | {"latent_fill": 0.0}}}, "x", recorded=True)


def test_methods_without_calibration_run_no_pass():
    assert parse_recipe({**SMALLEST, "method": "sum"}, "x").settings is None
    assert parse_recipe({**SMALLEST, "method": "sum"}, "x").method == SumMerge()
    assert parse_recipe(SMALLEST, "x").settings == {}


def test_the_published_schemas_are_those_in_force():
    for name, schema in {"recipe": SCHEMA, **OSRM_SCHEMA}.items():
        text = (ROOT / "docs" / f"{name}.schema.json").read_text(encoding="utf-8")
        assert json.loads(text) == schema, name


def test_the_validator_agrees_with_a_full_one():
    """Every keyword that the schema uses, against the reference implementation."""
    jsonschema = pytest.importorskip("jsonschema")
    good = {**SMALLEST, "dtype": "auto", "compress": None, "model": {"checkpoint": "x"}}
    bad = [
        {},
        {**good, "dtype": 1},
        {**good, "x": 1},
        {"sources": []},
        {**good, "compress": {"limit": "rank", "value": 0}},
    ]
    for value in (good, *bad):
        assert bool(problems(value, SCHEMA)) == (not jsonschema.Draft202012Validator(SCHEMA).is_valid(value))


def test_the_commands_example_is_right():
    import importlib.util

    spec = importlib.util.spec_from_file_location("headless_cli", ROOT / "headless" / "cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    example = parse_recipe(module.EXAMPLE, "example")
    assert example.compress is None and len(example.sources) == 2  # a first merge loses nothing
    settings = module.EXAMPLE["calibration"]["settings"]
    assert settings == {name: PASS_DEFAULTS[name] for name in settings}


def test_nodes_and_recipes_have_the_same_defaults():
    """The nodes' source, for its import needs ComfyUI: an input's default is the shared one, by name or by value."""
    found = {}
    for call in ast.walk(ast.parse((ROOT / "nodes" / "inputs.py").read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
            default = next((word.value for word in call.keywords if word.arg == "default"), None)
            if default is not None and call.args[0].value in PASS_DEFAULTS:
                found[call.args[0].value] = eval(ast.unparse(default), {"PASS_DEFAULTS": PASS_DEFAULTS})
    assert found == PASS_DEFAULTS
    work = (ROOT / "headless" / "calibrating.py").read_text(encoding="utf-8")
    assert "**PASS_DEFAULTS" in work and "DEFAULTS:" not in work


@pytest.mark.parametrize(
    ("method", "parameters", "wrong"),
    [
        ("ssr", {"joint_weight": "8"}, "parameters.joint_weight is '8', not a number"),
        ("ssr", {"joint_weight": True}, "parameters.joint_weight is True, not a number"),
        ("ssr", {"anchor": "middle"}, "parameters.anchor is 'middle', not one of sum, average, gains, zero"),
        ("ssr", {"balance": 1}, "parameters.balance is 1, not"),
        ("np_lora", {"protected": [0.5]}, "parameters.protected[0] is 0.5, not"),
    ],
)
def test_parameters_of_another_kind_are_refused_by_name(method, parameters, wrong):
    with pytest.raises(FileError) as found:
        parse_recipe({**SMALLEST, "method": method, "parameters": parameters}, "mine.json")
    assert wrong in str(found.value)


def test_whole_numbers_will_do_where_others_are_wanted():
    assert parse_recipe({**SMALLEST, "parameters": {"joint_weight": 8}}, "m").method == SSRMerge(joint_weight=8)
