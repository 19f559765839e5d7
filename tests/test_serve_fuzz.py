"""What no client should send: generated from the server's own document, and by hand, byte by byte.

Nothing of it may be answered 500, leave a request hanging, or disturb a client beside it.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.result import Ok

from serving import Live, live
from waiting import HUNG_S

OPERATIONS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/{name}")
FEW = {"max_tokens": 2, "n": 1}  # valid requests are answered, and are to be short


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("demo", "--threads", "1") as running:
        yield running
        assert running.ask("/ready")[0] == 200  # after all of this


@pytest.mark.parametrize("path", OPERATIONS)
def test_requests_made_from_the_document(server: Live, path: str) -> None:
    """Valid bodies, and valid ones that were mutated, as the document describes them."""
    _, document, _ = server.ask("/openapi.json")
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    operation = next(each for each in operations if each.path == path)
    strategy = operation.as_strategy()
    if operation.method.lower() == "post":
        strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    statuses = set()

    def send(case: Any) -> None:
        if path.startswith("/v1/models"):
            name = str((case.path_parameters or {}).get("name", ""))
            status, _, _ = server.ask(
                "/v1/models" + ("/" + "".join(f"%{b:02x}" for b in name.encode()) if name else "")
            )
        else:
            body = case.body
            if isinstance(body, dict):
                body = {**body, **{name: value for name, value in FEW.items() if isinstance(body.get(name, 0), int)}}
                body.pop("max_completion_tokens", None)
            try:
                data = json.dumps(body, default=str).encode()
            except (UnicodeEncodeError, ValueError, RecursionError):
                return
            status, _, _ = server.ask(path, data)
        statuses.add(status)
        assert status < 500, (status, case.body)

    from hypothesis import given

    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run = settings(max_examples=40, derandomize=True, suppress_health_check=checks, database=None)
    run(given(strategy)(send))()
    assert statuses


GOOD = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def post(body: bytes, length: int | None = None) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


RAW = {
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length and chunks": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "huge length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    "chunk of nonsense": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "malformed UTF-8": post(b'{"messages": [{"role": "user", "content": "\xff\xfe\x80"}]}'),
    "a lone surrogate": post(b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'),
    "deep": post(b"[" * 100_000),
    "deep schema": post(
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
        b'{"name": "a", "schema": ' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}}}"
    ),
    "large number": post(b'{"max_tokens": 1' + b"0" * 5000 + b', "messages": []}'),
    "not a number": post(b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}'),
    "null bytes": post(b"\x00" * 1000),
    "upgrade": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "absolute path": b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    "a long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
}
ALLOWED = {"a lone surrogate": (200, 400), "upgrade": (200, 426, 400), "many headers": (200, 400, 431)}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_request_get_a_refusal_or_the_end(server: Live, name: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=HUNG_S) as connection:
        try:
            connection.sendall(RAW[name])
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer and name != "upgrade":
                    break
        except TimeoutError:
            raise
        except OSError:  # closed while we sent
            answer = b""
    if answer:
        status = int(answer.split()[1])
        assert status in ALLOWED.get(name, range(400, 500)), answer[:300]


def test_others_are_served_while_many_send_nonsense(server: Live) -> None:
    """Half-sent bodies, slow heads and abrupt ends beside a client that asks in order."""
    over = threading.Event()
    draw = random.Random(7)
    whole = post(GOOD)

    def disturb(number: int) -> None:
        held = []
        while not over.is_set():
            try:
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
                connection.sendall(
                    whole[: draw.randrange(1, len(whole))] if number % 3 else draw.choice(list(RAW.values()))
                )
                if number % 2:
                    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # closed with a reset, not with an end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.close()
                else:
                    held.append(connection)
                    if len(held) > 20:
                        held.pop(0).close()
            except OSError:
                pass  # refused or reset is what they deserve
            over.wait(0.01)
        for connection in held:
            connection.close()

    threads = [threading.Thread(target=disturb, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            status, reply, _ = server.ask("/v1/chat/completions", GOOD)
            assert status == 200 and reply["usage"]["completion_tokens"] == 2
    finally:
        over.set()
        for thread in threads:
            thread.join()
    status, _, _ = server.ask("/health")
    assert status == 200


def test_llm_is_another_client(server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://llm.datasette.io with the settings of docs/serve-clients.md."""
    lines = f"- model_id: finial\n  model_name: demo\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(lines)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    import llm

    model = llm.get_model("finial")
    options = {"temperature": 0, "max_tokens": 12}
    expected = server.ask(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Good morrow."}], **options}
    )
    text = expected[1]["choices"][0]["message"]["content"]
    pieces = list(model.prompt("Good morrow.", stream=True, **options))
    assert "".join(pieces) == text != ""
    conversation = model.conversation()
    assert conversation.prompt("Good morrow.", stream=False, **options).text() == text
    assert conversation.prompt("And then?", stream=False, **options).text() != ""
