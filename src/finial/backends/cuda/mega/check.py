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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.events import IDLE, MERGE, Events, Finding, Ints, Mask, live_entries
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
    QKV,
    SAMPLE,
    SIGNAL,
    STAGES,
    TOKEN,
    UNIT_BYTES,
    WAIT,
)
from finial.backends.cuda.mega.ring_check import check_ring
from finial.backends.cuda.mega.table import Plan

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
    accesses = _accesses(plan, events, parities)
    findings += [f for access in accesses for f in _most(access.covered(events))]
    if any(finding.kind in ("deadlock", "target") for finding in findings):
        return findings  # clocks say nothing about a run that did not end, or that may have gone on too early
    findings += _most(events.overruns())
    findings += [finding for access in accesses for finding in _most(access.ordered(events))]
    findings += _most(_cache(plan, events))
    findings += _most(_sums(events))
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


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class _Access:
    """A buffer in cells, of which each version is written once and then read.

    Attributes:
        writes, reads: events; versions: of each, 0, 1, …; begin, end: cells of each.
        gaps: a version need not write all cells.  without_order: it is no memory, only something to be done once.
    """

    buffer: str
    cells: int
    writes: Ints
    write_versions: Ints
    write_begin: Ints
    write_end: Ints
    reads: Ints
    read_versions: Ints
    read_begin: Ints
    read_end: Ints
    gaps: bool = False
    without_order: bool = False

    def covered(self, events: Events) -> Iterator[Finding]:
        """Each cell once in each version."""
        if self.gaps:
            return
        versions = int(self.write_versions.max(initial=-1)) + 1
        edges = np.zeros((versions, self.cells + 1), np.int64)
        np.add.at(edges, (self.write_versions, self.write_begin), 1)
        np.add.at(edges, (self.write_versions, self.write_end), -1)
        times = np.cumsum(edges, axis=1)[:, : self.cells]
        if versions == 0 and self.cells:
            yield Finding("rows", f"{self.buffer} is never written")
        for version, cell in np.argwhere(times != 1).tolist():
            here = (self.write_versions == version) & (self.write_begin <= cell) & (self.write_end > cell)
            who = ", ".join(events.name(event) for event in self.writes[here].tolist()) or "nobody"
            yield Finding("rows", f"{self.buffer}[{cell}] is written {times[version, cell]} times: by {who}")

    def ordered(self, events: Events) -> Iterator[Finding]:
        """Reads after the writes of their version, writes after all that looks at the version before."""
        versions = int(self.write_versions.max(initial=-1)) + 1
        if self.without_order or versions == 0:
            return
        writer = np.full((versions, self.cells), -1)
        for event, version, cell in self._pairs(
            self.writes, self.write_versions, self.write_begin, self.write_end, np.ones(len(self.writes), bool)
        ):
            writer[version, cell] = event
        following = writer.copy()  # who writes next, this version's writer where there is one
        for at in range(versions - 2, -1, -1):
            following[at] = np.where(writer[at] < 0, following[at + 1], writer[at])
        whole = (self.read_begin == 0) & (self.read_end == self.cells) & (not self.gaps)
        yield from self._whole_reads(events, writer, np.flatnonzero(whole))
        for reads, version, cell in self._pairs(self.reads, self.read_versions, self.read_begin, self.read_end, ~whole):
            yield from self._order(events, writer[version, cell], reads, cell, "reads what", "writes")
            more = version + 1 < versions
            after = following[version[more] + 1, cell[more]]
            yield from self._order(events, reads[more], after, cell[more], "overwrites what", "reads")
        if versions > 1:
            cell = np.tile(np.arange(self.cells), versions - 1)
            before, after = writer[:-1].reshape(-1), following[1:].reshape(-1)
            yield from self._order(events, before, after, cell, "overwrites what", "writes")

    def _whole_reads(self, events: Events, writer: Ints, reads: Ints) -> Iterator[Finding]:
        """By the last event of each agent instead of by pairs."""
        for version in range(len(writer)):
            here = self.reads[reads[self.read_versions[reads] == version]]
            for earlier, later, does, to in (
                (np.unique(writer[version]), here, "reads what", "writes"),
                (
                    here,
                    np.unique(writer[version + 1]) if version + 1 < len(writer) else here[:0],
                    "overwrites what",
                    "reads",
                ),
            ):
                earlier, later = earlier[earlier >= 0], later[later >= 0]
                if not len(earlier) or not len(later):
                    continue
                need = np.zeros(events.agents, np.int16)
                np.maximum.at(need, events.agent[earlier], events.order[earlier].astype(np.int16))
                for event in later[(events.clocks[later] < need).any(axis=1)].tolist():
                    same = np.full(len(earlier), event)
                    cells = np.full(len(earlier), -1)
                    yield from self._order(events, earlier, same, cells, does, to)

    def _order(self, events: Events, earlier: Ints, later: Ints, cell: Ints, does: str, to: str) -> Iterator[Finding]:
        bad = np.flatnonzero((earlier >= 0) & (later >= 0) & ~events.before(earlier, later))
        for at in bad.tolist():
            where = f"{self.buffer}[{cell[at]}]" if cell[at] >= 0 else self.buffer
            yield Finding(
                "order",
                f"{events.name(int(later[at]))} {does} {events.name(int(earlier[at]))} {to} in {where}: no order",
            )

    @staticmethod
    def _pairs(who: Ints, versions: Ints, begin: Ints, end: Ints, mask: Mask) -> Iterator[tuple[Ints, Ints, Ints]]:
        """(event, version, cell) of each cell that each event touches, some at a time."""
        chosen = np.flatnonzero(mask)
        for part in np.array_split(chosen, max(1, len(chosen) // 4096)):
            size = end[part] - begin[part]
            at = np.repeat(part, size)
            cell = np.arange(len(at)) - np.repeat(np.cumsum(size) - size, size) + begin[at]
            yield who[at], versions[at], cell


def _accesses(plan: Plan, events: Events, parities: int) -> list[_Access]:
    """Who writes and reads which cells of each buffer; `cells` are row groups, items or blocks."""
    shape, e = plan.shape, events
    version = e.step * shape.layers + e.layer
    of = {kind: np.flatnonzero(e.kind == kind) for kind in (*range(len(NAMES)), MERGE, IDLE)}
    per_head = layout.groups_of(shape, QKV) // shape.kv_heads
    head = e.first // plan.parts % shape.kv_heads
    split = e.count & 0xFFFF
    nothing = np.zeros(0, np.int64)

    def access(
        buffer: str,
        cells: int,
        writes: list[_Span],
        reads: list[_Span],
        versions: Ints = version,
        *,
        gaps: bool = False,
        ordered: bool = True,
    ) -> _Access:
        columns: list[Ints] = []
        for spans in (writes, reads):
            columns.append(np.concatenate([nothing, *(span.events for span in spans)]))
            columns.append(np.concatenate([nothing, *(versions[span.events] + span.offset for span in spans)]))
            columns.append(np.concatenate([nothing, *(span.begin for span in spans)]))
            columns.append(np.concatenate([nothing, *(span.end for span in spans)]))
        w, wv, wb, we, r, rv, rb, re = columns
        known = rv >= 0  # before the first version there is only what the host put there
        return _Access(buffer, cells, w, wv, wb, we, r[known], rv[known], rb[known], re[known], gaps, not ordered)

    def own(kind: int, offset: int = 0, where: Callable[[Ints], Mask] | None = None) -> _Span:
        chosen = of[kind] if where is None else of[kind][where(of[kind])]
        return _Span(chosen, e.first[chosen], e.first[chosen] + e.count[chosen], offset)

    def whole(kind: int, cells: int, offset: int = 0, where: Callable[[Ints], Mask] | None = None) -> _Span:
        chosen = of[kind] if where is None else of[kind][where(of[kind])]
        return _Span(chosen, np.zeros(len(chosen), np.int64), np.full(len(chosen), cells), offset)

    def later_layers(chosen: Ints) -> Mask:
        return np.asarray(e.layer[chosen] > 0)

    width, gated = layout.groups_of(shape, DOWN), layout.groups_of(shape, GATE_UP)
    qkv_groups = layout.groups_of(shape, QKV)
    parts = plan.down_parts

    def rows_of_down() -> _Span:
        return _Span(of[DOWN], e.first[of[DOWN]] % width, e.first[of[DOWN]] % width + e.count[of[DOWN]])

    def residual_of(kind: int) -> list[_Span]:  # all parts of the rows that the entry's residual is
        chosen = of[kind][later_layers(of[kind])]
        begin = e.first[chosen]
        return [
            _Span(chosen, begin + part * width, begin + part * width + e.count[chosen], -1) for part in range(parts)
        ]

    attend, merge, idle = of[ATTEND], of[MERGE], of[IDLE]
    at_split, idle_split = (e.first[which] * plan.splits + split[which] for which in (attend, idle))
    items = plan.items
    alone = of[GROUP_ATTEND]
    of_alone = e.first[alone] // plan.parts
    keeping = alone[e.count[alone] == ATTENDS_AND_KEEPS]
    kept = e.first[keeping] // plan.parts
    if plan.by_head:  # the residual is copied by who has rows of QKV, blocks add to it, and then it is read
        residual = [
            access(
                "x1",
                qkv_groups,
                [own(QKV)],
                [whole(kind, qkv_groups) for kind in (GROUP_OUTPUT, GATE_UP, MLP_UP, DOWN)],
            ),
            access("columns by row groups", layout.head_groups(shape) * width, [own(GROUP_OUTPUT)], [], ordered=False),
        ]
        if plan.own:  # x0 is added to in place, and begins anew in the first layer

            def first_layer(chosen: Ints) -> Mask:
                return np.asarray(e.layer[chosen] == 0)

            adding = [whole(kind, qkv_groups, 0, first_layer) for kind in (GROUP_OUTPUT, MLP_DOWN)]
            last = [whole(HEAD, qkv_groups), whole(QKV, qkv_groups, 0, later_layers)]
            residual.append(access("x0", qkv_groups, [own(QKV, 0, first_layer)], [*adding, *last], e.step))
        else:
            reads = [whole(QKV, width * parts, -1, later_layers), whole(HEAD, width * parts, shape.layers - 1)]
            residual.append(access("x0", width * parts, [own(DOWN)], reads))
    else:
        residual = [
            access(
                "x0",
                width * parts,
                # With gate·up and down in one phase the residual is put there first, and blocks add to it.
                [own(OUTPUT if plan.own else DOWN)],
                [
                    whole(QKV, width * parts, -1, later_layers),
                    *residual_of(OUTPUT),
                    whole(HEAD, width * parts, shape.layers - 1),
                    whole(MLP_DOWN, width * parts),
                ],
            ),
            access("x1", width, [own(OUTPUT)], [whole(GATE_UP, width), whole(MLP_UP, width), rows_of_down()]),
        ]
    if plan.whole:
        residual.append(access("new keys and values", shape.kv_heads, [_Span(keeping, kept, kept + 1)], [], gaps=False))
    else:
        residual += [
            access("tickets", items, [own(MERGE)], [_Span(attend, e.first[attend], e.first[attend] + 1, -1)]),
            access("attn", items, [own(MERGE)], [whole(OUTPUT, items), whole(GROUP_OUTPUT, items)]),
        ]
    made = [
        *residual,
        access(
            "qkv",
            qkv_groups,
            [own(QKV)],
            [
                _Span(attend, head[attend] * per_head, (head[attend] + 1) * per_head),
                _Span(alone, of_alone * per_head, (of_alone + 1) * per_head),
            ],
        ),
        access(
            "parts",
            items * plan.splits,
            [_Span(attend, at_split, at_split + 1)],
            [_Span(merge, e.first[merge] * plan.splits, e.first[merge] * plan.splits + e.target[merge])],
            gaps=True,
        ),
        access(
            "splits",
            items * plan.splits,
            [_Span(attend, at_split, at_split + 1), _Span(idle, idle_split, idle_split + 1)],
            [],
            ordered=False,
        ),
        access("act", gated, [own(MLP_UP if plan.own else GATE_UP)], [whole(DOWN, gated)], ordered=not plan.own),
        access("rows of the head", layout.groups_of(shape, HEAD), [own(HEAD)], [], e.step, ordered=False),
    ]
    blocks, again = plan.blocks, e.step // parities
    for parity in range(min(parities, events.steps)):

        def here(chosen: Ints, parity: int = parity) -> Mask:
            return np.asarray(e.step[chosen] % parities == parity)

        if plan.sampled:
            made.append(
                access(
                    f"tokens of parity {parity}",
                    plan.rows,
                    [own(SAMPLE, 0, here)],
                    [whole(TOKEN, plan.rows, 0, here)],
                    again,
                )
            )
        else:
            writes = of[HEAD][here(of[HEAD])]
            cells = e.agent[writes]
            made.append(
                access(
                    f"candidates of parity {parity}",
                    blocks,
                    [_Span(writes, cells, cells + 1)],
                    [whole(TOKEN, blocks, 0, here)],
                    again,
                )
            )
    if plan.sampled:
        groups = layout.groups_of(shape, HEAD)
        made.append(access("logits", groups, [own(HEAD)], [whole(SAMPLE, groups)], e.step))
    token = of[TOKEN]
    span = _Span(token, e.agent[token], e.agent[token] + 1)
    made.append(access("tokens known", blocks, [span], [], e.step, ordered=False))
    return made


def _sums(events: Events) -> Iterator[Finding]:
    """What blocks add to a buffer is all there when anybody reads it, and they begin when nobody reads it as it was.

    Among each other additions have no order; what they are added to is a write like others, see `_accesses`.
    """
    plan, kind = events.plan, events.kind
    layers = plan.shape.layers
    version = events.step * layers + events.layer  # what is added in a layer is what the next one reads
    if plan.by_head:
        adds, reads = np.flatnonzero(kind == GROUP_OUTPUT), np.flatnonzero(np.isin(kind, (GATE_UP, MLP_UP, DOWN)))
        yield from _added(events, "x1", adds, version[adds], reads, version[reads])
    if plan.own:
        adds = np.flatnonzero(np.isin(kind, (MLP_DOWN, GROUP_OUTPUT)))
        residual = (QKV,) if plan.by_head else (QKV, OUTPUT)
        reads = np.flatnonzero((np.isin(kind, residual) & (events.layer > 0)) | (kind == HEAD))
        wanted = version[reads] + np.where(kind[reads] == HEAD, layers, 0) - 1
        yield from _added(events, "x0", adds, version[adds], reads, wanted)


def _added(events: Events, buffer: str, adds: Ints, added: Ints, reads: Ints, wanted: Ints) -> Iterator[Finding]:
    """Reads of a version come after its additions, additions after the reads of the version before."""
    versions = int(max(added.max(initial=0), wanted.max(initial=0))) + 2
    for earlier, of, later, needed, does in (
        (adds, added, reads, wanted, "reads what {} adds to"),
        (reads, wanted + 1, adds, added, "adds to what {} reads in"),
    ):
        last = np.zeros((versions, events.agents), np.int16)
        np.maximum.at(last, (of, events.agent[earlier]), events.order[earlier].astype(np.int16))
        for event, needs in zip(later.tolist(), needed.tolist(), strict=True):
            missing = last[needs] > events.clocks[event]
            if missing.any():
                agent = int(np.flatnonzero(missing)[0])
                yield Finding("order", f"{events.name(event)} {does.format(f'block {agent}')} {buffer}: no order")


@dataclass(frozen=True)
class _Span:
    """Events with the cells that each touches, in the version of the event plus `offset`."""

    events: Ints
    begin: Ints
    end: Ints
    offset: int = 0


def _cache(plan: Plan, events: Events) -> Iterator[Finding]:
    """The new key and value are written by whichever split has the newest position, and read in all later steps."""
    heads = plan.rows * plan.shape.kv_heads
    attend = np.flatnonzero(events.kind == ATTEND)
    cell = events.layer[attend] * heads + events.first[attend] // plan.parts
    writes = np.ones(len(attend), bool)
    if plan.whole:  # of all rows; one block of a head's writes
        attend = np.flatnonzero(events.kind == GROUP_ATTEND)
        cell = events.layer[attend] * heads + events.first[attend] // plan.parts
        writes = events.count[attend] == ATTENDS_AND_KEEPS
    wrote, where = attend[writes], cell[writes]
    last = np.zeros((events.steps, plan.shape.layers * heads, events.agents), np.int16)
    np.maximum.at(last, (events.step[wrote], where, events.agent[wrote]), events.order[wrote].astype(np.int16))
    later = events.step[attend] > 0
    for event, where in zip(attend[later].tolist(), cell[later].tolist(), strict=True):
        missing = last[events.step[event] - 1, where] > events.clocks[event]
        if missing.any():
            agent = int(np.flatnonzero(missing)[0])
            layer, row = divmod(where, heads)
            yield Finding(
                "order",
                f"{events.name(event)} reads what block {agent} writes in the step before in the cache of layer "
                f"{layer}, row {row // plan.shape.kv_heads}, head {row % plan.shape.kv_heads}: no order",
            )
