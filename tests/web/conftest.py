"""A server with the pack, a browser page on it in either renderer, and where pictures go."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACK = HERE.parents[1]
CHECKOUT = Path(os.environ.get("COMFYUI_PATH") or os.devnull)
sys.path.append(str(HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))  # the host's dependencies warn


@pytest.fixture(scope="session")
def chromium():
    """Playwright's browser; skips where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: no browser was started"
    )
    from browser import ARGUMENTS, EXECUTABLE

    if not Path(EXECUTABLE).exists():
        pytest.skip(f"{EXECUTABLE} does not exist: no browser was started")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Folder for pictures: $SSR_SHOTS, else a temporary one."""
    folder = os.environ.get("SSR_SHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("shots")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("comfyui")
    from worlds import furnish

    furnish(root)
    return root


@pytest.fixture(scope="session")
def server(base):
    """ComfyUI with previews on, tiny models, and three LoRAs for the tiny SDXL."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set to a ComfyUI checkout: the real frontend was not opened")
    assert (CHECKOUT / "comfy" / "model_patcher.py").is_file(), f"COMFYUI_PATH={CHECKOUT} is no ComfyUI checkout"
    import torch

    torch.set_num_threads(1)
    from worlds import write_loras

    from tests.host.server import Server

    with Server(CHECKOUT.resolve(), base, ("--preview-method", "latent2rgb")) as running:
        write_loras(base)
        yield running


@pytest.fixture(scope="module", params=["classic", "vue"])
def desk(request, chromium, server):
    """A page of the frontend in one renderer."""
    from desk import Desk

    with Desk(chromium, server, request.param) as opened:
        yield opened
