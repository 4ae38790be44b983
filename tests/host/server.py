"""A real ComfyUI server as a subprocess, driven over HTTP and its websocket like a browser would."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What became of one prompt.

    Attributes:
        status: "rejected" means that validation refused it before anything ran.
        executed: Ids of the nodes that ran, in order.
        cached: Ids of the nodes whose earlier outputs were reused.
        outputs: UI outputs by node id, as in the server's history.
        error: Message of the error, with every node error of a rejected prompt.
        error_node: Id of the node that raised.
    """

    status: Literal["success", "error", "interrupted", "rejected"]
    executed: tuple[str, ...] = ()
    cached: frozenset[str] = frozenset()
    outputs: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    error_node: str | None = None

    def ok(self) -> Result:
        assert self.status == "success", f"{self.status} at node {self.error_node}: {self.error}"
        return self

    def text(self, node: object) -> str:
        """What an output node showed as text."""
        return "\n".join(str(part) for part in self.outputs[str(node)]["text"])


class Server:
    """Context manager around `main.py --cpu` on a free port.

    Args:
        checkout: The ComfyUI checkout; nothing is written into it.
        base: Base directory with models, custom_nodes, input, output and user folders.
        options: Further command line options.
    """

    def __init__(self, checkout: Path, base: Path, options: tuple[str, ...] = ()) -> None:
        self.checkout, self.base, self.options = checkout, base, options
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client_id = uuid.uuid4().hex
        self.log_path = base / "server.log"
        self._events: list[Event] = []
        self._schemas: dict[str, Any] | None = None
        self._news = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self._log = self.log_path.open("ab")
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", *self.options]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        env.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
        self._process = subprocess.Popen(
            command, cwd=self.checkout, env=env, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def run(self, prompt: Mapping[str, Any], timeout: float = 300) -> Result:
        """Queue a prompt and wait for its end."""
        accepted = self.submit(prompt)
        return accepted if isinstance(accepted, Result) else self.wait(accepted, timeout)

    def submit(self, prompt: Mapping[str, Any]) -> str | Result:
        """Queue a prompt; its id, or the rejection."""
        status, answer = self._request("/prompt", {"prompt": prompt, "client_id": self.client_id})
        if status == 200:
            return str(answer["prompt_id"])
        return Result("rejected", error=_rejection(answer))

    def wait(self, prompt_id: str, timeout: float = 300) -> Result:
        """Wait for the end of a queued prompt."""
        ends = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
        kind, last = self.wait_event(prompt_id, lambda kind, _: kind in ends, timeout)
        deadline = time.monotonic() + 30
        while prompt_id not in (history := self._request(f"/history/{prompt_id}")[1]):
            assert time.monotonic() < deadline, "the server never put the prompt into its history"
            time.sleep(0.02)
        mine = [event for event in self._snapshot() if event[1].get("prompt_id") == prompt_id]
        ran = [data["node"] for name, data in mine if name == "executing" and data["node"] is not None]
        cached = [node for name, data in mine if name == "execution_cached" for node in data["nodes"]]
        return Result(
            ends[kind],  # type: ignore[arg-type]
            tuple(dict.fromkeys(ran)),
            frozenset(cached),
            history[prompt_id]["outputs"],
            str(last.get("exception_message", "")),
            last.get("node_id"),
        )

    def wait_event(self, prompt_id: str, wanted: Callable[[str, dict[str, Any]], bool], timeout: float = 60) -> Event:
        """First event of a prompt that satisfies a predicate, past or future."""
        deadline, seen = time.monotonic() + timeout, 0
        with self._news:
            while True:
                for kind, data in self._events[seen:]:
                    if data.get("prompt_id") == prompt_id and wanted(kind, data):
                        return kind, data
                seen = len(self._events)
                alive = self._process is not None and self._process.poll() is None
                if not alive or time.monotonic() > deadline:
                    raise TimeoutError(f"no such event; server {'alive' if alive else 'dead'}\n{self.log()[-3000:]}")
                self._news.wait(0.5)

    def interrupt(self) -> None:
        """What the Cancel button does."""
        self._request("/interrupt", {})

    def schemas(self, refresh: bool = False) -> dict[str, Any]:
        """Schemas of all loaded nodes, with the file lists of the last refresh."""
        if refresh or self._schemas is None:
            self._schemas = self._request("/object_info")[1]
        return self._schemas

    def log(self, start: int = 0) -> str:
        """The server's console from a position on; `len(server.log())` is a mark."""
        return self.log_path.read_text(errors="replace")[start:]

    def _snapshot(self) -> list[Event]:
        with self._news:
            return list(self._events)

    def _request(self, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, raw = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, raw = error.code, error.read()
        try:
            return status, json.loads(raw) if raw else None
        except ValueError:
            return status, {"error": raw.decode(errors="replace")}

    def _wait_until_ready(self, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while True:
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log()[-4000:]}")
            try:
                if self._request("/system_stats")[0] == 200:
                    break
            except OSError:
                time.sleep(0.3)
        connected = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._listen(connected)), daemon=True).start()
        assert connected.wait(30), "the websocket did not open"

    async def _listen(self, connected: threading.Event) -> None:
        import aiohttp  # part of ComfyUI's own requirements

        address = f"{self.url}/ws?clientId={self.client_id}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0, heartbeat=None) as socket_,
        ):
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    connected.set()
                    with self._news:
                        self._events.append((event["type"], event.get("data") or {}))
                        self._news.notify_all()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rejection(answer: Any) -> str:
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return str(answer)
    parts = [answer["error"]["message"], answer["error"].get("details", "")]
    for node in (answer.get("node_errors") or {}).values():
        parts += [f"{error['message']}: {error['details']}" for error in node["errors"]]
    return "\n".join(parts)
