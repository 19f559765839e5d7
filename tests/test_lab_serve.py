"""Open-loop load against a server of known slowness."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from finial.errors import RequestError
from finial.lab.open_loop import Load, cell, summary
from finial.lab.record import Record, Request
from finial.lab.report.markdown import render
from finial.machine import describe


async def _serve(pace: float, fail_every: int = 0) -> asyncio.Server:
    """Four tokens, `pace` seconds each, one request at a time; every n-th answers 500, breaks off or sends an error."""
    count, turn = 0, asyncio.Lock()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(x.split(":")[1]) for x in head.split("\r\n") if x.lower().startswith("content-length"))
        await reader.readexactly(length)
        if head.startswith("GET"):
            body = json.dumps({"data": [{"id": "m"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        else:
            count += 1
            if fail_every and count % fail_every == 0:
                writer.write(b"HTTP/1.1 503 Busy\r\n\r\nfull")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                async with turn:
                    for data in ['{"choices": [{"text": "a"}]}'] * 4 + ["[DONE]"]:
                        await asyncio.sleep(pace)
                        event = f"data: {data}\n\n".encode()
                        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                        await writer.drain()
                writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


def run(pace: float, fail_every: int = 0, rate: float = 20.0, seconds: float = 0.6) -> list[Request]:
    async def whole() -> list[Request]:
        server = await _serve(pace, fail_every)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await Load(f"http://127.0.0.1:{port}", rate, seconds).run()

    return asyncio.run(whole())


def test_queueing_shows_because_the_load_does_not_wait() -> None:
    requests = run(0.05)  # serves 4 a second at most, gets 20
    found = summary(requests)
    assert found.requests == len(Load("http://x", 20.0, 0.6).arrivals()) > 5 and not found.errors
    assert all(r.tokens == 4 for r in requests)
    assert found.first[2] > 4 * 0.05 * (found.requests - 2) - 0.6, "the last one waited for all before it"
    assert found.waiting > found.requests / 2 and found.goodput < 5
    assert found.gaps[0] == pytest.approx(0.05, abs=0.04)


def test_a_run_becomes_a_cell_of_a_record(tmp_path: Path) -> None:
    load = Load("http://x", 1.0, 1.0)
    machine = json.loads(json.dumps(describe().to_dict()))
    made = Record.create(tmp_path / "r.json", plan={}, started="", commit="", machine=machine, busy=None)
    made.cells["a"] = cell(load, [Request(due=0.0, sent=0.0, times=[0.5, 0.6], tokens=2)])
    made.cells["b"] = cell(load, [Request(due=0.0, sent=0.0, error="reset")])
    made.save()
    again = Record.open(made.path).cells
    assert again["a"].engines["http://x"].values == [pytest.approx(2 / 0.6)]
    assert again["b"].engines["http://x"].reason == "reset"
    assert "open loop, 1 requests/s" in render(made.data)


def test_errors_are_counted_and_do_not_count() -> None:
    found = summary(run(0.001, fail_every=3))
    assert found.errors == {"status 503: full": found.requests // 3}


def test_goodput_leaves_out_what_came_too_late() -> None:
    good = Request(due=0.0, sent=0.0, times=[0.5, 0.6, 0.7], tokens=3)
    slow = Request(due=0.0, sent=0.0, times=[1.5, 1.6, 2.0], tokens=3)
    found = summary([good, slow, Request(due=1.0, sent=1.0, error="reset")])
    assert found.goodput == pytest.approx(0.5) and found.tok_s == pytest.approx(3.0) and found.errors == {"reset": 1}


def test_arrivals_are_poisson_and_seeded() -> None:
    load = Load("http://x", 50.0, 40.0)
    assert load.arrivals() == load.arrivals()
    assert len(load.arrivals()) == pytest.approx(2000, abs=5 * 2000**0.5)


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RequestError, match="models"):
        asyncio.run(Load("http://127.0.0.1:9", 1.0, 1.0).run())
    with pytest.raises(RequestError, match="no http"):
        asyncio.run(Load("localhost", 1.0, 1.0, model="m").run())
