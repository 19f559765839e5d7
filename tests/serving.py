"""A live `finial serve` in a process of its own, for tests that talk to it as clients do."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec


class Live:
    """A running server: its address, its process, and the lines it wrote to standard error."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "finial.cli", "serve", *arguments, "--port", "0"]
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
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 20
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, decoded body, headers) of one request: a POST of JSON when there is a body."""
        data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        kind = {} if data is None else {"Content-Type": "application/json"}
        request = Request(self.url + path, data=data, headers={**kind, **(headers or {})})
        try:
            with urlopen(request, timeout=timeout) as reply:
                status, raw, got = reply.status, reply.read(), dict(reply.headers)
        except HTTPError as error:
            with error:
                status, raw, got = error.code, error.read(), dict(error.headers)
        names = {name.lower(): value for name, value in got.items()}
        is_json = names.get("content-type", "").startswith("application/json")
        return status, msgspec.json.decode(raw) if is_json else raw.decode(), names

    def ready(self, timeout: float = 60) -> Live:
        """Itself, once it answers."""
        end = time.monotonic() + timeout
        while self.ask("/ready")[0] != 200:
            assert time.monotonic() < end and self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        return self

    def stop(self) -> int:
        """End it and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stderr is not None
            self.process.stderr.close()


@contextlib.contextmanager
def live(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Live]:
    """A server that is ready, ended afterwards."""
    server = Live(*arguments, environment=environment)
    try:
        yield server.ready()
    finally:
        server.stop()
