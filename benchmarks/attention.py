"""Decode and prefill attention of the cpu backend against the machine's read bandwidth, by depth.

Attentions of Qwen3-0.6B's shape by default, one after another on caches of their own as the layers of a model
are: up to 28, or as many as are larger together than any CPU cache.  (Shallow caches fit a CPU cache even so: there
the share of read bandwidth passes 100 %, and the time in microseconds is what counts.)  Read bandwidth is measured
before and after each cell, and the cell reports its share of the better of the two.  Prompts report their share of the
peak of the instruction that multiplies scores and weights, counting only what a row sees.

Pages lie one after another, as a server that has room deals them out, or anywhere (`--pages random`).

    python -m benchmarks.attention --kv bf16 --threads 2 --save benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from finial import _native
from finial.backends.cpu import CpuBackend, CpuProgram
from finial.graph import Graph

DEPTHS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
STEP = {"positions": ("T",), "starts": ("B1",), "lengths": ("B",), "pages": ("B", "P"), "slots": ("T",)}


def program(heads: int, kv_heads: int, head_dim: int, kv: str, threads: int, layers: int) -> CpuProgram:
    """`layers` attentions, each on a cache of its own; the keys and values written are those of the step."""
    graph = Graph("attention")
    step = {name: graph.input(name, shape, "i32") for name, shape in STEP.items()}
    where = [step[name] for name in ("positions", "starts", "lengths", "pages")]
    q = graph.input("q", ("T", heads * head_dim))
    k, v = (graph.input(name, ("T", kv_heads * head_dim)) for name in "kv")
    for layer in range(layers):
        cache = graph.state(f"kv.{layer}", ("S", 2, kv_heads, head_dim), kv)
        cache = graph.apply("cache_write", cache, k, v, step["slots"])
        attrs = {"head_dim": head_dim, "num_kv_heads": kv_heads, "scale": head_dim**-0.5, "window": None}
        q = graph.apply("attention", q, cache, *where, **attrs)
    graph.output(q)
    return CpuBackend(threads).compile(graph, {})


def deal(depth: int, page_size: int, order: str) -> np.ndarray:
    """The pages of `depth` positions: ascending, or in random order as after a while of serving without room."""
    count = -(-depth // page_size)
    pages = np.arange(count) if order == "ascending" else np.random.default_rng(depth).permutation(count)
    return pages.astype(np.int32)


def feeds(
    rows: int, depth: int, heads: int, kv_heads: int, head_dim: int, page_size: int, pages: np.ndarray
) -> dict[str, np.ndarray]:
    """`rows` new rows that end at `depth`."""
    rng = np.random.default_rng(depth)
    at = np.arange(depth - rows, depth, dtype=np.int32)
    arrays = {
        name: rng.standard_normal((rows, n * head_dim)) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    return {
        **{name: array.astype(np.float32) for name, array in arrays.items()},
        "positions": at,
        "starts": np.array([0, rows], np.int32),
        "lengths": np.array([depth], np.int32),
        "pages": pages[None],
        "slots": (pages[at // page_size] * page_size + at % page_size).astype(np.int32),
    }


def measure(args: argparse.Namespace, rows: int, depth: int) -> dict[str, float | int | list[float]]:
    row = {"f32": 4.0, "bf16": 2.0, "q8_0": 34 / 32}[args.kv] * args.head_dim
    nbytes = int(2 * depth * args.kv_heads * row)
    layers = max(1, min(28, -(-256_000_000 // nbytes))) if rows == 1 else 1
    run = program(args.heads, args.kv_heads, args.head_dim, args.kv, args.threads, layers)
    state = run.new_state(-(-depth // args.page_size), args.page_size)
    pages = deal(depth, args.page_size, args.pages)
    for end in range(0, depth, 1024):  # fill the cache; attention over it is what a prompt costs, so by pieces
        count = min(1024, depth - end)
        fill = feeds(count, end + count, args.heads, args.kv_heads, args.head_dim, args.page_size, pages)
        fill["positions"] = np.zeros_like(
            fill["positions"]
        )  # written where they belong, attending to nothing: filling is quick
        run.run(fill, state)
    step = feeds(rows, depth, args.heads, args.kv_heads, args.head_dim, args.page_size, pages)
    multiplies = CpuBackend(args.threads).attention_precision(args.kv)
    peak = _native.peak_flops(args.threads, multiplies, 0.1)
    reader = _native.BandwidthProbe(args.threads, max(nbytes * layers, 1 << 20))
    before = reader.gb_s(0.2)
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - start < args.seconds:
        at = time.perf_counter()
        run.run(step, state)
        samples.append((time.perf_counter() - at) / layers)
    bandwidth = max(before, reader.gb_s(0.2))
    median = statistics.median(samples[1:])
    flops = 4 * args.heads * args.head_dim * sum(range(depth - rows + 1, depth + 1))
    return {
        "rows": rows, "depth": depth, "layers": layers, "us": median * 1e6, "best_us": min(samples) * 1e6,
        "gb_s": nbytes / median / 1e9, "read_gb_s": bandwidth, "share": nbytes / median / 1e9 / bandwidth,
        "gflop_s": flops / median / 1e9, "peak_gflop_s": peak, "of_peak": flops / median / 1e9 / peak,
        "samples_us": [s * 1e6 for s in samples[:200]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv", default="bf16", choices=("f32", "bf16", "q8_0"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--pages", default="ascending", choices=("ascending", "random"))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell")
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS))
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    shape = f"{args.heads}/{args.kv_heads} heads x {args.head_dim}"
    print(f"{_native.isa()}, {args.threads} threads, {shape}, {args.kv} cache, {args.pages} pages")
    print(
        f"{'rows':>6} {'depth':>6} {'us':>10} {'GB/s':>7} {'of read':>8} {'share':>6} "
        f"{'GFLOP/s':>8} {'of peak':>8} {'share':>6}"
    )
    cells = []
    for rows, depth in [(1, depth) for depth in args.depths] + [(prompt, prompt) for prompt in args.prompts]:
        cell = measure(args, rows, depth)
        cells.append(cell)
        print(
            f"{rows:6} {depth:6} {cell['us']:10.1f} {cell['gb_s']:7.2f} {cell['read_gb_s']:8.1f} "
            f"{cell['share']:6.1%} {cell['gflop_s']:8.1f} {cell['peak_gflop_s']:8.0f} {cell['of_peak']:6.1%}",
            flush=True,
        )
    if args.save:
        record = {
            "isa": _native.isa(), "cpu": platform.processor() or platform.machine(), "load": os.getloadavg(),
            "arguments": {key: value for key, value in vars(args).items() if key != "save"}, "cells": cells,
        }  # fmt: skip
        args.save.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.save.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(args.save)


if __name__ == "__main__":
    main()
