"""Which entries touch which cells of each buffer, and whether their order is the one that is needed; see check.py.

Knows what each kind of entry reads and writes.

    for access in accesses(plan, events, parities=2):
        findings += [*access.covered(events), *access.ordered(events)]
    findings += [*sums(events), *cache(plan, events)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.events import IDLE, MERGE, Events, Finding, Ints, Mask
from finial.backends.cuda.mega.layout import (
    ATTEND,
    ATTENDS_AND_KEEPS,
    DOWN,
    GATE_UP,
    GROUP_ATTEND,
    GROUP_OUTPUT,
    HEAD,
    MLP_DOWN,
    MLP_UP,
    NAMES,
    OUTPUT,
    QKV,
    SAMPLE,
    TOKEN,
)
from finial.backends.cuda.mega.plan import Plan


@dataclass
class Access:
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


def accesses(plan: Plan, events: Events, parities: int) -> list[Access]:
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
    ) -> Access:
        columns: list[Ints] = []
        for spans in (writes, reads):
            columns.append(np.concatenate([nothing, *(span.events for span in spans)]))
            columns.append(np.concatenate([nothing, *(versions[span.events] + span.offset for span in spans)]))
            columns.append(np.concatenate([nothing, *(span.begin for span in spans)]))
            columns.append(np.concatenate([nothing, *(span.end for span in spans)]))
        w, wv, wb, we, r, rv, rb, re = columns
        known = rv >= 0  # before the first version there is only what the host put there
        return Access(buffer, cells, w, wv, wb, we, r[known], rv[known], rb[known], re[known], gaps, not ordered)

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


def sums(events: Events) -> Iterator[Finding]:
    """What blocks add to a buffer is all there when anybody reads it, and they begin when nobody reads it as it was.

    Among each other additions have no order; what they are added to is a write like others, see `accesses`.
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


def cache(plan: Plan, events: Events) -> Iterator[Finding]:
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
