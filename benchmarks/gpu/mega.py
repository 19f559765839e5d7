"""The megakernel beside the graph on the GPU: the same runs of steps by both, in pairs; prints one line of JSON.

    python3 -m benchmarks.gpu.mega MODEL

Times are the host's, from asking for a run to its last token, over the steps of the run: what a user waits for.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import SIZE, TINY, _device, _program

Row = dict[str, Any]
# (rows, position of the first step)
CASES = ((1, 128), (1, 1024), (1, 4096), (1, 32768), (2, 512), (4, 512), (8, 512))
# Where mega-heads may attend without splitting: what says how many bytes that should be (table.py, WHOLE_BYTES).
ALONE = ((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (4, 64), (8, 32))
STEPS, PAIRS, PAGE = 64, 7, 32
TEXTS = {
    "mega": (("bf16", "bf16"), ("bf16", "f32"), ("q8_0", "bf16"), ("q8_0", "q8_0")),
    "mega-heads": (("bf16", "bf16"), ("q8_0", "q8_0")),
}
TEXT = 160


def compare(program: Any, cases: tuple[tuple[int, int], ...] = CASES, steps: int = STEPS, pairs: int = PAIRS) -> Row:
    """Milliseconds of a step by either way, the ratio within pairs, and how many first tokens are the same.

    Args:
        program: a `CudaProgram` whose `ways` have the megakernel.
    """
    from finial.backends.cuda import run_feeds
    from finial.backends.cuda.mega.shape import Unsuited

    vocab = int(program.graph.values[program.graph.outputs[0]].shape[1])
    result: Row = {}
    for rows, depth in cases:
        feeds, ahead = run_feeds.trial(rows, PAGE, vocab, depth=depth, steps=steps)
        name = f"batch {rows}, depth {depth}"
        try:
            program.ways.mega.plan(rows, False)
        except Unsuited as reason:
            result[name] = {"refused": str(reason)}
            continue
        state = program.new_state(feeds["pages"].size, PAGE)
        tokens: dict[bool, list[list[int]]] = {}
        samples: dict[bool, list[float]] = {False: [], True: []}
        for number in range(pairs + 1):  # the first pair compiles
            for by_mega in (False, True) if number % 2 else (True, False):
                started = time.perf_counter()
                steps_done = [step.tolist() for step in program._start(feeds, state, ahead, by_mega)]
                samples[by_mega].append((time.perf_counter() - started) / len(steps_done))
                tokens[by_mega] = steps_done
        graph, mega = samples[False][1:], samples[True][1:]
        same = next((i for i, (a, b) in enumerate(zip(*tokens.values(), strict=False)) if a != b), len(tokens[True]))
        result[name] = {
            "graph_ms": round(1e3 * statistics.median(graph), 5),
            "mega_ms": round(1e3 * statistics.median(mega), 5),
            "graph_over_mega": round(statistics.median(g / m for g, m in zip(graph, mega, strict=True)), 3),
            "mega_tokens_per_s": round(rows / statistics.median(mega), 1),
            "same_first_tokens": same,
            "of": len(tokens[True]),
        }
        del state
    result["notes"] = program.notes
    return result


def alone_or_split(
    program: Any, cases: tuple[tuple[int, int], ...] = ALONE, steps: int = 16, pairs: int = PAIRS
) -> Row:
    """Milliseconds of a step where each block attends by itself and where attention is split, in pairs.

    Args:
        program: a `CudaProgram` that decodes by mega-heads.
    """
    from finial.backends.cuda import run_feeds
    from finial.backends.cuda.mega import table

    vocab = int(program.graph.values[program.graph.outputs[0]].shape[1])
    result: Row = {}
    bound = table.whole_positions
    for rows, depth in cases:
        feeds, ahead = run_feeds.trial(rows, PAGE, vocab, depth=depth, steps=steps)
        state = program.new_state(feeds["pages"].size, PAGE)
        samples: dict[bool, list[float]] = {False: [], True: []}
        try:
            for number in range(pairs + 1):  # the first pair compiles
                for alone in (False, True) if number % 2 else (True, False):
                    table.whole_positions = lambda shape, rows, alone=alone: 1 << 30 if alone else 0
                    started = time.perf_counter()
                    done = sum(1 for _ in program._start(feeds, state, ahead, True))
                    samples[alone].append((time.perf_counter() - started) / done)
        finally:
            table.whole_positions = bound
        result[f"batch {rows}, depth {depth}"] = {
            f"{name}_ms": round(1e3 * statistics.median(samples[alone][1:]), 5)
            for name, alone in (("alone", True), ("split", False))
        }
        del state
    return result


def text(formats: tuple[tuple[str, str], ...]) -> Row:
    """The embedded model's greedy text by the megakernel, with these weights and caches, against the reference's."""
    from finial.llm import LLM

    prompt, count = "ROMEO:\nWhat light through yonder window breaks?", 3 if SIZE is TINY else TEXT
    result: Row = {}
    for format, kv in formats[: 1 if SIZE is TINY else None]:
        with (
            LLM("demo", backend="cuda", format=format, kv_format=kv, max_context=512) as llm,
            LLM("demo", backend="reference", format=format, kv_format=kv, max_context=512) as oracle,
        ):
            ours, theirs = (model.generate(prompt, max_tokens=count, ignore_eos=True).tokens for model in (llm, oracle))
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), count)
            result[f"{format}, cache {kv}"] = {"same_greedy_tokens": same, "of": count, "notes": llm.notes}
    return result


def measure(path: Path) -> Row:
    """All, with the megakernel asked for: where it cannot run, this fails and says why; a variant may be refused."""
    from finial.errors import BackendError

    if SIZE is TINY:
        import benchmarks.gpu.twin  # noqa: F401  # it puts itself in the place of the driver

    result: Row = {}
    for asked in ("mega", "mega-heads", "mega-fused"):
        os.environ["FINIAL_CUDA"] = asked
        try:
            program, _ = _program(path, _device())
        except BackendError as error:
            if asked == "mega":
                raise
            result[asked] = {"refused": error.what}
            continue
        result[asked] = compare(program, ((1, 20),), 3, 1) if SIZE is TINY else compare(program)
        if asked == "mega-heads":
            found = alone_or_split(program, ((1, 20),), 3, 1) if SIZE is TINY else alone_or_split(program)
            result["attention of mega-heads"] = found
        program.ways.mega.close()
        program.model.close()
        print(json.dumps(result), flush=True)
    for asked, formats in TEXTS.items():
        os.environ["FINIAL_CUDA"] = asked
        result[f"text, {asked}"] = text(formats)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
