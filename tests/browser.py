"""A headless Chromium for tests of pages: opens one at a size and in a colour scheme, measures, takes pictures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 40.0


@dataclass
class Seen:
    """One look at a page."""

    values: list[Any]
    """What the asked expressions are."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, but the page's own and data: ones."""
    complaints: list[str] = field(default_factory=list)
    """What the browser complained of: refused by the policy, errors of scripts."""


def look(
    page: Path, expressions: Sequence[str], *, width: int = 1280, dark: bool = False, picture: Path | None = None,
    script: bool = True,
) -> Seen:  # fmt: skip
    """Open `page` in a window `width` wide, evaluate `expressions`, maybe take a picture of all of it."""
    return asyncio.run(asyncio.wait_for(_look(page, expressions, width, dark, picture, script), _SECONDS))


async def _look(
    page: Path, expressions: Sequence[str], width: int, dark: bool, picture: Path | None, script: bool
) -> Seen:
    async with _tab() as tab:
        seen = tab.seen
        for domain in ("Page", "Network", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        phone = width < 600
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        await tab.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await tab.call("Emulation.setEmulatedMedia", features=[scheme])
        await tab.call("Emulation.setScriptExecutionDisabled", value=not script)
        tab.own = page.resolve().as_uri()
        await tab.call("Page.navigate", url=tab.own)
        await tab.loaded.wait()
        for expression in expressions:
            told = await tab.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
            seen.values.append(told["result"].get("value"))
        if picture is not None:
            size = (await tab.call("Page.getLayoutMetrics"))["cssContentSize"]
            whole = {"x": 0, "y": 0, "width": width, "height": min(size["height"], 16000), "scale": 1}
            shot = await tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=whole)
            picture.write_bytes(base64.b64decode(shot["data"]))
        return seen


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._last, self.own = socket, 0, ""
        self.seen, self.loaded = Seen([]), asyncio.Event()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def call(self, method: str, **values: Any) -> dict[str, Any]:
        self._last += 1
        answer = self._waiting[self._last] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._last, "method": method, "params": values})
        told = await answer
        assert "error" not in told, told
        return dict(told["result"])

    async def listen(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
                continue
            event, values = told["method"], told["params"]
            if event == "Page.loadEventFired":
                self.loaded.set()
            elif event == "Network.requestWillBeSent":
                url = values["request"]["url"]
                if url != self.own and not url.startswith("data:"):
                    self.seen.requests.append(url)
            elif event == "Log.entryAdded":
                self.seen.complaints.append(values["entry"]["text"])
            elif event == "Runtime.exceptionThrown":
                self.seen.complaints.append(str(values["exceptionDetails"]))


@contextlib.asynccontextmanager
async def _tab() -> AsyncIterator[_Tab]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        switches = ["headless=new", "no-sandbox", "disable-gpu", "remote-debugging-port=0", "hide-scrollbars"]
        switches += ["disable-dev-shm-usage", "no-first-run", f"user-data-dir={profile}"]
        options = [*(f"--{switch}" for switch in switches), "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        browser = subprocess.Popen([CHROMIUM, *options], start_new_session=True, **quiet)  # type: ignore[call-overload]
        try:
            port_file = Path(profile, "DevToolsActivePort")
            while not (port_file.is_file() and "\n" in port_file.read_text()):
                assert browser.poll() is None, "the browser ended"
                await asyncio.sleep(0.05)
            port = port_file.read_text().partition("\n")[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    target = next(one for one in await answer.json() if one["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = _Tab(socket)
                    listening = asyncio.create_task(tab.listen())
                    yield tab
                    listening.cancel()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
