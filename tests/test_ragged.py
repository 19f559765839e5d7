"""Ragged invariance: chunks, batch-mates and page layout never change a row's logits.

Bit for bit on the native backends; on the reference within float32 rounding, since its matrix products
are BLAS's, whose order of summation depends on the number of rows.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kquants
import models
from finial import _native
from finial.backends.cpu import CpuBackend
from finial.config import ModelConfig
from finial.executor import Executable, compile_graph
from finial.formats import Tensor
from finial.graph import Graph, Step
from finial.models.decoder import build_graph, constants
from here import BACKENDS

# cuda splits work by the rows of a step and promises the same bits for the same step only (docs/cuda.md).
BACKENDS = [name for name in BACKENDS if name != "cuda"]
NAMES = ("qwen3", "mistral-window", "qwen2-window")
FORMATS = ("bf16", "q8_0", "f32")
LONGEST, PAGES = 60, 64


@functools.cache
def executable(name: str, backend: str, format: str) -> Executable:
    made = models.model(name)
    config = ModelConfig.from_hf(json.loads(made.config.to_json_string(use_diff=False)))
    weights: dict[str, Tensor | np.ndarray] = {}
    if format == "k":
        weights |= kquants.mixture({key: value.numpy() for key, value in made.state_dict().items()})
    for key, value in made.state_dict().items() if format != "k" else ():
        tensor = Tensor.from_array(value.numpy())
        weights[key] = tensor.to(format) if len(tensor.shape) == 2 else tensor
    # A last-bit difference may fall on the other side of a bf16 rounding boundary: the reference keeps f32.
    kv_dtype = "f32" if backend == "reference" else "bf16"
    return compile_graph(build_graph(config, kv_dtype), weights | constants(config), backend, threads=2)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 160, length).tolist()


@dataclass
class Sequence:
    tokens: list[int]
    pages: list[int]
    done: int = 0


def step(sequences: list[Sequence], takes: list[int], page_size: int) -> Step:
    """The next `takes[b]` rows of each sequence, every row's logits wanted."""
    tokens, positions, slots, starts = [], [], [], [0]
    for sequence, take in zip(sequences, takes, strict=True):
        rows = range(sequence.done, sequence.done + take)
        tokens += [sequence.tokens[p] for p in rows]
        positions += rows
        slots += [sequence.pages[p // page_size] * page_size + p % page_size for p in rows]
        sequence.done += take
        starts.append(len(tokens))
    wide = max(len(sequence.pages) for sequence in sequences)
    table = [sequence.pages + [-1] * (wide - len(sequence.pages)) for sequence in sequences]
    arrays = (tokens, positions, starts, [s.done for s in sequences], table, slots, range(len(tokens)))
    return Step(*(np.asarray(list(array), np.int32) for array in arrays))


@functools.cache
def alone(name: str, backend: str, format: str, seed: int, length: int) -> np.ndarray:
    """All rows in one step, alone, pages in order: what every other way is compared with."""
    run = executable(name, backend, format)
    run.reserve(pages=1, page_size=64)
    return run.run(step([Sequence(text(seed, length), [0])], [length], 64))


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[list[int]], int]:
    """Page size, sequences as (seed, length), a list of takes per step, and a seed for the page order."""
    page_size = draw(st.sampled_from([1, 3, 8, 16, 64]))
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=4))
    left, takes = list(lengths), []
    while any(left):
        take = [draw(st.integers(0, min(n, draw(st.sampled_from([1, 5, LONGEST]))))) if n else 0 for n in left]
        if not any(take):
            take = [min(n, 1) for n in left]
        takes.append(take)
        left = [n - t for n, t in zip(left, take, strict=True)]
    sequences = [(draw(st.integers(0, 3)), length) for length in lengths]
    return page_size, sequences, takes, draw(st.integers(0, 1000))


@pytest.mark.parametrize(
    "name, backend, format",
    [
        *(
            (name, backend, format)
            for backend in BACKENDS
            if backend != "reference"
            for name in NAMES
            for format in FORMATS
        ),
        *(("qwen3-wide", backend, "k") for backend in BACKENDS if backend != "reference"),
        *((name, "reference", "bf16") for name in NAMES),
    ],
)
@settings(max_examples=25)
@given(schedule=schedules())
def test_any_schedule_gives_the_logits_of_a_row_alone(
    name: str, backend: str, format: str, schedule: tuple[int, list[tuple[int, int]], list[list[int]], int]
) -> None:
    page_size, texts, takes, order = schedule
    expected = [alone(name, backend, format, seed, LONGEST)[:length] for seed, length in texts]
    per = -(-LONGEST // page_size)
    deal = np.random.default_rng(order).permutation(len(texts) * per).reshape(len(texts), per)
    sequences = [Sequence(text(seed, LONGEST), pages.tolist()) for (seed, _), pages in zip(texts, deal, strict=True)]
    run = executable(name, backend, format)
    run.reserve(pages=len(texts) * per, page_size=page_size)
    for take in takes:
        before = [sequence.done for sequence in sequences]
        present = [b for b, rows in enumerate(take) if rows]
        logits = run.run(step([sequences[b] for b in present], [take[b] for b in present], page_size))
        at = 0
        for b in present:
            got, want = logits[at : at + take[b]], expected[b][before[b] : before[b] + take[b]]
            at += take[b]
            if backend == "reference":
                assert np.abs(got - want).max() < 1e-4 * want.std()
            else:
                assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


# --- attention alone, over several chunks of positions ----------------------------------------------------------------

LENGTH, SHORT = 640, 300
SHAPES = [  # heads, kv heads, head_dim, cache format, window
    (2, 1, 64, "bf16", None),
    (4, 4, 16, "bf16", None),
    (3, 1, 80, "bf16", 290),
    (5, 1, 128, "q8_0", None),
    (8, 2, 32, "f32", 70),
    (6, 1, 96, "q8_0", 400),
]


def attend(
    shape: tuple[int, int, int, str, int | None],
    isa: str,
    threads: int,
    page_size: int,
    takes: list[list[int]],
    order: int,
) -> np.ndarray:
    """Rows of two sequences of LENGTH and SHORT positions, [LENGTH + SHORT, heads * head_dim], computed as told."""
    heads, kv_heads, head_dim, dtype, window = shape
    graph = Graph("attention")
    where = {"positions": ("T",), "starts": ("B1",), "lengths": ("B",), "pages": ("B", "P"), "slots": ("T",)}
    inputs = {name: graph.input(name, dims, "i32") for name, dims in where.items()}
    q, k, v = (graph.input(name, ("T", n * head_dim)) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    cache = graph.apply("cache_write", graph.state("kv", ("S", 2, kv_heads, head_dim), dtype), k, v, inputs["slots"])
    attrs = {"head_dim": head_dim, "num_kv_heads": kv_heads, "scale": head_dim**-0.5, "window": window}
    graph.output(graph.apply("attention", q, cache, *list(inputs.values())[:4], **attrs))
    program = CpuBackend(threads, isa).compile(graph, {})
    rng = np.random.default_rng(1)
    data = {name: rng.standard_normal((LENGTH + SHORT, n * head_dim), np.float32)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}  # fmt: skip
    per = -(-LENGTH // page_size)
    pages = np.random.default_rng(order).permutation(2 * per).reshape(2, per)
    state = program.new_state(2 * per, page_size)
    out, done = np.empty((LENGTH + SHORT, heads * head_dim), np.float32), [0, 0]
    for take in takes:
        spans = [np.arange(begin, begin + rows) for begin, rows in zip(done, take, strict=True)]
        done = [begin + rows for begin, rows in zip(done, take, strict=True)]
        rows = np.concatenate([spans[0], spans[1] + LENGTH])
        slots = np.concatenate([pages[b, at // page_size] * page_size + at % page_size for b, at in enumerate(spans)])
        feeds = {"positions": np.concatenate(spans), "starts": np.cumsum([0, *take]), "lengths": np.array(done),
                 "pages": pages, "slots": slots}  # fmt: skip
        feeds = {name: array.astype(np.int32) for name, array in feeds.items()}
        out[rows] = program.run(feeds | {name: array[rows] for name, array in data.items()}, state)[0]
    return out


@functools.cache
def at_once(shape: tuple[int, int, int, str, int | None], isa: str) -> np.ndarray:
    return attend(shape, isa, 1, LENGTH, [[LENGTH, SHORT]], 0)


@pytest.mark.parametrize("isa", _native.isas_available())
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=4)
@given(
    cuts=st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, SHORT)), max_size=4),
    singles=st.integers(0, 3),
    page_size=st.sampled_from([1, 5, 32, 256]),
    threads=st.integers(1, 5),
    order=st.integers(0, 100),
)
def test_long_attention_is_the_same_however_it_is_shared_out(
    shape: tuple[int, int, int, str, int | None],
    isa: str,
    cuts: list[tuple[int, int]],
    singles: int,
    page_size: int,
    threads: int,
    order: int,
) -> None:
    columns = zip(*cuts, strict=True) if cuts else ((), ())
    ends = [
        sorted([0, *column, *range(length - singles, length), length])
        for column, length in zip(columns, (LENGTH, SHORT), strict=True)
    ]
    takes = [[int(n) for n in pair] for pair in zip(*(np.diff(column) for column in ends), strict=True)]
    got = attend(shape, isa, threads, page_size, [take for take in takes if any(take)], order)
    assert np.array_equal(got.view(np.uint32), at_once(shape, isa).view(np.uint32))
