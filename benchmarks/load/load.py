"""Many clients at once, of which a third leaves in the middle: does the server stay up, flat and clean?

Knows how clients behave and what must hold afterwards; the server is asked through its port alone.

    report = asyncio.run(load(server, seconds=60, clients=200)); report["errors"], report["pages_held"]
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import numpy as np

from benchmarks.load.client import Answer, ask, get
from benchmarks.load.servers import Server

WORDS = (
    "good morrow sir what news of the king my lord I pray thee speak and tell us where he lies for all the city "
    "stands in fear tonight we have no more to say but come again at dawn and bring thy sword with thee"
).split()
LEAVING = 1 / 3
SAMPLE_S = 0.5
BACKOFF_S = 1.0  # a client that was told to come again does so within this time, however long it was told to wait
SETTLE_S = 10.0  # for what was left behind to be cancelled


def request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body: chats and completions, prompts of 1 to 400 words, answers of 1 to 200 tokens."""
    words = " ".join(draw.choices(WORDS, k=min(400, int(draw.paretovariate(0.7) * 4))))
    body: dict[str, Any] = {"stream": draw.random() < 0.8, "max_tokens": int(2 ** draw.uniform(0, 7.6))}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if draw.random() < 0.5:
        body |= {"temperature": 0.8, "seed": draw.randrange(1 << 30)}
    if draw.random() < 0.5:
        return "/v1/completions", {**body, "prompt": words}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": words}]}


class Load:
    """What clients saw."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.errors: list[str] = []
        self.first_s: list[float] = []
        self.gaps_s: list[float] = []
        self.tokens = 0

    async def client(self, port: int, number: int, until: float) -> None:
        """Ask until the time is over."""
        draw = random.Random(number)
        while time.monotonic() < until:
            path, body = request(draw)
            leaving = draw.random() < LEAVING
            try:
                answer = await self._ask(port, path, body, draw.choice((0, 1, 2, 5, 20)) if leaving else None, draw)
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
                continue
            if answer is None:
                self.statuses["left"] += 1
            elif answer.status == 429:
                self.statuses["429"] += 1
                await asyncio.sleep(draw.uniform(0, BACKOFF_S))
            else:
                self._note(answer, leaving)

    async def _ask(
        self, port: int, path: str, body: dict[str, Any], leave: int | None, draw: random.Random
    ) -> Answer | None:
        if leave is not None and not body["stream"]:  # before the answer can be there
            try:
                return await asyncio.wait_for(ask(port, path, body), draw.uniform(0, 0.2))
            except TimeoutError:
                return None
        return await ask(port, path, body, leave_after=leave)

    def _note(self, answer: Answer, leaving: bool) -> None:
        if answer.status not in (0, 200) or answer.error:
            self.errors.append(f"{answer.status}: {answer.error}")
        elif not answer.complete:
            if leaving:
                self.statuses["left"] += 1
            else:
                self.errors.append("the stream ended without its end")
        else:
            self.statuses["whole"] += 1
            if answer.usage is None:
                self.errors.append("no usage")
            else:
                self.tokens += answer.usage["completion_tokens"]
        if answer.first_s is not None:
            self.first_s.append(answer.first_s)
        self.gaps_s += answer.gaps_s


async def load(server: Server, *, seconds: float, clients: int) -> dict[str, Any]:
    """Everything measured, as plain data for a record."""
    seen = Load()
    began = time.monotonic()
    memory: list[tuple[float, int]] = []
    tasks = [asyncio.create_task(seen.client(server.port, number, began + seconds)) for number in range(clients)]
    all_done = asyncio.gather(*tasks)
    while not all_done.done():
        memory.append((round(time.monotonic() - began, 2), server.memory_bytes()))
        await asyncio.wait({all_done}, timeout=SAMPLE_S)
    await all_done
    wall_s = time.monotonic() - began
    held = await _held(server.port)
    settled = time.monotonic()
    while any(held.values()) and time.monotonic() - settled < SETTLE_S:
        await asyncio.sleep(0.1)
        held = await _held(server.port)
    return {
        "clients": clients,
        "seconds": seconds,
        "wall_s": wall_s,
        "requests": dict(seen.statuses),
        "errors": len(seen.errors),
        "error_examples": seen.errors[:10],
        "tokens_of_whole_answers": seen.tokens,
        "first_token_s": _percentiles(seen.first_s),
        "gap_s": _percentiles(seen.gaps_s),
        "memory": memory,
        "growth_bytes": growth(memory),
        "held_at_end": held,
    }


def growth(memory: list[tuple[float, int]]) -> int:
    """Bytes by which the median of the last third of the time is over that of the second third; the first warms up."""
    sizes = [size for _, size in memory]
    third = max(1, len(sizes) // 3)
    return int(np.median(sizes[2 * third :])) - int(np.median(sizes[third : 2 * third]))


async def _held(port: int) -> dict[str, float]:
    """What a server without requests holds nothing of, from its own metrics."""
    text = (await get(port, "/metrics")).decode()
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name in GAUGES:
            found[name] = float(value)
    missing = set(GAUGES) - set(found)
    if missing:
        raise RuntimeError(f"/metrics lacks {sorted(missing)}")
    return found


GAUGES = ('finial_kv_pages{state="held"}', "finial_sequences_running", "finial_sequences_waiting")


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    names = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9, "max": 100}
    return {"count": len(values), **{name: float(np.percentile(values, at)) for name, at in names.items()}}
