"""A headless Chromium on the real ComfyUI frontend."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

EXECUTABLE = "/usr/bin/chromium"
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
    "huggingface.co",
)


def write_settings(url: str, settings: Mapping[str, Any]) -> None:
    """Settings of the frontend, before it opens; its tutorial counts as seen."""
    body = json.dumps({"Comfy.TutorialCompleted": True, **settings}).encode()
    request = urllib.request.Request(url + "/api/settings", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).read()


def watch(page: Page) -> None:
    """`page.messages` collects warnings and errors of the console, and uncaught errors."""
    messages: list[str] = []

    def note(message: Any) -> None:
        if message.type in ("warning", "error") and not any(word in message.text for word in HARMLESS):
            messages.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: messages.append(f"uncaught: {error}"))
    page.messages = messages


@contextmanager
def comfy_page(url: str, *, vue: bool = False, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """The frontend, ready to use; `page.messages` collects warnings and errors of the console."""
    write_settings(url, {"Comfy.VueNodes.Enabled": vue})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": height})
        watch(page)
        page.goto(url)
        page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=60_000)
        page.wait_for_timeout(1500)
        yield page
        browser.close()
