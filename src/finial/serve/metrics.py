"""What a server did, in numbers that Prometheus collects: requests, queue, tokens, latencies, cache, joules.

Counted where it happens with plain additions; put into Prometheus' form only when somebody asks.

    meter = Meter(); meter.piece(handle); meter.request("/v1/completions", 200)
    text, content_type = exposition(meter, engine)
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from finial.engine.generate import Engine
from finial.engine.handle import Handle
from finial.machine.energy import probe_energy
from finial.machine.sources import Sources

FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How many values were at most each bound; one thread adds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """In Prometheus' form: cumulative counts."""
        buckets, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            buckets.append((bound, below))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


class Meter:
    """Counts of one server."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.ends: Counter[str] = Counter()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first = Histogram(FIRST_TOKEN_S)
        self.next = Histogram(NEXT_TOKEN_S)

    def request(self, path: str, status: int) -> None:
        """A request was answered; on the event loop."""
        self.requests[path, status] += 1

    def piece(self, handle: Handle) -> None:
        """A sequence has one more piece; in the thread that drives the engine."""
        timings = handle.timings
        if handle.pieces[-1].token is not None:
            self.generated_tokens += 1
            if timings.gap_s is not None:
                self.next.add(timings.gap_s)
            elif timings.ttft_s is not None:
                self.first.add(timings.ttft_s)
        if handle.finish_reason is not None:
            self.ends[handle.finish_reason] += 1
            self.prompt_tokens += handle.sequence.prompt_length
            self.cached_tokens += handle.sequence.reused


class _Reading(Collector):
    def __init__(self, meter: Meter, engine: Engine | None) -> None:
        self._meter = meter
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        meter = self._meter
        requests = CounterMetricFamily("finial_requests", "Requests answered.", labels=["path", "status"])
        for (path, status), count in list(meter.requests.items()):
            requests.add_metric([path, str(status)], count)
        yield requests
        ends = CounterMetricFamily("finial_sequences", "Sequences ended, by reason.", labels=["finish_reason"])
        for reason, count in list(meter.ends.items()):
            ends.add_metric([reason], count)
        yield ends
        tokens = CounterMetricFamily("finial_tokens", "Tokens; cached ones are among the prompts'.", labels=["kind"])
        tokens.add_metric(["prompt"], meter.prompt_tokens)
        tokens.add_metric(["cached"], meter.cached_tokens)
        tokens.add_metric(["generated"], meter.generated_tokens)
        yield tokens
        yield meter.first.family("finial_time_to_first_token_seconds", "From submission, queue included.")
        yield meter.next.family("finial_inter_token_latency_seconds", "Between two tokens of a sequence.")
        if self._engine is not None:
            yield from _engine(self._engine)
        joules = CounterMetricFamily("finial_energy_joules", "Counters of the machine.", labels=["counter"])
        readable = [counter for counter in probe_energy(Sources()) if counter.joules is not None]
        for counter in readable:
            joules.add_metric([counter.name], counter.joules or 0.0)
        if readable:  # no counter, no number
            yield joules


def _engine(engine: Engine) -> Iterator[Metric]:
    yield GaugeMetricFamily("finial_sequences_running", "Sequences being computed.", engine.running)
    yield GaugeMetricFamily("finial_sequences_waiting", "Sequences in the queue.", engine.waiting)
    yield CounterMetricFamily("finial_steps", "Steps of the model.", engine.steps)
    pages = GaugeMetricFamily("finial_kv_pages", "Pages of the key-value cache.", labels=["state"])
    held, cached = engine.pages_held, engine.pages_cached
    pages.add_metric(["held"], held)
    pages.add_metric(["cached"], cached)
    pages.add_metric(["free"], engine.pages - held - cached)
    yield pages


def exposition(meter: Meter, engine: Engine | None) -> tuple[bytes, str]:
    """(body, content type) of /metrics.  Reads counters of the machine: some milliseconds, off the event loop."""
    registry = CollectorRegistry()
    registry.register(_Reading(meter, engine))
    ProcessCollector(registry=registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
