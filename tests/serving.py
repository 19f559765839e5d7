"""A live `finial serve` in a process of its own, for tests that talk to it as clients do."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec

from waiting import HUNG_S, until


class Live:
    """A running server: its address, its process, and the lines it wrote to standard error."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None, before: str = "") -> None:
        start = f"from finial.cli import main\nfrom finial.serve import app, server\n{before}\nmain()"
        command = [sys.executable, "-c", start, "serve", *arguments, "--port", "0"]
        clean = {name: value for name, value in os.environ.items() if name != "FINIAL_API_KEY"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**clean, **(environment or {})}
        )
        self.lines: list[str] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                self.url = found[1]
                break
        assert self.url, "".join(self.lines)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(ValueError):  # closed under our hands
            for line in self.process.stderr:
                self.lines.append(line)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, decoded body, headers) of one request: a POST of JSON when there is a body."""
        data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        kind = {} if data is None else {"Content-Type": "application/json"}
        request = Request(self.url + path, data=data, headers={**kind, **(headers or {})})
        try:
            with urlopen(request, timeout=HUNG_S) as reply:
                status, raw, got = reply.status, reply.read(), reply.headers.items()
        except HTTPError as error:
            with error:
                status, raw, got = error.code, error.read(), error.headers.items()
        names: dict[str, str] = {}
        for name, value in got:  # one that stands there twice is joined
            names[name.lower()] = ", ".join(filter(None, (names.get(name.lower()), value)))
        is_json = names.get("content-type", "").startswith("application/json")
        return status, msgspec.json.decode(raw) if is_json else raw.decode(), names

    def ready(self, key: str | None = None) -> Live:
        """Itself, once it answers."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}

        def answers() -> bool:
            assert self.process.poll() is None, "".join(self.lines)
            return self.ask("/ready", headers=headers)[0] == 200

        until(answers, lambda: "".join(self.lines))
        return self

    def metric(self, name: str) -> float:
        """A number of /metrics, by its name and labels as they are written there."""
        text = self.ask("/metrics")[1]
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def eventually(self, name: str, value: float) -> None:
        """Wait for a number of /metrics."""
        until(lambda: self.metric(name) == value, lambda: f"{name} is {self.metric(name)}, not {value}")

    def stop(self) -> int:
        """End it and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(HUNG_S)
        finally:
            self.process.kill()
            self._reader.join(HUNG_S)
            assert self.process.stderr is not None
            self.process.stderr.close()


@contextlib.contextmanager
def live(*arguments: str, environment: dict[str, str] | None = None, before: str = "") -> Iterator[Live]:
    """A server that is ready, ended afterwards; `before` is code that runs first, with `app` and `server` at hand."""
    server = Live(*arguments, environment=environment, before=before)
    try:
        yield server.ready(key=(environment or {}).get("FINIAL_API_KEY"))
    finally:
        server.stop()
