"""A headless Chromium over its own protocol, for tests that look at the page as a person does.

Knows DevTools messages (chromedevtools.github.io/devtools-protocol); nothing of what is on the page.

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:8000/", width=390, height=844)
        page.type("hello"); page.press("Enter"); page.wait("document.querySelector('.prose')")
        assert page.problems == []
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


def find() -> str:
    """The browser's path; a test that needs one is skipped without it, except in CI, where that is an error."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    message = f"no headless Chromium ({', '.join(NAMES)}): apt-get install {NAMES[0]}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


class Page:
    """One tab.

    Attributes:
        problems: console errors, uncaught exceptions and violations of the security policy, as text.
        requests: addresses of everything that was asked for.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, f"{expression}: {got['exceptionDetails']}"
        return got["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until the expression is true of the page."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            seen = self.run("document.body.innerText") if time.monotonic() > deadline else None
            assert seen is None, f"not within {seconds} s: {expression}\n{seen}"
            time.sleep(0.03)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        both = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **both)
        self.call("Input.dispatchKeyEvent", type="keyUp", **both)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        found = json.dumps(selector)
        box = self.run(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({found}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def resize(self, width: int, height: int, *, scheme: str = "light", scale: float = 1) -> None:
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """What is to be seen, as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def heard(self, method: str, said: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(f"uncaught: {json.dumps(said['exceptionDetails'])[:500]}")
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(f"console.{said['type']}: {json.dumps(said['args'])[:500]}")
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{said['entry']['source']}: {said['entry']['text']} {said['entry'].get('url', '')}")
        elif method == "Audits.issueAdded":
            self.problems.append(f"issue: {json.dumps(said['issue'])[:500]}")

    def foreign(self) -> list[str]:
        """Requests that went anywhere but to the page's own server."""
        own = urlsplit(self.run("location.href")).netloc
        return [url for url in self.requests if urlsplit(url).netloc != own]


class Browser:
    """A fresh Chromium without a profile; ends with the `with` block."""

    def __enter__(self) -> Browser:
        from websockets.sync.client import connect

        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # No sandbox: CI runs as root in a container, where Chromium has none; it opens nothing but our own page.
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-port=0"
        self._process = subprocess.Popen(
            [find(), *flags.split(), f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"listening on (ws://\S+)", line):
                break
        else:
            raise AssertionError("Chromium ended before it listened")
        self._socket = connect(found[1], max_size=None, compression=None, proxy=None)
        self._count = 0
        self._pages: dict[str, Page] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._profile.cleanup()

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message if session is None else {**message, "sessionId": session}))
        while True:
            said = json.loads(self._socket.recv(timeout=30))
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said['error']}"
                result: dict[str, Any] = said["result"]
                return result
            page = self._pages.get(said.get("sessionId", ""))
            if page is not None:
                page.heard(said["method"], said["params"])

    def open(self, url: str, *, width: int = 1280, height: int = 800, scheme: str = "light", scale: float = 1) -> Page:
        """A new tab with this address, loaded; storage is not shared with other tabs."""
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            page.call(f"{domain}.enable")
        page.resize(width, height, scheme=scheme, scale=scale)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && document.querySelector('#model')?.textContent !== ''", 20)
        return page
