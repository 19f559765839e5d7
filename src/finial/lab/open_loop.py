"""Open-loop load on an OpenAI-compatible HTTP endpoint: requests leave when they are due, however slow the answers are.

Knows HTTP/1.1, server-sent events and clocks; nothing of engines.  Arrivals are Poisson (exponential gaps), seeded.

    load = Load("http://127.0.0.1:8000", rate=2.0, seconds=30); found = asyncio.run(load.run()); summary(found, 30)
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from finial.errors import RequestError
from finial.lab.record import Cell, Request, Row, Sample
from finial.lab.statistics import percentiles
from finial.lab.workloads import Workload

WORDS = "roof beam house rain winter stone wall light door garden river road field night morning bread".split()
LINE_BYTES = 1 << 20
WARMUPS = 2  # requests before the run, one after the other


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        url: of the server, with or without /v1; model: its name there, "" asks the server.
        rate: requests a second; seconds: for how long they leave.
        prompt_words, tokens: of each request; timeout_s: after which one counts as failed.
        key: API key.
    """

    url: str
    rate: float
    seconds: float
    model: str = ""
    prompt_words: int = 32
    tokens: int = 32
    timeout_s: float = 120.0
    seed: int = 0
    key: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """Of its workload."""
        return f"open loop, {self.rate:g} requests/s for {self.seconds:g} s"

    def arrivals(self) -> list[float]:
        """Seconds from the beginning at which requests are due."""
        draw, due, found = random.Random(self.seed), 0.0, []
        while (due := due + draw.expovariate(self.rate)) < self.seconds:
            found.append(due)
        return found

    async def run(self) -> list[Request]:
        """Send all, wait for all.

        Raises:
            RequestError: a URL that is none, or a server that is not there.
        """
        if urlsplit(self.url).scheme != "http" or not urlsplit(self.url).hostname:
            raise RequestError(f"{self.url!r} is no http:// address", fix="for example http://127.0.0.1:8000")
        model = self.model or await self._first_model()
        draw = random.Random(self.seed + 1)
        for _ in range(WARMUPS):  # what it makes at its first requests is not what is measured
            await self._one(model, " ".join(draw.choices(WORDS, k=self.prompt_words)), 0.0, time.perf_counter())
        start = time.perf_counter()
        tasks = []
        for due in self.arrivals():
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            prompt = " ".join(draw.choices(WORDS, k=self.prompt_words))  # fresh: nothing is cached
            tasks.append(asyncio.create_task(self._one(model, prompt, due, start)))
        return list(await asyncio.gather(*tasks))

    async def _one(self, model: str, prompt: str, due: float, start: float) -> Request:
        request = Request(due=due, sent=time.perf_counter() - start)
        body = {"model": model, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "stream": True}
        times: list[float] = []
        try:
            async with asyncio.timeout(self.timeout_s):
                async for data in self._events("/v1/completions", body):
                    event = json.loads(data)
                    if "error" in event:
                        raise ValueError(str(event["error"])[:200])
                    if any(choice.get("text") for choice in event.get("choices", ())):
                        times.append(time.perf_counter() - start)
        except TimeoutError:
            request.error = f"no end within {self.timeout_s:g} s"
        except (OSError, ValueError, asyncio.IncompleteReadError, KeyError, AttributeError) as error:
            request.error = str(error) or type(error).__name__
        if not times and not request.error:
            request.error = "no token came"
        request.times, request.tokens = times, len(times)
        return request

    async def _first_model(self) -> str:
        try:
            async with asyncio.timeout(self.timeout_s):
                parts = [part async for part in self._exchange("GET", "/v1/models", b"")]
            return str(json.loads(b"".join(parts))["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:  # a time-out is an OSError
            raise RequestError(f"{self.url} does not say which models it has: {error}", fix="is it running?") from error

    async def _events(self, path: str, body: dict[str, object]) -> AsyncIterator[str]:
        """Data of server-sent events, without the last one, [DONE]."""
        rest = b""
        async for part in self._exchange("POST", path, json.dumps(body).encode()):
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > LINE_BYTES:
                raise ValueError("an event without an end")
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text.startswith("data:") and text[5:].strip() != "[DONE]":
                    yield text[5:].strip()

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Pieces of the answer's body as they come; ValueError for a status that is not 200."""
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=LINE_BYTES)
        try:
            authorization = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
            base = parts.path.rstrip("/").removesuffix("/v1")
            head = f"{method} {base}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
            head += f"{authorization}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := (await reader.readline()).strip().lower()) != b"":
                chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
            if status != 200:
                raise ValueError(f"status {status}: {(await reader.read(200)).decode(errors='replace').strip()}")
            if not chunked:
                while piece := await reader.read(65536):
                    yield piece
                return
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readline()
        except (IndexError, ValueError) as error:
            raise ValueError(str(error) or "an answer that is no HTTP") from error
        finally:
            writer.close()


@dataclass(frozen=True)
class Summary:
    """What a run came to; times in seconds, percentiles 50, 95 and 99.

    Attributes:
        goodput: requests a second that ended whole, with their first token and every gap within the limits.
        tok_s: tokens of all that ended whole over the whole run; errors: how many did not, by reason.
        first: time to the first token, from when the request was due; gaps: between tokens.
        late: how long after they were due requests were sent, at most: above some ms this machine was the limit.
        waiting: the most requests that were open at once; good: requests that count for the goodput.
    """

    requests: int
    goodput: float
    tok_s: float
    errors: dict[str, int]
    first: tuple[float, ...]
    gaps: tuple[float, ...]
    late: float
    waiting: int
    good: int = 0


def summary(requests: Sequence[Request], first_s: float = 1.0, gap_s: float = 0.2) -> Summary:
    """Numbers of a run.

    Args:
        first_s, gap_s: limits of goodput: time to the first token, 95th percentile of the gaps of a request.
    """
    whole = [r for r in requests if not r.error]
    errors: dict[str, int] = {}
    for r in requests:
        if r.error:
            errors[r.error] = errors.get(r.error, 0) + 1
    firsts = [r.times[0] - r.due for r in whole]
    each = [[b - a for a, b in itertools.pairwise(r.times)] for r in whole]
    good = sum(f <= first_s and (not g or percentiles(g, (95,))[0] <= gap_s) for f, g in zip(firsts, each, strict=True))
    ends = [r.times[-1] if r.times else r.sent for r in requests]
    lasted = max(ends, default=0.0) or 1.0
    # At equal times the end comes first: one leaves as the next arrives.
    moments = sorted([(r.sent, 1) for r in requests] + [(end, -1) for end in ends], key=lambda m: (m[0], m[1]))
    return Summary(
        requests=len(requests),
        goodput=good / lasted,
        tok_s=sum(r.tokens for r in whole) / lasted,
        errors=errors,
        first=percentiles(firsts) if firsts else (),
        gaps=percentiles([gap for gaps in each for gap in gaps]) if any(each) else (),
        late=max((r.sent - r.due for r in requests), default=0.0),
        waiting=max(itertools.accumulate(step for _, step in moments), default=0),
        good=good,
    )


def words(requests: Sequence[Request]) -> str:
    """A run in one sentence."""
    found = summary(requests)
    said = f"{found.goodput:.3g} requests/s in time, {found.tok_s:,.4g} tok/s"
    for name, times in (("first token", found.first), ("between tokens", found.gaps)):
        said += f"; {name} {' / '.join(f'{1e3 * t:,.3g}' for t in times)} ms (p50 / p95 / p99)" if times else ""
    failed = sum(found.errors.values())
    reasons = ", ".join(f"{count} × {reason}" for reason, count in found.errors.items())
    return f"{said}; {f'{failed} of {found.requests} failed ({reasons})' if failed else 'none failed'}"


def cell(load: Load, requests: Sequence[Request], model: str = "served") -> Cell:
    """A run as a cell of a record; its number is tokens a second, its row failed when no request ended whole.

    Args:
        model: of the cell.
    """
    found = summary(requests)
    workload = Workload(
        load.name, "serve", depth=load.prompt_words, new=load.tokens, family="serve", rounds=1, rate=load.rate
    )
    row = Row(samples=[Sample(value=found.tok_s, requests=list(requests))])
    if found.tok_s == 0:
        row = Row("failed", "; ".join(found.errors) or "no request was due", discarded=1)
    return Cell(model, "served", 0, workload, None, None, {load.url: row}, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
