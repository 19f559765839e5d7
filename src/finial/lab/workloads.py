"""What is measured: the workloads, which formats and engines each is for, and the tokens.

Knows no engine's inside and no file.

    for group in plan(quick=True): group.model, group.format, group.threads, group.workloads
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

SHAPE, DEMO = "qwen3-0.6b", "demo"
FORMATS = ("bf16", "q8_0", "q4_0", "q4_k_m")
CONTEXT = 4224  # the deepest workload, rounded up to whole pages of 128


@dataclass(frozen=True)
class Workload:
    """One thing to do.

    Attributes:
        kind: "decode" tok/s between the first and the last token · "prompt" tok/s up to the first token · "first"
            time to the first token over the time of a decode step · "load" seconds · "memory" peak bytes.
        depth: tokens of each prompt; new: tokens generated after it, by each sequence.
        rounds: samples of each engine; warmups: runs before them, recorded apart.
        slow: also for the engines that are too slow for the rest.
    """

    name: str
    kind: str
    depth: int = 32
    new: int = 17
    sequences: int = 1
    rounds: int = 10
    warmups: int = 1
    slow: bool = False

    @property
    def keeps(self) -> bool:
        """Whether the cache may be kept between runs: what is measured begins after it is filled."""
        return self.kind == "decode" and self.sequences == 1


@dataclass(frozen=True)
class Group:
    """Workloads that share loaded engines."""

    model: str
    format: str
    threads: int
    workloads: tuple[Workload, ...]
    starts: int = 1  # how often each engine is started: samples of load time and memory

    @property
    def key(self) -> str:
        """Of its cells, with the workload's name behind."""
        return f"{self.model}/{self.format}/{self.threads}"


LOAD = Workload("load from a warm page cache", "load", new=9)
MEMORY = Workload("peak memory after a short text", "memory")

_DECODE = Workload("decode at depth 32", "decode", slow=True)
_DEEP = Workload("decode at depth 1,024", "decode", depth=1024, rounds=8)
_DEEPEST = Workload("decode at depth 4,096", "decode", depth=4096, rounds=5)
_FIRST = Workload("first token of a prompt of 8", "first", depth=8, new=9, rounds=5)
_PROMPT = Workload("prompt of 512", "prompt", depth=512, new=1, rounds=5, slow=True)
_LONG = Workload("prompt of 2,048", "prompt", depth=2048, new=1, rounds=3, warmups=0)
_FOUR = Workload("4 sequences at once", "decode", sequences=4, new=13, rounds=4)
_EIGHT = Workload("8 sequences at once", "decode", sequences=8, new=13, rounds=4)
_ONE = Workload("decode at depth 32, 1 thread", "decode", rounds=6)
_TINY = Workload("demo model, decode at depth 32", "decode", new=129)
_TINY_ONE = replace(_TINY, name="demo model, decode at depth 32, 1 thread")


def plan(quick: bool, threads: int, formats: Sequence[str] = FORMATS) -> list[Group]:
    """Everything to measure, in order; `quick` leaves out depths, lengths and rounds."""
    if quick:
        few = tuple(replace(w, rounds=4, slow=False) for w in (_DECODE, _DEEP)) + tuple(
            replace(w, rounds=3, slow=False) for w in (_PROMPT, _EIGHT)
        )
        groups = [Group(SHAPE, f, threads, few) for f in formats if f != "q4_k_m"]
        return [*groups, Group(DEMO, "stored", threads, (replace(_TINY, rounds=5),))]
    groups = []
    for format in formats:
        if format == "q4_k_m":
            groups.append(Group(SHAPE, format, threads, (_DECODE, _DEEP, _PROMPT)))
            continue
        everything = (_FIRST, _DECODE, _DEEP, _PROMPT, _FOUR, _EIGHT, _LONG, _DEEPEST)
        groups.append(Group(SHAPE, format, threads, everything, starts=3))
        if threads > 1:
            groups.append(Group(SHAPE, format, 1, (_ONE,)))
    groups.append(Group(DEMO, "stored", threads, (_TINY,)))
    if threads > 1:
        groups.append(Group(DEMO, "stored", 1, (_TINY_ONE,)))
    return groups


def prompts(workload: Workload, vocab_size: int, run: int) -> list[list[int]]:
    """Random ids with a fixed seed: the same for every engine, fresh in every run unless the cache is to be kept."""
    chosen = 0 if workload.keeps else run + 1
    draw = random.Random(f"{workload.kind} {workload.depth} {workload.sequences} {chosen}")
    # The highest ids of a vocabulary are its special tokens.
    return [[draw.randrange(vocab_size * 9 // 10) for _ in range(workload.depth)] for _ in range(workload.sequences)]


def check(workload: Workload, reply: dict[str, Any]) -> str:
    """Why a reply is not the work that was asked for; empty when it is."""
    counts = [len(tokens) for tokens in reply["tokens"]]
    if counts != [workload.new] * workload.sequences:
        return f"unequal work: {counts} tokens instead of {workload.sequences} × {workload.new}"
    if not all(0 < first <= last for first, last in zip(reply["first"], reply["last"], strict=True)):
        return "times that go backwards"
    return ""


def value(workload: Workload, reply: dict[str, Any]) -> float:
    """The workload's number from a checked reply."""
    first: float = min(reply["first"])
    last: float = max(reply["last"])
    if workload.kind == "prompt":
        return workload.depth * workload.sequences / first
    steps = workload.new - 1
    if workload.kind == "first":
        return first / ((last - first) / steps)
    return workload.sequences * steps / (last - first)
