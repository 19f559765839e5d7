"""Proves a phase table: nobody waits for ever, nobody reads what is not there yet or writes what is still wanted.

Blocks are programs of entries, each of which waits, reads, writes and signals; whoever merges the splits of an
attention item may be any block, so that each item is a program of its own here.  Waits are monotonic (a counter never
falls), so that one run of all programs tells whether any run ends.  Vector clocks (Fidge 1988; Mattern 1989) of that
run say which entries come before which whatever the timing: a wait for all arrivals of a step puts all of them before
it, provided that no arrival of the next step can come first, which is checked too, for a step on the ground of the one
before it.

Shown for a few steps in a row; each step has the same entries and waits, so that what holds between neighbours there
holds between all.  What is assumed of the kernel: entries of a block run in order and completely, a signal comes after
the entry's writes and a wait before its reads, with the fences that say so between multiprocessors.

    findings = check(plan)    # [] is the proof
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.events import Events, Finding, Ints, live_entries
from finial.backends.cuda.mega.layout import (
    ATTEND,
    ATTENDS,
    ATTENDS_AND_KEEPS,
    COUNT,
    DOWN,
    FIRST,
    GATE_UP,
    GROUP_ATTEND,
    GROUP_OUTPUT,
    HEAD,
    KIND,
    LAYER,
    MLP_DOWN,
    MLP_UP,
    NAMES,
    OUTPUT,
    PRODUCTS,
    SAMPLE,
    SIGNAL,
    STAGES,
    TOKEN,
    UNIT_BYTES,
    WAIT,
)
from finial.backends.cuda.mega.memory import accesses, cache, sums
from finial.backends.cuda.mega.plan import Plan
from finial.backends.cuda.mega.ring_check import check_ring

_MOST = 4  # findings of one kind that are told


def check(plan: Plan, *, steps: int = 3, parities: int = 2, active: Ints | None = None) -> list[Finding]:
    """What is wrong with a plan; nothing is the proof that its table works.

    Args:
        active: splits of an item that have positions, 1 to `plan.splits`, [steps, rows]: those beyond do nothing but
            wait.  None: all, and then one, with which nothing is ordered by way of the others.
        steps: that are looked at; a buffer of two parities is used again after two.
        parities: of the buffers between the end of a step and the next (candidates and tokens); the kernel has two.
    """
    findings = [*check_ring(), *_ring(plan)]
    malformed = list(_entries(plan))
    if malformed:
        return findings + malformed
    several = [np.full((steps, plan.rows), count) for count in dict.fromkeys((plan.splits, 1))]
    for there in several if active is None else [active]:
        findings += _run(plan, Events(plan, steps, there), parities)
        if findings:
            break
    return findings


def _run(plan: Plan, events: Events, parities: int) -> list[Finding]:
    findings = _most(events.signals_agree())
    findings += _most(events.targets())
    findings += _most(events.run())
    touched = accesses(plan, events, parities)
    findings += [f for access in touched for f in _most(access.covered(events))]
    if any(finding.kind in ("deadlock", "target") for finding in findings):
        return findings  # clocks say nothing about a run that did not end, or that may have gone on too early
    findings += _most(events.overruns())
    findings += [finding for access in touched for finding in _most(access.ordered(events))]
    findings += _most(cache(plan, events))
    findings += _most(sums(events))
    return findings


def _most(found: Iterator[Finding]) -> list[Finding]:
    return [finding for finding, _ in zip(found, range(_MOST), strict=False)]


# --- what one entry alone says ----------------------------------------------------------------------------------------


def _ring(plan: Plan) -> Iterator[Finding]:
    """What the producer brings is what workers take: by entry, by block, and in all."""
    t, sizes, slot = plan.table, plan.entry_bytes(), plan.stage_units * UNIT_BYTES[plan.shape.format]
    wanted = -(-sizes // slot)
    down = t[:, :, KIND] == MLP_DOWN
    if down.any():  # whole row groups of down, as many for each warp
        octets = np.maximum(t[down][:, COUNT], 1)
        at_once = slot // (octets * layout.octet_bytes(plan.shape)) // plan.warps * plan.warps
        wanted[down] = -(-layout.down_groups(plan.shape) // np.maximum(at_once, 1))
    for block, at in np.argwhere(t[:, :, STAGES] != wanted)[:_MOST].tolist():
        yield Finding(
            "ring",
            f"{_name(t, block, at)} has {sizes[block, at]} bytes, {wanted[block, at]} stages of up to {slot}, "
            f"the table says {t[block, at, STAGES]}",
        )
    if plan.stage_units % plan.warps or plan.stages < 2:
        yield Finding("ring", f"{plan.stages} stages of {plan.stage_units} units for {plan.warps} warps")
    if plan.shared.ring != plan.stages * slot or slot % 16:
        yield Finding("ring", f"{plan.stages} stages of {slot} bytes in {plan.shared.ring}")
    offsets, streams = plan.offsets().astype(np.int64), sizes.sum(axis=1)
    for block in np.flatnonzero((np.diff(offsets) < streams) | (offsets[:-1] % 16 != 0))[:_MOST].tolist():
        yield Finding("ring", f"the stream of block {block} has {streams[block]} bytes from {offsets[block]}")
    whole = sum(_matrix_bytes(plan, kind) for kind in PRODUCTS)
    if streams.sum() != whole:
        yield Finding("ring", f"streams have {streams.sum()} bytes, the matrices {whole}")


def _matrix_bytes(plan: Plan, kind: int) -> int:
    """Of all matrices of a kind, up to whole units or octets."""
    layers = 1 if kind == HEAD else plan.shape.layers
    if kind == OUTPUT and plan.by_head:
        groups = layout.groups_of(plan.shape, OUTPUT)
        each = layout.head_output_units(plan.shape, np.arange(layout.head_groups(plan.shape)) * groups)
        return layers * groups * int(each.sum()) * UNIT_BYTES[plan.shape.format]
    if kind == DOWN and plan.own:
        groups, octets = layout.down_groups(plan.shape), plan.shape.ffn // layout.ROWS
        return layers * groups * octets * layout.octet_bytes(plan.shape)
    units = layout.groups_of(plan.shape, kind) * layout.k_units(plan.shape, kind)
    return layers * units * UNIT_BYTES[plan.shape.format]


def _entries(plan: Plan) -> Iterator[Finding]:
    """Numbers outside what there is, which nothing below could look at."""
    t, shape = plan.table.astype(np.int64), plan.shape
    live = live_entries(plan)
    for block in np.flatnonzero(live.all(axis=1))[:_MOST].tolist():
        yield Finding("entry", f"the entries of block {block} have no end")
    kind, count = t[:, :, KIND], t[:, :, COUNT]
    most = np.zeros(len(NAMES) + 1, np.int64)
    for product in PRODUCTS:
        most[product] = layout.groups_of(shape, product)
    most[ATTEND], most[SAMPLE] = plan.items, plan.rows
    most[MLP_UP], most[MLP_DOWN] = most[GATE_UP], shape.ffn // layout.ROWS
    groups = layout.groups_of(shape, OUTPUT)
    most[GROUP_ATTEND] = layout.head_groups(shape)
    most[GROUP_OUTPUT] = most[GROUP_ATTEND] * groups
    most[DOWN] *= plan.down_parts
    size = np.where(np.isin(kind, (ATTEND, GROUP_ATTEND)), 1, count)
    bad = (kind < 0) | (kind >= len(NAMES)) | (t[:, :, LAYER] < 0) | (t[:, :, LAYER] >= shape.layers)
    bad |= (t[:, :, WAIT] >= len(plan.arrivals)) | (t[:, :, SIGNAL] >= len(plan.arrivals))
    limit = most[np.clip(kind, 0, len(NAMES))]
    bad |= (kind != TOKEN) & ((t[:, :, FIRST] < 0) | (size < 1) | (t[:, :, FIRST] + size > limit))
    bad |= (kind == ATTEND) & ((count >> 16 != plan.splits) | (count & 0xFFFF >= plan.splits))
    bad |= (kind == GROUP_ATTEND) & (count != ATTENDS) & (count != ATTENDS_AND_KEEPS)
    bad |= np.isin(kind, (GROUP_OUTPUT, DOWN)) & (t[:, :, FIRST] % groups + count > groups)
    bad |= np.isin(kind, (OUTPUT,) if plan.by_head else (GROUP_OUTPUT,))
    bad |= np.isin(kind, (ATTEND,) if plan.whole else (GROUP_ATTEND,))
    for block, at in np.argwhere(bad & live)[:_MOST].tolist():
        yield Finding("entry", f"{_name(plan.table, block, at)} is {t[block, at].tolist()}")
    # A block's own neurons are in its shared memory from one entry to the next.
    up, down = kind[:, :-1] == MLP_UP, kind[:, 1:] == MLP_DOWN
    after, before = t[:, 1:], t[:, :-1]
    same = (after[:, :, LAYER] == before[:, :, LAYER]) & (2 * after[:, :, FIRST] == before[:, :, FIRST])
    same &= 2 * after[:, :, COUNT] == before[:, :, COUNT]
    alone = (up | down) & ~(up & down & same) & live[:, :-1]
    for block, at in np.argwhere(alone)[:_MOST].tolist():
        yield Finding("entry", f"{_name(plan.table, block, at)} and the next one do not share their neurons")
    # Parts of down add to the rows of the part before, which is the entry before.
    further = (kind[:, 1:] == DOWN) & (after[:, :, FIRST] >= groups)
    same = (before[:, :, KIND] == DOWN) & (after[:, :, FIRST] == before[:, :, FIRST] + groups)
    same &= (after[:, :, LAYER] == before[:, :, LAYER]) & (after[:, :, COUNT] == before[:, :, COUNT])
    lost = further & ~same & live[:, 1:]
    for block, at in np.argwhere(lost)[:_MOST].tolist():
        yield Finding("entry", f"{_name(plan.table, block, at + 1)} does not go on with the part before it")
    if not plan.whole:
        return
    # And so is what it attended for; between the two nothing else is put there.
    attends, output = kind[:, :-1] == GROUP_ATTEND, kind[:, 1:] == GROUP_OUTPUT
    same = (after[:, :, LAYER] == before[:, :, LAYER]) & (after[:, :, FIRST] // groups == before[:, :, FIRST])
    alone = (attends | output) & ~(attends & output & same) & live[:, :-1]
    alone[:, 0] |= (kind[:, 0] == GROUP_OUTPUT) & live[:, 0]
    for block, at in np.argwhere(alone)[:_MOST].tolist():
        yield Finding("entry", f"{_name(plan.table, block, at)} and the next one do not share a head group")


def _name(t: NDArray[np.int32], block: int, at: int) -> str:
    kind, layer = int(t[block, at, KIND]), int(t[block, at, LAYER])
    name = NAMES[kind] if 0 <= kind < len(NAMES) else f"kind {kind}"
    return f"block {block} entry {at} ({name} of layer {layer})"
