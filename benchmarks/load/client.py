"""A client for measuring: one HTTP request by hand, with a time stamp for every event of its stream.

Knows HTTP/1.1 and server-sent events as far as a server of this API uses them; nothing of what is asked.

    answer = await ask(port, "/v1/completions", {"prompt": "ROMEO:", "stream": True})
    answer.status, answer.first_s, answer.gaps_s
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINE = 1 << 20  # bytes of one line of a response


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: 0 when the client left before there was one.
        first_s: from the request to the first event with text; gaps_s: between that one and the next, and so on.
        events: with text.
        usage: as the last chunk or the body has it.
        complete: the end was marked ([DONE]), or the body was whole.
        error: what the server said when it refused or gave up.
        retry_s: Retry-After.
    """

    status: int = 0
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    events: int = 0
    usage: dict[str, Any] | None = None
    complete: bool = False
    error: str = ""
    retry_s: float | None = None
    body: bytes = b""


async def get(port: int, path: str) -> bytes:
    """The body of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        status, headers = await _head(reader)
        body = b"".join([part async for part in _parts(reader, headers)])
        if status != 200:
            raise ConnectionError(f"{path} answered {status}: {body[:200]!r}")
        return body
    finally:
        writer.close()


async def ask(port: int, path: str, request: Mapping[str, Any], *, leave_after: int | None = None) -> Answer:
    """POST a request and read the answer.

    Args:
        leave_after: close the connection after so many events with text; 0: as soon as the request is sent.
    Raises:
        OSError, EOFError: the connection failed before the end.
    """
    body = json.dumps(request).encode()
    answer = Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        began = time.perf_counter()
        if leave_after == 0:
            await writer.drain()
            return answer
        answer.status, headers = await _head(reader)
        answer.retry_s = float(headers["retry-after"]) if "retry-after" in headers else None
        if "text/event-stream" in headers.get("content-type", ""):
            await _events(reader, headers, answer, began, leave_after)
        else:
            answer.body = b"".join([part async for part in _parts(reader, headers)])
            answer.complete = True
            said = json.loads(answer.body)
            answer.usage = said.get("usage")
            answer.error = str(said["error"]) if said.get("error") else ""
        return answer
    finally:
        writer.close()


async def _events(
    reader: asyncio.StreamReader, headers: dict[str, str], answer: Answer, began: float, leave_after: int | None
) -> None:
    held, last = b"", began
    async for part in _parts(reader, headers):
        now = time.perf_counter()
        *events, held = (held + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                answer.complete = True
                continue
            if not data.startswith(b"{"):
                continue  # a comment that keeps the connection awake
            said = json.loads(data)
            if said.get("error"):
                answer.error = str(said["error"])
            answer.usage = said.get("usage") or answer.usage
            if _has_text(said):
                answer.events += 1
                if answer.first_s is None:
                    answer.first_s = now - began
                else:
                    answer.gaps_s.append(now - last)
                last = now
        if leave_after is not None and answer.events >= leave_after:
            return


def _has_text(said: dict[str, Any]) -> bool:
    for choice in said.get("choices", ()):
        delta = choice.get("delta", {})
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line = await reader.readline()
    if not line:
        raise EOFError("closed before a response")
    headers = {}
    while (field_ := (await reader.readline()).decode("latin-1").strip()) != "":
        name, _, value = field_.partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> Any:
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while part := await reader.read(LINE):
        yield part
