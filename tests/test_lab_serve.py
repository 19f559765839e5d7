"""Open-loop load against a server of known slowness, and finial's own server measured as any other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from finial.cli import invoke
from finial.errors import RequestError
from finial.lab import checks
from finial.lab.open_loop import Load, cell, summary
from finial.lab.record import Record, Request
from finial.lab.report import csv_text
from finial.lab.report.markdown import render
from finial.machine import describe
from serving import live


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


# --- a real server -------------------------------------------------------------------------------------------------


def test_a_real_server_is_loaded_and_measured_as_any_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "LATE_S", 60.0)  # a machine that stands still for a second is no engine's fault
    loaded, closed = tmp_path / "load.json", tmp_path / "closed.json"
    with live("demo", "--threads", "1", "--max-batch", "1", "--max-queue", "8", "--no-log") as server:
        # Five find room whenever they come.  Of three hundred most are told to come again.
        load = ["bench", "demo", "--serve", server.url, "--rate", "5,300", "--seconds", "1", "--generate", "200"]
        assert invoke([*load, "--out", str(loaded)]) == 0
        shown = capsys.readouterr().out
        args = ["bench", "demo", "-e", "server", "-e", "finial", "--url", server.url, "--threads", "1", "--rounds", "3"]
        work = ["-w", "latency", "-w", "prefill", "--prompt", "48", "--generate", "24", "--out", str(closed)]
        assert invoke([*args, *work]) == 0
    assert "goodput" in shown and "p50 / p95 / p99" in shown and "429" in shown
    data = Record.open(loaded).data
    slow, fast = (data.cells[f"demo/served/0/open loop, {rate} requests/s for 1 s"] for rate in (5, 300))
    easy, hard = (summary(cell.engines[server.url].samples[0].requests or []) for cell in (slow, fast))
    assert 0 < easy.good <= easy.requests == 5 and len(easy.first) == len(easy.gaps) == 3 and not easy.errors
    assert hard.requests > 200 and sum(hard.errors.values()) > hard.requests / 2 and hard.waiting >= 2
    assert all("429" in reason for reason in hard.errors) and hard.good <= hard.requests - sum(hard.errors.values())
    verdict = data.verdicts["demo/served"][server.url]
    assert verdict.basis == "top" and verdict.top >= 5 and not verdict.flaws and verdict.positions > 180
    assert verdict.kl_mean is not None and verdict.kl_mean < 1e-3 and (verdict.greedy_agreement or 0) > 0.9
    assert "goodput" in render(data) and csv_text([data]).count("\n") == 3

    data = Record.open(closed).data
    for name in ("prompt 48, generate 24", "prompt of 48"):
        rows = data.cells[f"demo/stored/1/{name}"].engines
        assert {engine: (row.status, row.reason) for engine, row in rows.items()} == {
            "finial": ("ok", ""), "server": ("ok", ""),
        }  # fmt: skip
        assert len(rows["server"].samples) == 3 and "demo at 127.0.0.1" in rows["server"].precision
    assert data.verdicts["demo/stored"]["server"].basis == "top" and not data.verdicts["demo/stored"]["server"].flaws


def test_what_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "r.json")
    assert invoke(["bench", "--serve", "http://127.0.0.1:9", "--seconds", "1", "--out", out]) == 2
    assert "is it running" in capsys.readouterr().err
    assert invoke(["bench", "-w", "serve"]) == 2 and "--serve URL" in capsys.readouterr().err
    assert invoke(["bench", "-e", "server"]) == 2 and "--url" in capsys.readouterr().err
