"""The proof of phase tables: it holds for every shape and device, and finds each kind of mistake put into a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from finial.backends.cuda.mega import room
from finial.backends.cuda.mega.check import check
from finial.backends.cuda.mega.layout import (
    ATTEND,
    ATTENDS,
    ATTENDS_AND_KEEPS,
    COUNT,
    DOWN,
    END,
    FIRST,
    GATE_UP,
    GROUP_ATTEND,
    GROUP_OUTPUT,
    HEAD,
    KIND,
    LAYER,
    MLP_DOWN,
    MLP_UP,
    OUTPUT,
    PRODUCTS,
    QKV,
    SAMPLE,
    SIGNAL,
    STAGES,
    TARGET,
    TOKEN,
    WAIT,
    counter,
)
from finial.backends.cuda.mega.plan import Plan, make_plan
from finial.backends.cuda.mega.ring_check import Ring, check_ring
from finial.backends.cuda.mega.shape import MegaShape, Unsuited
from test_mega_table import REAL, SHARED, SMALL

# --- tables that are right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_real_models_on_132_multiprocessors(name: str) -> None:
    assert check(make_plan(REAL[name], rows=1, multiprocessors=132, shared=SHARED[90])) == []


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen2.5-0.5B"])
def test_head_groups_of_real_models(name: str, whole: bool) -> None:
    """Three hand-offs a layer, or four where attention is split; with groups of seven queries too."""
    shape, options = REAL[name], {"multiprocessors": 132, "shared": SHARED[90], "fused_mlp": True, "by_head": True}
    made = make_plan(shape, rows=2, whole=whole, **options)  # type: ignore[arg-type]
    assert check(made) == []
    waits = {int(c) for c in made.table[:, :, WAIT].flat if c >= 0}
    per_layer = len([c for c in waits if c // (shape.kv_heads + 4) == 1])
    assert per_layer == 3 if whole else per_layer == 3 + shape.kv_heads  # a counter for each head of QKV


@pytest.mark.parametrize(
    "rows, multiprocessors, sampled", [(8, 132, True), (2, 40, False), (4, 170, True), (3, 78, True)]
)
def test_rows_and_devices(rows: int, multiprocessors: int, sampled: bool) -> None:
    shape = replace(REAL["Qwen3-0.6B"], layers=3)
    made = make_plan(shape, rows=rows, multiprocessors=multiprocessors, shared=SHARED[90], sampled=sampled)
    assert check(made) == []


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any family: biases and head norms change nothing here; head counts, odd sizes, formats, devices, rows do."""
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    shape = MegaShape(
        layers=draw(st.integers(1, 3)),
        width=draw(st.integers(8, 300)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 16)),
        ffn=draw(st.integers(1, 400) | st.integers(1, 50).map(lambda octets: 8 * octets)),
        vocab=draw(st.integers(1, 3000)),
        format=draw(st.sampled_from(["bf16", "fp8", "q8_0"])),
        cache=draw(st.sampled_from(["bf16", "f32", "q8_0"])),
    )
    options = {
        "fused_mlp": shape.format != "q8_0" and shape.ffn % 8 == 0 and draw(st.booleans()),
        "by_head": draw(st.booleans()),
        "down_parts": draw(st.integers(0, 3)),
        "rows": draw(st.integers(1, 8)),
        "multiprocessors": draw(st.integers(1, 8) | st.integers(40, 170)),
        "sampled": draw(st.booleans()),
        "warps": draw(st.sampled_from([2, 4, 8])),
    }
    options["whole"] = options["by_head"] and draw(st.booleans())
    try:
        return make_plan(shape, shared=SHARED[90], **options)
    except Unsuited:  # x of many wide rows
        reject()


@settings(max_examples=60, derandomize=True)
@given(plans(), st.data())
def test_any_shape_on_any_device(made: Plan, data: st.DataObject) -> None:
    """Whatever the depths of the rows, which say how many splits of an attention item have positions."""
    assert check(made) == []
    depths = st.lists(st.integers(1, made.splits), min_size=3 * made.rows, max_size=3 * made.rows)
    assert check(made, active=np.array(data.draw(depths)).reshape(3, made.rows)) == []


# --- mistakes ---------------------------------------------------------------------------------------------------------

# Few enough rows that some blocks have none in some phases; heads that several blocks share.
SHAPES = {
    "greedy": make_plan(replace(SMALL, kv_heads=4, heads=8), rows=2, multiprocessors=13, shared=SHARED[86], warps=2),
    "sampled": make_plan(replace(SMALL, layers=3), rows=3, multiprocessors=5, shared=SHARED[86], sampled=True),
    "fused": make_plan(SMALL, rows=2, multiprocessors=7, shared=SHARED[86], warps=2, fused_mlp=True),
    "by head": make_plan(
        replace(SMALL, kv_heads=3, heads=15, width=72),  # groups of three and two heads
        rows=2,
        multiprocessors=8,
        shared=SHARED[86],
        warps=2,
        fused_mlp=True,
        by_head=True,
        whole=True,
    ),
    "split by head": make_plan(
        replace(SMALL, format="q8_0", width=72),
        rows=2,
        multiprocessors=3,
        shared=SHARED[86],
        warps=2,
        by_head=True,
        down_parts=2,
    ),
    "idle": make_plan(replace(SMALL, layers=1, vocab=1600), rows=1, multiprocessors=170, shared=SHARED[90]),
}


def entries(made: Plan, *kinds: int) -> list[tuple[int, int]]:
    """(block, entry) of these kinds."""
    return [(block, at) for block, at in np.argwhere(np.isin(made.table[:, :, KIND], kinds)).tolist()]


def changed(made: Plan, *changes: tuple[int, int, int, int]) -> Plan:
    """With fields (block, entry, field, value) changed."""
    t = made.table.copy()
    for block, at, field, value in changes:
        t[block, at, field] = value
    return replace(made, table=t)


def set_all(made: Plan, field: int, value: Callable[[np.ndarray], int | None], *kinds: int) -> Iterator[Plan]:
    """One table for each entry of these kinds, with a field changed there."""
    for block, at in entries(made, *kinds):
        new = value(made.table[block, at])
        if new is not None:
            yield changed(made, (block, at, field, new))


STREAMING = (*PRODUCTS, MLP_UP, MLP_DOWN, GROUP_OUTPUT)
ANY = (*STREAMING, ATTEND, GROUP_ATTEND, SAMPLE, TOKEN)

SIGNALLING = (*PRODUCTS, MLP_DOWN, GROUP_OUTPUT, ATTEND, SAMPLE)


def needed_waits(made: Plan) -> list[tuple[int, int]]:
    """Entries whose wait nothing else makes up for: neither one before it in the block nor the block's own signals."""
    out = []
    for block, at in entries(made, *ANY):
        own = made.table[block]
        wait = own[at, WAIT]
        signals = int((own[:at, SIGNAL][own[:at, KIND] != ATTEND] == wait).sum())
        if wait >= 0 and not (own[:at, WAIT] == wait).any() and signals < made.arrivals[wait]:
            out.append((block, at))
    return out


def dropped_wait(made: Plan) -> Iterator[Plan]:
    yield from (changed(made, (*where, WAIT, -1)) for where in needed_waits(made))


def one_phase_too_early(made: Plan) -> Iterator[Plan]:
    """Waits for all arrivals of the phase before the right one."""
    shape = made.shape
    for block, at in needed_waits(made):
        kind, layer = int(made.table[block, at, KIND]), int(made.table[block, at, LAYER])
        earlier = {
            QKV: lambda layer: counter(shape, OUTPUT if made.own else GATE_UP, layer - 1),
            OUTPUT: lambda layer: counter(shape, QKV, layer, 0),
            GROUP_OUTPUT: lambda layer: counter(shape, QKV, layer, 0),
            GROUP_ATTEND: lambda layer: counter(shape, DOWN, layer - 1),
            GATE_UP: lambda layer: counter(shape, *((QKV, layer, 0) if made.whole else (ATTEND, layer))),
            MLP_UP: lambda layer: counter(shape, *((QKV, layer, 0) if made.whole else (ATTEND, layer))),
            DOWN: lambda layer: counter(shape, OUTPUT, layer),
            HEAD: lambda layer: counter(shape, OUTPUT if made.own else GATE_UP, shape.layers - 1),
            SAMPLE: lambda layer: counter(shape, DOWN, shape.layers - 1),
            TOKEN: lambda layer: counter(shape, HEAD if made.sampled else DOWN, 0),
        }
        if kind in earlier and (kind != GROUP_ATTEND or layer > 0):
            wrong = earlier[kind](layer)
            yield changed(made, (block, at, WAIT, wrong), (block, at, TARGET, int(made.arrivals[wrong])))


def another_layer(made: Plan) -> Iterator[Plan]:
    """Waits for the same phase of the layer before."""
    per = made.shape.kv_heads + 4
    for block, at in needed_waits(made):
        if made.table[block, at, LAYER] > 0:
            wait = int(made.table[block, at, WAIT]) - per
            if wait >= 0:
                yield changed(made, (block, at, WAIT, wait), (block, at, TARGET, int(made.arrivals[wait])))


def wrong_target(made: Plan) -> Iterator[Plan]:
    for by in (-1, 1):
        yield from set_all(made, TARGET, lambda e, by=by: int(e[TARGET]) + by if e[WAIT] >= 0 else None, *ANY)  # type: ignore[misc]


def dropped_signal(made: Plan) -> Iterator[Plan]:
    yield from set_all(made, SIGNAL, lambda e: -1 if e[SIGNAL] >= 0 else None, *SIGNALLING)


def wrong_signal(made: Plan) -> Iterator[Plan]:
    yield from set_all(made, SIGNAL, lambda e: (int(e[SIGNAL]) + 1) % len(made.arrivals), *SIGNALLING)


def lost_row(made: Plan) -> Iterator[Plan]:
    yield from set_all(made, COUNT, lambda e: int(e[COUNT]) - 1, *STREAMING)


def row_twice(made: Plan) -> Iterator[Plan]:
    yield from set_all(made, COUNT, lambda e: int(e[COUNT]) + 1, *STREAMING)
    yield from set_all(made, FIRST, lambda e: int(e[FIRST]) - 1 if e[FIRST] else None, *STREAMING)


def lost_entry(made: Plan) -> Iterator[Plan]:
    for block, at in entries(made, *ANY):
        t = made.table.copy()
        t[block, at:-1] = t[block, at + 1 :]
        yield replace(made, table=t)


def entry_twice(made: Plan) -> Iterator[Plan]:
    for block, at in entries(made, *ANY):
        t = np.concatenate([made.table, made.table[:, -1:]], axis=1)
        t[block, at + 1 :] = t[block, at:-1].copy()
        yield replace(made, table=t)


def swapped_entries(made: Plan) -> Iterator[Plan]:
    """Neighbours of which the second waits for the first too."""
    for block, at in entries(made, *ANY):
        first, second = made.table[block, at], made.table[block, at + 1]
        if second[KIND] != END and second[WAIT] >= 0 and first[SIGNAL] == second[WAIT]:
            t = made.table.copy()
            t[block, [at, at + 1]] = t[block, [at + 1, at]]
            yield replace(made, table=t)


def stages_off_by_one(made: Plan) -> Iterator[Plan]:
    for by in (-1, 1):
        yield from set_all(made, STAGES, lambda e, by=by: int(e[STAGES]) + by, *STREAMING)  # type: ignore[misc]


def another_split(made: Plan) -> Iterator[Plan]:
    """A split of an attention item twice and another one never, or of an item that there is not."""
    yield from set_all(made, FIRST, lambda e: (int(e[FIRST]) + 1) % made.items if made.items > 1 else None, ATTEND)
    yield from set_all(made, COUNT, lambda e: int(e[COUNT]) + 1, ATTEND)
    yield from set_all(made, FIRST, lambda e: (int(e[FIRST]) + 1) % (made.shape.kv_heads * made.parts), GROUP_ATTEND)


def another_keeps(made: Plan) -> Iterator[Plan]:
    """Nobody puts a head's new key and value into the cache, or two blocks do."""
    yield from set_all(made, COUNT, lambda e: ATTENDS + ATTENDS_AND_KEEPS - int(e[COUNT]), GROUP_ATTEND)


def another_layers_rows(made: Plan) -> Iterator[Plan]:
    layers = made.shape.layers
    kinds = (QKV, ATTEND, OUTPUT, GATE_UP, DOWN, MLP_UP, MLP_DOWN, GROUP_ATTEND, GROUP_OUTPUT)
    yield from set_all(made, LAYER, lambda e: (int(e[LAYER]) + 1) % max(layers, 2), *kinds)


def no_end(made: Plan) -> Iterator[Plan]:
    t = made.table[:, :-1]
    yield replace(made, table=t)


def another_ring(made: Plan) -> Iterator[Plan]:
    yield replace(made, stages=made.stages + 1)
    yield replace(made, stage_units=made.stage_units + 1)
    yield replace(made, stages=1)


FAULTS: dict[str, tuple[Callable[[Plan], Iterator[Plan]], set[str]]] = {
    "dropped wait": (dropped_wait, {"order"}),
    "wait one phase too early": (one_phase_too_early, {"order"}),
    "wait for another layer": (another_layer, {"order"}),
    "wrong target": (wrong_target, {"target"}),
    "dropped signal": (dropped_signal, {"target", "deadlock"}),
    "wrong signal": (wrong_signal, {"target", "deadlock", "overrun"}),
    "row lost": (lost_row, {"rows", "entry"}),
    "row twice": (row_twice, {"rows", "entry"}),
    "entry lost": (lost_entry, {"rows", "entry"}),
    "entry twice": (entry_twice, {"rows", "entry"}),
    "swapped entries": (swapped_entries, {"deadlock", "entry"}),
    "stage count off by one": (stages_off_by_one, {"ring"}),
    "another split": (another_split, {"rows", "entry"}),
    "another keeps": (another_keeps, {"rows"}),
    "another layer's rows": (another_layers_rows, {"rows", "entry"}),
    "no end": (no_end, {"entry"}),
    "another ring": (another_ring, {"ring"}),
}


NOT_THERE = {("wait for another layer", "idle")}  # it has only one layer
NOT_THERE |= {("another keeps", shape) for shape in SHAPES if not SHAPES[shape].whole}
WHERE = [(fault, shape) for fault in FAULTS for shape in SHAPES if (fault, shape) not in NOT_THERE]


@pytest.mark.parametrize("fault, shape", WHERE)
def test_every_fault_is_found(fault: str, shape: str) -> None:
    """Put into the table in each place where it can be, up to 24 of them."""
    make, kinds = FAULTS[fault]
    assert check(SHAPES[shape]) == []
    wrong = list(make(SHAPES[shape]))
    assert wrong
    for made in wrong[:: -(-len(wrong) // 24)]:
        found = {finding.kind for finding in check(made)}
        different = np.argwhere(made.table[:, : SHAPES[shape].entries] != SHAPES[shape].table[:, : made.entries])[:3]
        assert found & kinds, f"{fault} is not found at {different.tolist()}: {found}"


def test_a_buffer_that_is_not_double_is_found() -> None:
    """A block with nothing to do but rows of the head still reads candidates when others make the next ones."""
    idle = SHAPES["idle"]
    assert any("candidates" in finding.text for finding in check(idle, parities=1))
    assert check(idle, parities=2) == []


RING_FAULTS = {
    "a slot is free when all but one gave it back": (Ring(arrivals=1), "a stage is overwritten"),
    "the producer does not wait": (Ring(producer_waits=False), "a stage is overwritten"),
    "who needs nothing of a stage gives it back at once": (Ring(all_wait=False), "a stage is overwritten"),
    "always the same parity": (Ring(parity_flips=False), "a stage is read before it is there"),
}


@pytest.mark.parametrize("stages, warps", [(1, 2), (2, 3), (3, 2), (4, 2)])
def test_no_stage_of_the_ring_is_overwritten_or_read_early(stages: int, warps: int) -> None:
    assert check_ring(Ring(stages, warps, 3 * stages + 1)) == ()


@pytest.mark.parametrize("fault", RING_FAULTS)
def test_faults_of_the_ring_are_found(fault: str) -> None:
    ring, expected = RING_FAULTS[fault]
    assert any(finding.text.startswith(expected) for finding in check_ring(ring))


def test_a_finding_says_who_and_where() -> None:
    made = SHAPES["greedy"]
    (block, at) = entries(made, GATE_UP)[0]
    first = check(changed(made, (block, at, WAIT, -1)))[0]
    assert first.kind == "order"
    assert f"block {block} entry {at} (GATE_UP of layer 0, step 0) reads what" in first.text
    assert "(OUTPUT of layer 0, step 0) writes in x1: no order" in first.text
    made = changed(made, (block, at, TARGET, 99))
    told = [finding.text for finding in check(made)]
    assert any("waits for 99 arrivals on counter" in text for text in told)
    assert any("it stays at" in text for text in told)


def test_shared_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(Unsuited, match="8 rows of 4,864 values take"):
        make_plan(REAL["Qwen3-4B"], rows=8, multiprocessors=132, shared=SHARED[86])
    assert room.terms_of(5) == 3 and room.terms_of(6) == 2
