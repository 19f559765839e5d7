"""`finial serve` stays up and lets in only whom it should, whatever arrives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from brake import Brake
from finial.errors import RequestError
from finial.serve.app import Gate, build_app
from finial.serve.guard import is_loopback
from finial.serve.server import Settings
from serving import Live, live
from waiting import HUNG_S, until

KEY = "correct horse battery"
ONE = ("demo", "--max-batch", "1", "--max-context", "1024", "--max-step-tokens", "8")
HELD, GENERATED, STEPS = 'finial_kv_pages{state="held"}', 'finial_tokens_total{kind="generated"}', "finial_steps_total"
RUNNING, WAITING = "finial_sequences_running", "finial_sequences_waiting"
LONG = {"prompt": "ROMEO:", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}


def head(server: Live, body: Any, path: str = "/v1/completions", **headers: str) -> bytes:
    data = msgspec.json.encode(body)
    lines = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json", "Content-Length": str(len(data))}
    lines |= headers
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{text}\r\n".encode() + data


def opened(server: Live, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=HUNG_S)
    connection.sendall(data)
    return connection


def all_of(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("demo", before="app.BODY_S = server.HEAD_S = server.STUCK_S = 1.0") as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with live("demo", "--allow-origin", "https://chat.example", environment={"FINIAL_API_KEY": KEY}) as running:
        yield running


# --- who may come in -----------------------------------------------------------------------------------------------


def test_another_machine_needs_a_key() -> None:
    with pytest.raises(RequestError, match="no API key"):
        Settings(host="0.0.0.0")
    with pytest.raises(RequestError, match="fewer than 8"):
        Settings(keys=("short",))
    with pytest.raises(RequestError, match="origin"):
        Settings(allowed_origins=("chat.example/",))
    assert Settings(host="0.0.0.0", keys=(KEY,)).access.hosts == ("*",)
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.example")))


PATHS = ["/", "/v1/models", "/ready", "/metrics", "/openapi.json", "/v1/chat/completions", "/no-such-path"]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_but_health_asks_for_the_key(locked: Live, path: str) -> None:
    basic = base64.b64encode(b"me:" + KEY.encode()).decode()
    for wrong in ({}, {"Authorization": "Bearer " + KEY[:-1]}, {"Authorization": KEY}, {"Authorization": "Basic !"}):
        status, body, headers = locked.ask(path, headers=wrong)
        assert status == 401 and "key" in body["error"]["message"] and "Bearer" in headers["www-authenticate"]
    assert locked.ask(path, headers={"Authorization": f"Bearer {KEY}"})[0] != 401
    assert locked.ask(path, headers={"Authorization": f"Basic {basic}"})[0] != 401
    assert locked.ask("/health")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""])
def test_a_foreign_host_name_is_refused(server: Live, host: str) -> None:
    assert server.ask("/v1/models", headers={"Host": host})[0] in (400, 403)


def test_own_host_names_are_not(server: Live) -> None:
    for host in (f"localhost:{server.port}", "LOCALHOST", f"[::1]:{server.port}"):
        assert server.ask("/v1/models", headers={"Host": host})[0] == 200
    with opened(
        server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n"
    ) as raw:
        assert b" 400 " in all_of(raw).split(b"\r\n")[0]


def test_a_page_of_another_origin_is_refused(server: Live, locked: Live) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port + 1}"):
        status, reply, headers = server.ask("/v1/completions", body, {"Origin": origin})
        assert status == 403 and "access-control-allow-origin" not in headers and "origin" in str(reply)
    own = {"Origin": server.url}
    assert server.ask("/v1/completions", body, own)[0] == 200
    named = {"Origin": "https://chat.example", "Authorization": f"Bearer {KEY}"}
    status, _, headers = locked.ask("/v1/completions", body, named)
    assert status == 200 and headers["access-control-allow-origin"] == "https://chat.example"


def test_a_preflight_is_answered_for_named_origins_alone(locked: Live) -> None:
    def ask(origin: str) -> bytes:
        request = (
            f"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\nConnection: close\r\n\r\n"
        )
        with opened(locked, request.encode()) as connection:
            return all_of(connection).lower()

    allowed = ask("https://chat.example")
    assert b" 204 " in allowed and b"access-control-allow-headers: authorization, content-type" in allowed
    assert b" 403 " in ask("https://evil.example")


# --- what may come in ----------------------------------------------------------------------------------------------


def test_what_is_too_large_too_slow_or_of_another_kind_is_refused(server: Live) -> None:
    big = {"prompt": "a" * (5 << 20)}
    with opened(server, head(server, {}, **{"Content-Length": str(5 << 20)})) as connection:  # before it is sent
        assert b" 413 " in connection.recv(1 << 16)
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    start = head(server, {}).partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    with opened(server, start) as connection:
        try:
            for _ in range(100):
                connection.sendall(chunk)
        except OSError:
            pass  # closed under our hands, after the answer
        else:
            assert b" 413 " in connection.recv(1 << 16)
    half = opened(server, head(server, big)[:5000])
    half.close()  # in the middle of its body
    with opened(server, head(server, {}, **{"Content-Length": "100"})) as connection:
        assert b" 408 " in connection.recv(1 << 16)
    with opened(server, b"GET / HTTP/1.1\r\nHost: loc") as connection:  # slow-loris
        assert all_of(connection) == b""
    endless = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"a" * 200_000
    with contextlib.suppress(ConnectionError), opened(server, endless) as connection:  # reset, maybe while we send
        assert all_of(connection) == b""
    status, body, _ = server.ask("/v1/completions", b"prompt=a", {"Content-Type": "application/x-www-form-urlencoded"})
    assert status == 415 and "application/json" in body["error"]["message"]
    assert server.ask("/v1/completions", b"\xff{}")[0] == 400
    assert server.ask("/v1/completions", {"prompt": "a" * 40_000})[1]["error"]["code"] == "context_length_exceeded"
    assert server.ask("/v1/completions", {"prompt": ["a"] * 257})[0] == 400
    assert server.ask("/v1/completions")[0] == 405 and server.ask("/v2")[0] == 404
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200  # and it is still there


def test_errors_have_the_apis_form(server: Live) -> None:
    for path, body in (("/nothing", None), ("/v1/completions", {}), ("/v1/models/other", None)):
        error = server.ask(path, body)[1]["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


# --- leaving -------------------------------------------------------------------------------------------------------


def test_whoever_leaves_gives_everything_back(tmp_path: Path) -> None:
    """While it waits, in its prompt, among its tokens: the pages come back and the next one is served."""
    source, brake = random.Random(1), Brake(tmp_path)
    with live(*ONE, "--max-queue", "16", before=brake.code) as server:
        for stage in ("queue", "prompt", "tokens"):
            prompt = "Speak, friend. " * 60 if stage == "prompt" else "a"  # 30 steps and more, or one
            begun, made = server.metric(STEPS), server.metric(GENERATED)
            brake.hold(begun + 3)
            first = opened(server, head(server, LONG | {"prompt": prompt, "max_tokens": 400}))
            server.eventually(STEPS, begun + 3)
            others = []
            for i in range(3 if stage == "queue" else 2):
                body = LONG | {"prompt": prompt, "max_tokens": 400, "stream": i % 2 == 0}
                others.append(opened(server, head(server, body)))
            server.eventually(WAITING, len(others))
            assert server.metric(RUNNING) == 1 and server.metric(HELD) > 0
            server.eventually(GENERATED, made if stage == "prompt" else made + 3)
            brake.hold(begun + 20)  # so that they leave while it computes, and nobody comes to an end
            for connection in others if stage == "queue" else [first, *others]:
                time.sleep(source.random() * 0.02)
                connection.close()
            if stage == "queue":
                server.eventually(WAITING, 0)
                assert server.metric(RUNNING) == 1 and server.metric(HELD) > 0
                first.close()
            server.eventually(RUNNING, 0)
            server.eventually(WAITING, 0)
            server.eventually(HELD, 0)
            assert stage != "prompt" or server.metric(GENERATED) == made
        brake.release()
        server.eventually('finial_sequences_total{finish_reason="cancel"}', 10)
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_a_client_that_does_not_read_is_let_go(server: Live) -> None:
    body = LONG | {"n": 8, "logprobs": 20}  # some ten megabytes, more than sockets hold
    answered = 'finial_requests_total{path="/v1/completions",status="200"}'
    before = server.metric(answered)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head(server, body))
        server.eventually(answered, before + 1)  # over, though nobody has read it
    server.eventually(HELD, 0)


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    brake = Brake(tmp_path)
    brake.hold(3)
    with live(*ONE, "--max-queue", "1", before=brake.code) as server:
        with opened(server, head(server, LONG)):
            server.eventually(RUNNING, 1)
            with opened(server, head(server, LONG)):
                server.eventually(WAITING, 1)
                status, body, headers = server.ask("/v1/completions", {"prompt": "a"})
                assert status == 429 and int(headers["retry-after"]) >= 1
                assert body["error"]["type"] == "rate_limit_error"
                assert server.ask("/health")[0] == 200
        server.eventually(RUNNING, 0)
        server.eventually(WAITING, 0)
        brake.release()
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
        assert server.ask("/v1/completions", {"prompt": "a", "n": 3})[0] == 400  # would never fit


def drain(server: Live) -> None:
    """The first signal, and until it is seen to be one."""
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.ask("/ready")[0] == 503)


def test_a_signal_lets_answers_end_and_takes_no_more(tmp_path: Path) -> None:
    brake = Brake(tmp_path)
    brake.hold(3)
    with live(*ONE, before=brake.code) as server:
        with opened(server, head(server, LONG | {"max_tokens": 150}, Connection="close")) as stream:
            stream.recv(1)
            drain(server)
            assert server.ask("/health")[1] == {"status": "draining"}
            assert server.ask("/v1/completions", {"prompt": "a"})[0] == 503
            brake.release()
            assert all_of(stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.process.wait(HUNG_S) == 0


@pytest.mark.parametrize("twice", [True, False])
def test_a_second_signal_or_the_end_of_patience_stops(twice: bool, tmp_path: Path) -> None:
    brake = Brake(tmp_path)
    brake.hold(3)  # the answer never ends by itself
    with live(*ONE, "--drain", "1000" if twice else "0.2", before=brake.code) as server:
        with opened(server, head(server, LONG)) as stream:
            stream.recv(1)
            if twice:
                drain(server)
            server.process.send_signal(signal.SIGTERM)
            assert b"[DONE]" not in all_of(stream)
        assert server.process.wait(25) == 0  # before the 30 s that it has when nobody says


def test_nothing_is_answered_before_the_model_is_there() -> None:
    async def ask(path: str, method: str) -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        inbox = [{"type": "http.request", "body": b'{"prompt": "a"}'}]

        async def receive() -> Any:
            if not inbox:
                await asyncio.sleep(60)
            return inbox.pop()

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        await build_app(Gate())({**scope, "root_path": "", "state": {}}, receive, send)
        return statuses[0]

    assert asyncio.run(ask("/health", "GET")) == 200
    for path, method in (("/ready", "GET"), ("/v1/models", "GET"), ("/v1/completions", "POST")):
        assert asyncio.run(ask(path, method)) == 503


# --- the log -------------------------------------------------------------------------------------------------------


def test_the_log_has_numbers_and_text_only_when_asked() -> None:
    for option in ([], ["--log-prompts"]):
        with live("demo", *option) as server:
            server.ask("/v1/completions", {"prompt": "my secret", "max_tokens": 3})
            server.stop()
            lines = [json.loads(line) for line in server.lines if line.startswith("{")]
        line = next(line for line in lines if line["path"] == "/v1/completions")
        assert line["status"] == 200 and line["completion_tokens"] == 3 and line["prompt_tokens"] > 0
        assert ("secret" in json.dumps(lines)) == bool(option)


def test_a_port_that_is_taken_is_named(server: Live) -> None:
    command = [sys.executable, "-m", "finial.cli", "serve", "demo", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 2 and str(server.port) in done.stderr and "--port" in done.stderr
