"""A server with the pack, a browser page on it in either renderer, and where pictures go."""

from __future__ import annotations

import functools
import http.server
import os
import sys
import threading
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACK = HERE.parents[1]
CHECKOUT = Path(os.environ.get("COMFYUI_PATH") or os.devnull)
NASTY = "<img src=x onerror=window.broken=1>"
"""A name that tries to be markup."""
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


@pytest.fixture(scope="session")
def site():
    """The pack's files on a plain web server."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(PACK)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.fixture
def page(chromium, site):
    """A bare page there, for the modules of the panel without ComfyUI."""
    opened = chromium.new_page(viewport={"width": 600, "height": 500})
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(site + "/tests/web/alone.html")
    yield opened
    assert errors == []
    assert opened.evaluate("() => window.broken") is None, "a name became markup"
    opened.close()
