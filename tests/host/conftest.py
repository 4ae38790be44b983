"""Where ComfyUI is, a temporary base directory, one server for the whole session.

These tests run in ComfyUI's own Python with COMFYUI_PATH set to a checkout; without one a single
test says so and skips. ComfyUI is never imported here: it runs as a subprocess in which the pack is
a folder in custom_nodes, exactly as a user has it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .server import Server

HERE = Path(__file__).parent
PACK = HERE.parent.parent
torch.set_num_threads(1)  # as in the server: tensors are tiny
CHECKOUT = Path(os.environ.get("COMFYUI_PATH") or os.devnull)

if not (CHECKOUT / "comfy" / "model_patcher.py").is_file():
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_checkout.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)
            item.add_marker(pytest.mark.filterwarnings("default"))  # the host's dependencies warn


@pytest.fixture(scope="session")
def checkout() -> Path:
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set to a ComfyUI checkout: nothing in tests/host can run")
    assert (CHECKOUT / "comfy" / "model_patcher.py").is_file(), f"COMFYUI_PATH={CHECKOUT} is no ComfyUI checkout"
    return CHECKOUT.resolve()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory such as a user has, with the pack and the test nodes installed."""
    root = tmp_path_factory.mktemp("comfyui")
    for folder in ("models/diffusion_models", "models/loras", "custom_nodes", "input", "output", "user", "temp"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(HERE / "tiny", root / "custom_nodes" / "tiny", ignore=shutil.ignore_patterns("__pycache__"))
    if (PACK / "__init__.py").is_file():
        (root / "custom_nodes" / "ssr-merge").symlink_to(PACK, target_is_directory=True)
    return root


@pytest.fixture(scope="session")
def server(checkout: Path, base: Path) -> Iterator[Server]:
    with Server(checkout, base) as running:
        yield running
