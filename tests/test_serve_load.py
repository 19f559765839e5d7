"""The server under many clients, a third of which leaves in the middle; `python -m benchmarks.load` is the long run."""

from __future__ import annotations

import asyncio

from benchmarks.load.load import load
from benchmarks.load.servers import finial

WARM = 64 << 20  # bytes that buffers and caches may still grow by within seconds; a leak of each request would be more


def test_five_seconds_of_two_hundred_clients() -> None:
    with finial(["demo", "--max-batch", "16", "--max-queue", "64"]) as server:
        report = asyncio.run(load(server, seconds=5, clients=200))
    assert report["errors"] == 0, report["error_examples"]
    assert not any(report["held_at_end"].values()), report["held_at_end"]
    assert report["requests"]["whole"] > 0 and report["requests"]["left"] > 0 and report["requests"]["429"] > 0
    assert report["growth_bytes"] < WARM
