"""The command as far as it goes without ComfyUI: help, examples, checks, exit codes, from any folder."""

import collections
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ssr_core import read_safetensors, write_safetensors

PACK = Path(__file__).resolve().parents[2]


def run(*arguments, pack=PACK, cwd=None, **variables):
    env = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "PYTHONPATH")}
    command = [sys.executable, str(pack / "headless"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env | variables, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    code, out, _ = run("--example")
    assert code == 0
    path = tmp_path_factory.mktemp("recipes") / "recipe.json"
    path.write_text(out)
    return path


def test_help_names_every_option_and_exit_code():
    code, out, _ = run("--help")
    assert code == 0
    options = (
        "--comfyui",
        "--output",
        "--overwrite",
        "--save-calibration",
        "--again",
        "--trust-graph",
        "--check",
        "--example",
        "--quiet",
    )
    for word in (
        *options,
        "--checkpoint",
        "--unet",
        "--clip",
        "--clip-type",
        "torchrun",
        "130",
        "143",
        "recipe.schema.json",
    ):
        assert word in out, word


def test_the_example_is_right_from_any_folder_and_by_any_name_of_the_pack(recipe, tmp_path):
    """Folders called nodes or ssr_core where the command is started do not get in its way."""
    for name in ("nodes", "ssr_core", "headless"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    link = tmp_path / "a pack.with odd-name"
    link.symlink_to(PACK, target_is_directory=True)
    for pack in (PACK, link):
        code, out, err = run(recipe, "--check", pack=pack, cwd=tmp_path)
        assert (code, out) == (0, ""), err
        assert "the recipe is right" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sources": []}, "sources has 0 entries"),
        ({"metod": "ssr"}, "metod is no known key (did you mean method?)"),
        ({"model": {"unet": "a", "checkpoint": "b"}}, "give checkpoint, or unet, or graph"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_loaded(recipe, tmp_path, change, words):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**json.loads(recipe.read_text()), **change}))
    code, out, err = run(path, "--comfyui", tmp_path)
    assert (code, out) == (2, "") and words in err and "What to do" in err
    assert "Traceback" not in err


def test_wrong_arguments(recipe, tmp_path):
    for arguments, words in (
        ((), "a recipe is missing"),
        ((tmp_path / "absent.json",), "cannot read the recipe"),
        ((recipe, "--comfyui", tmp_path), "this is no ComfyUI installation"),
        ((recipe,), "this is no ComfyUI installation"),
        ((recipe, "--again"), "--again takes a merged .safetensors"),
        ((recipe, "--bananas"), "unrecognized arguments: --bananas"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and words in err, (arguments, err)


def test_recipes_of_osrm_are_checked_too(tmp_path):
    path = tmp_path / "osrm.json"
    path.write_text(json.dumps({"model": {"checkpoint": "a"}, "osrm_init": {"prompts": ["a fox"]}}))
    assert run(path, "--check")[0] == 0
    code, _, err = run(path, "--check", "--save-calibration", tmp_path / "kept.safetensors")
    assert code == 2 and "makes no calibration" in err
    path.write_text(json.dumps({"sources": [{"name": "a.safetensors"}], "method": "sum", "calibration": None}))
    code, _, err = run(path, "--check", "--save-calibration", tmp_path / "kept.safetensors")
    assert code == 2 and "makes no calibration" in err
    start = merged_file(tmp_path / "start.safetensors", method="osrm_init", rank=4)
    code, _, err = run(start, "--check")
    assert code == 2 and "OSRM Init wrote it" in err and "a recipe with osrm_init" in err
    path.write_text(json.dumps({"osrm_init": {"prompts": []}}))
    code, _, err = run(path, "--check")
    assert code == 2 and "osrm_init.prompts has 0 entries" in err


def merged_file(path, **changes):
    """A file whose metadata is a recipe."""
    value = {"sources": [{"name": "a.safetensors"}], "calibration": {"settings": {"seed": 0}}, **changes}
    write_safetensors(path, {"x": torch.zeros(1)}, {"ssr_merge": json.dumps(value)})
    return path


def test_the_graph_of_a_merged_file_is_run_only_if_trusted(tmp_path):
    model = {"graph": {"1": {"class_type": "LoadAnything"}}, "model": ["1", 0], "custom_nodes": ["strange"]}
    path = merged_file(tmp_path / "merged.safetensors", model=model)
    code, _, err = run(path, "--check")
    assert code == 2 and "LoadAnything" in err and "strange" in err and "--trust-graph" in err
    for more in (("--trust-graph",), ("--checkpoint", "mine.safetensors")):
        assert run(path, "--check", *more)[0] == 0


def in_package(monkeypatch):
    """The command as headless/__main__.py imports it, in this process."""
    package = types.ModuleType("pack_of_the_command")
    package.__path__ = [str(PACK)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return importlib.import_module(f"{package.__name__}.headless.cli")


@pytest.mark.parametrize(("change", "again", "code"), [(1e-6, True, 0), (1e-2, True, 1), (1e-2, False, 0)])
def test_a_merge_made_again_fails_if_it_is_another(tmp_path, monkeypatch, capsys, change, again, code):
    """ComfyUI's part is replaced by one that writes a given result."""
    cli = in_package(monkeypatch)
    monkeypatch.setattr(cli.signal, "signal", lambda *given: None)
    source, output = tmp_path / "merged.safetensors", tmp_path / "again.safetensors"
    merged_file(source)

    def carry_out(recipe, wanted, ranks):
        write_safetensors(wanted.output, {"x": torch.ones(4) * (1 + change)}, {})
        return [wanted.output], []

    _, metadata = read_safetensors(source)
    write_safetensors(source, {"x": torch.ones(4)}, metadata)
    parent = sys.modules[cli.__name__.rpartition(".")[0]]
    start = types.SimpleNamespace(show_progress=lambda tell: None)
    stub = types.SimpleNamespace(find=lambda given: tmp_path, start=lambda *given: start)
    monkeypatch.setattr(parent, "installation", stub, raising=False)
    kept = collections.namedtuple("Wanted", "output overwrite calibration beside")
    monkeypatch.setattr(parent, "work", types.SimpleNamespace(Wanted=kept, carry_out=carry_out), raising=False)
    arguments = [str(source), "--output", str(output), "--quiet", *(["--again"] if again else [])]
    assert cli.main(arguments) == code
    err = capsys.readouterr().err
    assert float(err.split("difference to merged.safetensors: ")[1].split()[0]) == pytest.approx(change, rel=0.1)
    assert ("it is another merge" in err) == (code == 1)


@pytest.mark.parametrize("error", ["AssertionError('Torch not compiled with CUDA enabled')", "RuntimeError('no GPU')"])
def test_without_a_device_the_message_says_how_to_do_without(recipe, tmp_path, error):
    """An installation of stubs, whose look for a device fails as ComfyUI's does."""
    stubs = {
        "main.py": "",
        "comfy/__init__.py": "",
        "comfy/options.py": "def enable_args_parsing(): pass",
        "comfy/cli_args.py": "import types\n"
        "args = types.SimpleNamespace(extra_model_paths_config=None, output_directory=None)",
        "comfy/model_patcher.py": "",
        "comfy/model_management.py": f"raise {error}",
        "folder_paths.py": "def get_output_directory(): return ''\ndef add_model_folder_path(*given): pass",
        "utils/__init__.py": "",
        "utils/extra_config.py": "load_extra_path_config = None",
    }
    for name, text in stubs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, out, err = run(recipe, "--comfyui", tmp_path)
    assert (code, out) == (1, "") and "Traceback" not in err
    assert "finds no device" in err and error.split("'")[1] in err and "-- --cpu" in err


def test_only_the_command_says_how_a_recipe_names_a_clip(tmp_path, monkeypatch, capsys):
    cli = in_package(monkeypatch)
    monkeypatch.setattr(cli.signal, "signal", lambda *given: None)
    package = cli.__name__.split(".")[0]
    error = importlib.import_module(f"{package}.ssr_core.errors").ClipMissingError("no CLIP.", remedy="connect CLIP.")

    def carry_out(*given):
        raise error

    parent = sys.modules[cli.__name__.rpartition(".")[0]]
    start = types.SimpleNamespace(show_progress=lambda tell: None)
    stub = types.SimpleNamespace(find=lambda given: tmp_path, start=lambda *given: start)
    monkeypatch.setattr(parent, "installation", stub, raising=False)
    work = types.SimpleNamespace(Wanted=lambda *given: None, carry_out=carry_out)
    monkeypatch.setattr(parent, "work", work, raising=False)
    assert cli.main([str(merged_file(tmp_path / "merged.safetensors")), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert "connect CLIP. A recipe names clip and clip_type beside unet" in err and "recipe" not in str(error)


def test_the_output_may_not_be_the_input(tmp_path):
    path = merged_file(tmp_path / "merged.safetensors")
    other = tmp_path / "link.safetensors"
    other.symlink_to(path)
    before = path.read_bytes()
    for output in (path, other):
        code, _, err = run(path, "--again", "--overwrite", "--output", output, "--comfyui", tmp_path)
        assert code == 2 and "would replace what it is made from" in err
    assert path.read_bytes() == before


def module():
    import importlib.util

    spec = importlib.util.spec_from_file_location("headless_cli", PACK / "headless" / "cli.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("local", "visible", "expected"),
    [("1", None, "1"), ("1", "4,6", "6"), ("1", "3", "3"), ("1", "", ""), ("0", "4,6", "4")],
)
def test_every_process_has_its_own_gpu(monkeypatch, local, visible, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    module()._one_gpu_each()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
