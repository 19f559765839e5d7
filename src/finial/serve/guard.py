"""What stands before every route: host, origin, key, and a line in the access log after it.

Pure ASGI around an app; knows nothing of its routes but that /health is open to everybody who may reach the port.

    app = Guard(app, Access(keys=("secret",), hosts=("localhost",), origins=()))

A page in a browser can send requests to a loopback port on its user's behalf.  Two headers that scripts cannot forge
keep it out: Origin must be this server's own or one that was named, and Host must be a name of this server, so that a
foreign name that is made to resolve to 127.0.0.1 (DNS rebinding) does not pass.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finial.serve.replies import ErrorBody, ErrorReply

OPEN_PATHS = ("/health",)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
ANY = "*"

Headers = list[tuple[bytes, bytes]]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """Who may come in.

    Attributes:
        keys: each opens the server; none: no key is asked for.
        hosts: names that the Host header may have, without port; ("*",): any.
        origins: of pages that may use the server beside its own, such as "https://chat.example"; CORS is for them
            alone.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK_NAMES
    origins: tuple[str, ...] = ()


class Guard:
    """Lets requests pass that may, and logs all.

    Args:
        log: takes one dict per request; None: no access log.
        prompts: put the body of requests into the log too.
        count: takes path and status of each request that a route was found for; 499 when the client left.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        log: Callable[[dict[str, Any]], None] | None = None,
        prompts: bool = False,
        count: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        self._app = app
        self._access = access
        self._keys = [sha256(key.encode()).digest() for key in access.keys]
        self._log = log
        self._prompts = prompts
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        state: dict[str, Any] = scope.setdefault("state", {})
        headers: Headers = scope["headers"]
        origin = _one(headers, b"origin")
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._more(origin)]
            await send(message)

        bodies: list[bytes] = []

        async def receiving() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                bodies.append(message.get("body", b""))
            return message

        try:
            refused = self._refusal(scope, headers, origin, state)
            if refused is not None:
                await _refuse(sending, *refused)
            elif scope["method"] == "OPTIONS" and origin in self._access.origins:
                await sending({"type": "http.response.start", "status": 204, "headers": _PREFLIGHT})
                await sending({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, receiving if self._prompts and self._log else receive, sending)
        finally:
            route = scope.get("route")  # paths that somebody made up would be labels without end
            self._count(getattr(route, "path", "other"), status or 499)
            if self._log is not None:
                self._log(_line(scope, state, status, started, b"".join(bodies) if self._prompts else None))

    def _refusal(
        self, scope: Scope, headers: Headers, origin: str | None, state: dict[str, Any]
    ) -> tuple[int, str, Headers] | None:
        access = self._access
        host = _one(headers, b"host")
        if host is None:
            return 400, "a request has one Host header", []
        if ANY not in access.hosts and _name(host) not in access.hosts:
            return 403, f"the host {host!r:.80} is not a name of this server; --allow-host adds one", []
        if any(name == b"origin" for name, _ in headers) and not self._own(origin, host):
            return 403, f"pages of {origin!r:.80} may not use this server; --allow-origin lets them", []
        preflight = scope["method"] == "OPTIONS" and origin in access.origins
        client = scope.get("client")
        state["client"] = client[0] if client else ""
        if self._keys and scope["path"] not in OPEN_PATHS and not preflight:
            digest = sha256(_given_key(headers)).digest()
            matching = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever matches
            if True not in matching:
                # Two headers: Chromium does not find Basic behind another challenge in one.
                ask: Headers = [(b"www-authenticate", b'Basic realm="finial"'), (b"www-authenticate", b"Bearer")]
                return 401, "the API key is missing or wrong; send Authorization: Bearer KEY", ask
            if len(self._keys) > 1:
                state["client"] = f"key {matching.index(True) + 1}"
        return None

    def _own(self, origin: str | None, host: str) -> bool:
        if origin is None:
            return False
        return origin in self._access.origins or origin.partition("://")[2].lower() == host.lower()

    def _more(self, origin: str | None) -> Headers:
        more = [(b"x-content-type-options", b"nosniff")]
        if self._access.origins:
            more.append((b"vary", b"origin"))
        if origin is not None and origin in self._access.origins:
            more.append((b"access-control-allow-origin", origin.encode("latin-1")))
        return more


_PREFLIGHT: Headers = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
]


def stderr_log(line: dict[str, Any]) -> None:
    """One JSON object per line on standard error."""
    sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stderr.flush()


def _line(scope: Scope, state: dict[str, Any], status: int, started: float, body: bytes | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": state.get("client", ""),
        "method": scope["method"],
        "path": scope["path"],
        "status": status or None,  # None: the client went before there was one
        "ms": round(1000 * (time.perf_counter() - started), 1),
    }
    run = state.get("run")
    if run is not None:
        line |= run.summary()
    if body is not None:
        line["body"] = body.decode("utf-8", "replace")
    return line


def _one(headers: Headers, name: bytes) -> str | None:
    """The value of a header that stands there once."""
    found = [value for key, value in headers if key == name]
    return found[0].decode("latin-1").strip() if len(found) == 1 else None


def _name(host: str) -> str:
    """A Host header's name without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _given_key(headers: Headers) -> bytes:
    scheme, _, value = (_one(headers, b"authorization") or "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("latin-1")
    if scheme.lower() == "basic":  # what a browser can send for a page: any name, the key as password
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


async def _refuse(send: Send, status: int, message: str, headers: Headers) -> None:
    body = msgspec.json.encode(ErrorReply(ErrorBody(message, "invalid_request_error")))
    size = str(len(body)).encode()
    start: Headers = [(b"content-type", b"application/json"), (b"content-length", size), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
