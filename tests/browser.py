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
        self._credentials: dict[str, str] = {}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, f"{expression}: {got['exceptionDetails']}"
        return got["result"].get("value")

    def wait(self, expression: str, seconds: float = 50) -> None:
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

    def log_in(self, name: str, password: str) -> None:
        """What the browser's own dialog gets when a server asks; before the first address is opened."""
        self._credentials = {"response": "ProvideCredentials", "username": name, "password": password}
        self.call("Fetch.enable", handleAuthRequests=True)

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
        if method == "Fetch.requestPaused":
            self._browser.send("Fetch.continueRequest", {"requestId": said["requestId"]}, self._session)
        elif method == "Fetch.authRequired":
            answer = {"requestId": said["requestId"], "authChallengeResponse": self._credentials}
            self._browser.send("Fetch.continueWithAuth", answer, self._session)
        elif method == "Network.requestWillBeSent":
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
        # No sandbox: CI runs as root in a container, where Chromium has none; it opens nothing but our own page.
        # It listens on a pipe, not on a port, and so ends with us whatever ends us.
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        own = f"--user-data-dir={self._profile.name}"
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", find(), *flags.split(), own, "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._held = b""
        self._count = 0
        self._pages: dict[str, Page] = {}
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait(60)
        self._process.stdout.close()
        self._profile.cleanup()

    def send(self, method: str, parameters: dict[str, Any], session: str | None = None) -> int:
        """The number that the answer will have."""
        assert self._process.stdin is not None
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._process.stdin.write(
            json.dumps(message if session is None else {**message, "sessionId": session}).encode() + b"\0"
        )
        self._process.stdin.flush()
        return self._count

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = self.send(method, parameters, session)
        while True:
            said = json.loads(self._receive())
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said['error']}"
                result: dict[str, Any] = said["result"]
                return result
            page = self._pages.get(said.get("sessionId", ""))
            if page is not None and "method" in said:
                page.heard(said["method"], said["params"])

    def _receive(self) -> bytes:
        assert self._process.stdout is not None
        while b"\0" not in self._held:
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            assert part, f"Chromium ended ({self._process.poll()})"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return message

    def open(
        self, url: str, *, ready: str = "#model, pre", width: int = 1280, height: int = 800, password: str | None = None
    ) -> Page:
        """A new tab with this address, loaded; storage is not shared with other tabs.

        Args:
            ready: CSS selector of what has text once the page is there.
            password: what the person enters when the server asks.
        """
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        if password is not None:
            page.log_in("anybody", password)
        page.call("Page.navigate", url=url)
        page.wait(f"document.readyState === 'complete' && document.querySelector({json.dumps(ready)})?.textContent")
        return page
