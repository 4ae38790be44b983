"""What the browser is told while a node runs, and what it may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...ssr_core import FileError

PROGRESS_EVENT = "ssr_merge.progress"


def announce(event: str, data: Mapping[str, object]) -> None:
    """Tell the browser that queued this run something about the node that is running, if there is one."""
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is None or context is None or server.client_id is None:
        return
    shown = get_progress_state().dynprompt.get_display_node_id(context.node_id)
    server.send_sync(event, {"node": shown, "prompt_id": context.prompt_id, **data}, server.client_id)


def answer(path: str, ask: Callable[[str], Mapping[str, Any]]) -> None:
    """Answer GET `path`?name=... with the JSON of `ask(name)`; a `FileError` becomes a 404 with its text."""
    server = getattr(PromptServer, "instance", None)
    if server is None:  # the nodes are used without ComfyUI's server
        return

    @server.routes.get(path)
    async def reply(request: web.Request) -> web.Response:
        try:
            # A file on a slow disk must not hold up the server.
            return web.json_response(await asyncio.to_thread(ask, request.rel_url.query.get("name", "")))
        except FileError as err:
            return web.json_response({"error": str(err)}, status=404)
