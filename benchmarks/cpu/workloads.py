"""What the CPU record measures: its groups of workloads, by format and number of threads.

plan(quick=True, threads=2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finial.lab.workloads import DEMO, SHAPE, Group, Workload

FORMATS = ("bf16", "q8_0", "q4_0", "q4_k_m")
RIVALS = (
    "llama.cpp",
    "OpenVINO GenAI",
    "onnxruntime-genai",
    "vLLM",
    "transformers eager",
    "transformers compiled",
)
ENGINES = ("finial", *RIVALS)

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
