"""A headless Chromium on the real ComfyUI frontend."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Messages that an empty ComfyUI prints on every start, without this pack too.
HARMLESS = (
    "404",
    "ERR_NAME_NOT_RESOLVED",
    "ERR_INTERNET_DISCONNECTED",
    "ComfyApp graph accessed before initialization",
    "MaskEditor",
    "legacy",
    "deprecated",
    "Deprecat",
)


@contextmanager
def comfy_page(url: str, *, vue: bool = False, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """The frontend, ready to use; `page.messages` collects warnings and errors of the console."""
    settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": vue}
    request = urllib.request.Request(
        url + "/api/settings", json.dumps(settings).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).read()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": height})
        messages: list[str] = []
        page.on(
            "console",
            lambda message: (
                messages.append(message.text)
                if message.type in ("warning", "error") and not any(word in message.text for word in HARMLESS)
                else None
            ),
        )
        page.messages = messages
        page.goto(url)
        page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=60_000)
        page.wait_for_timeout(1500)
        yield page
        browser.close()
