"""Who may import whom, and what importing the engine must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = sorted((ROOT / "ssr_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
ALLOWED = {"torch", "safetensors", "numpy"}
HOST = {"comfy", "folder_paths", "latent_preview", "server", "execution", "nodes", "comfy_execution", "comfy_extras"}


def absolute_imports(path):
    """Top-level names of all absolute imports, at any depth of the file (TYPE_CHECKING included)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            argument = node.args[0] if node.args else None
            found.add(str(argument.value).split(".")[0] if isinstance(argument, ast.Constant) else "<dynamic>")
    return found


def relative_imports(path):
    """(level, module) of all relative imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return {(n.level, n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_imports_only_torch_safetensors_numpy_and_itself(path):
    allowed = ALLOWED | ({"PIL"} if path.parent.name == "plots" else set())
    strangers = {n for n in absolute_imports(path) if n not in allowed and n not in sys.stdlib_module_names}
    assert not strangers
    depth = len(path.relative_to(ROOT / "ssr_core").parts)
    assert all(level <= depth for level, _ in relative_imports(path)), "reaches above ssr_core"


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_prints_nothing(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_only_one_folder_of_the_nodes_talks_to_the_host():
    importers = {path.parent.name for path in NODES if absolute_imports(path) & HOST}
    assert importers == {"host"}


def test_the_engine_knows_nothing_of_the_nodes():
    for path in ENGINE:
        assert not {name for _, name in relative_imports(path) if name.split(".")[0] in ("nodes", "demo", "tests")}


def test_the_walk_finds_forbidden_imports(tmp_path):
    """The test of the test: every spelling of an import is seen."""
    path = tmp_path / "x.py"
    path.write_text(
        "import comfy.utils as u\nfrom folder_paths import x\ndef f():\n    import server\n"
        "    __import__('latent_preview')\nfrom .nodes import y\nif 0:\n    from comfy_api.latest import io\n"
    )
    assert absolute_imports(path) == {"comfy", "folder_paths", "server", "latent_preview", "comfy_api"}
    assert relative_imports(path) == {(1, "nodes")}


STATE = """
import logging, os, random, sys, threading, warnings
import numpy, safetensors.torch, torch
sys.path.append({root!r})
def state():
    root = logging.getLogger()
    return (
        list(root.handlers), root.level, logging.getLoggerClass(), list(warnings.filters), sorted(os.environ.items()),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
        torch.get_rng_state().tolist(), random.getstate(), threading.active_count(), sys.excepthook,
        torch.backends.cuda.matmul.allow_tf32, os.getcwd(), torch.nn.Linear.forward, torch.nn.Module.__call__,
    )
before = state()
import ssr_core
assert state() == before
loggers = logging.root.manager.loggerDict.items()
assert not [name for name, one in loggers if name.startswith("ssr") and getattr(one, "handlers", None)]
assert not [n for n in sys.modules if n.split(".")[0] in ("comfy", "folder_paths", "nodes", "demo", "PIL")]
"""


def test_importing_the_engine_changes_nothing_and_says_nothing():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", STATE.format(root=str(ROOT))], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_public_names_exist_and_are_sorted():
    import ssr_core

    assert all(hasattr(ssr_core, name) for name in ssr_core.__all__)
    assert len(set(ssr_core.__all__)) == len(ssr_core.__all__)
