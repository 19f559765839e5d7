"""One run of a phase table's programs, and which entry comes before which in every run; see check.py.

events = Events(plan, steps=3)
deadlocks = list(events.run())
events.before(earlier, later)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.layout import ATTEND, COUNT, END, FIRST, KIND, LAYER, NAMES, SIGNAL, TARGET, WAIT
from finial.backends.cuda.mega.plan import Plan

MERGE = len(NAMES)  # of an attention item, by whoever finishes its last split
IDLE = MERGE + 1  # a split for which there are no positions: it waits, and does nothing else

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Finding:
    """What is wrong: `kind` is deadlock, target, overrun, order, rows, ring or entry."""

    kind: str
    text: str


def live_entries(plan: Plan) -> Mask:
    """Entries before a block's end."""
    live: Mask = np.logical_and.accumulate(plan.table[:, :, KIND] != END, axis=1)
    return live


class Events:
    """Every entry of every step, agent by agent, and what is known to come before it.

    Attributes, one number an event:
        agent: block, or blocks + item for who merges that item; order: 1, 2, … of its agent; at: entry of its block.
        kind, layer, first, count, wait, target, signal: of the table; an attention entry signals its item's ticket.
        clocks: int16 [events, agents]: so many events of each agent are over when this one begins, itself counted.
    """

    def __init__(self, plan: Plan, steps: int, active: Ints) -> None:
        """`active`: splits that have positions, 1 or more, [steps, rows]."""
        self.plan, self.steps = plan, steps
        shape, live = plan.shape, live_entries(plan)
        self.blocks, self.agents, self.real = plan.blocks, plan.blocks + plan.items, len(plan.arrivals)
        self.counters = self.real + shape.layers * plan.items
        block, at = np.nonzero(live)
        own = plan.table[block, at].astype(np.int64)
        attend = own[:, KIND] == ATTEND
        ticket = self.real + own[:, LAYER] * plan.items + own[:, FIRST]
        self._signals_of_splits = (ticket[attend] - self.real, own[attend, SIGNAL])
        own[attend, SIGNAL] = ticket[attend]
        merges = self._merges()
        entries = np.concatenate([own, merges])
        self._agent = np.concatenate([block, self.blocks + merges[:, FIRST]])
        self._at = np.concatenate([at, np.zeros(len(merges), np.int64)])
        lengths = np.bincount(self._agent, minlength=self.agents)
        # Events of an agent: its entries, then again for each further step.
        first = np.cumsum(lengths) - lengths
        which = np.argsort(self._agent, kind="stable")
        repeat = lengths * steps
        agent = np.repeat(np.arange(self.agents), repeat)
        self.starts = np.cumsum(repeat) - repeat
        order = np.arange(len(agent)) - np.repeat(self.starts, repeat)
        row = which[first[agent] + order % np.maximum(lengths[agent], 1)]
        self.agent, self.order, self.step = agent, order + 1, order // np.maximum(lengths[agent], 1)
        self.at = self._at[row]
        columns = entries[row]
        self.kind, self.layer, self.first, self.count = (columns[:, c] for c in (KIND, LAYER, FIRST, COUNT))
        self.wait, self.target, self.signal = (columns[:, c] for c in (WAIT, TARGET, SIGNAL))
        self.ends = self.starts + repeat
        self._idle(active)
        self.clocks = np.zeros((len(agent), self.agents), np.int16)

    def _idle(self, active: Ints) -> None:
        """Splits without positions take no part in an item, and who merges it waits for the others alone."""
        plan = self.plan
        self.wanted = (self.step + 1) * self.target
        row = self.first // (plan.parts * plan.shape.kv_heads)
        attend, merge = self.kind == ATTEND, self.kind == MERGE
        there = active[self.step, np.clip(row, 0, plan.rows - 1)]
        idle = attend & ((self.count & 0xFFFF) >= there)
        self.kind = np.where(idle, IDLE, self.kind)
        self.signal = np.where(idle, -1, self.signal)
        so_far = np.cumsum(active, axis=0)[self.step, np.clip(row, 0, plan.rows - 1)]
        self.wanted = np.where(merge, so_far, self.wanted)
        self.target = np.where(merge, there, self.target)

    def _merges(self) -> Ints:
        """Entries of who merges: of each layer one an item."""
        plan = self.plan
        out = np.zeros((plan.shape.layers * plan.items, layout.ENTRY), np.int64)
        layer, item = np.divmod(np.arange(len(out)), max(plan.items, 1))
        out[:, KIND], out[:, LAYER], out[:, FIRST], out[:, COUNT] = MERGE, layer, item, 1
        out[:, WAIT], out[:, TARGET] = self.real + np.arange(len(out)), plan.splits
        out[:, SIGNAL] = np.iinfo(np.int32).max
        # The last split to arrive signals; a split that says nothing there counts as who forgets it.
        np.minimum.at(out[:, SIGNAL], self._signals_of_splits[0], self._signals_of_splits[1])
        out[out[:, SIGNAL] == np.iinfo(np.int32).max, SIGNAL] = -1
        return out[np.argsort(out[:, FIRST], kind="stable")]

    def name(self, event: int) -> str:
        """For a finding."""
        agent, kind = int(self.agent[event]), int(self.kind[event])
        who = f"block {agent} entry {self.at[event]}" if agent < self.blocks else f"item {agent - self.blocks}"
        what = {MERGE: "MERGE", IDLE: "ATTEND"}.get(kind) or NAMES[kind]
        return f"{who} ({what} of layer {self.layer[event]}, step {self.step[event]})"

    def signals_agree(self) -> Iterator[Finding]:
        """Any split of an item may be the last."""
        ticket, signal = self._signals_of_splits
        low = np.full(self.counters - self.real, np.iinfo(np.int32).max)
        high = np.full(len(low), -2)
        np.minimum.at(low, ticket, signal)
        np.maximum.at(high, ticket, signal)
        for at in np.flatnonzero((high >= -1) & (low != high)).tolist():
            layer, item = divmod(at, self.plan.items)
            yield Finding("target", f"splits of item {item} of layer {layer} signal {low[at]} and {high[at]}")

    def targets(self) -> Iterator[Finding]:
        """A wait is for all arrivals of a step, no more and no less."""
        one = self.step == 0
        arrivals = np.bincount(self.signal[one & (self.signal >= 0)], minlength=self.counters)
        wrong = one & (self.wait >= 0) & (self.target != arrivals[self.wait])
        for event in np.flatnonzero(wrong).tolist():
            c = self.wait[event]
            yield Finding(
                "target",
                f"{self.name(event)} waits for {self.target[event]} arrivals on counter {c}, there are {arrivals[c]}",
            )

    def run(self) -> Iterator[Finding]:
        """All programs to their end, or to where nobody can go on; fills `clocks`."""
        value = np.zeros(self.counters, np.int64)
        known = np.zeros((self.steps, self.counters, self.agents), np.int16)  # what arrivals of a step bring
        now, clock = self.starts.copy(), np.zeros((self.agents, self.agents), np.int16)
        left = np.flatnonzero(now < self.ends)
        while len(left):
            event = now[left]
            wait, step = self.wait[event], self.step[event]
            ready = (wait < 0) | (value[wait] >= self.wanted[event])
            if not ready.any():
                break
            event, agent, wait, step = event[ready], left[ready], wait[ready], step[ready]
            own = clock[agent]
            waiting = wait >= 0
            own[waiting] = np.maximum(own[waiting], known[step[waiting], wait[waiting]])
            own[np.arange(len(agent)), agent] = self.order[event]
            clock[agent] = own
            self.clocks[event] = own
            signal = self.signal[event]
            sends = np.flatnonzero(signal >= 0)
            if len(sends):
                key = step[sends] * self.counters + signal[sends]
                sends = sends[np.argsort(key, kind="stable")]
                key = np.sort(key)
                begin = np.flatnonzero(np.diff(key, prepend=-1))
                brought = np.maximum.reduceat(own[sends], begin)
                steps, counters = np.divmod(key[begin], self.counters)
                known[steps, counters] = np.maximum(known[steps, counters], brought)
                np.add.at(value, signal[sends], 1)
            now[agent] += 1
            left = left[now[left] < self.ends[left]] if (now[agent] >= self.ends[agent]).any() else left
        for stuck in now[left].tolist():
            c = self.wait[stuck]
            yield Finding(
                "deadlock",
                f"{self.name(stuck)} waits for counter {c} to reach {self.wanted[stuck]}, it stays at {value[c]}",
            )

    def before(self, earlier: Ints, later: Ints) -> Mask:
        """Whether each event is over when the other one begins, or is the same."""
        over: Mask = self.clocks[later, self.agent[earlier]] >= self.order[earlier]
        return over

    def overruns(self) -> Iterator[Finding]:
        """An arrival of a step that may come while one of the step before is still out."""
        sends = np.flatnonzero(self.signal >= 0)
        last = np.zeros((self.steps, self.counters, self.agents), np.int16)
        np.maximum.at(last, (self.step[sends], self.signal[sends], self.agent[sends]), self.order[sends])
        later = sends[self.step[sends] > 0]
        for part in np.array_split(later, max(1, len(later) // 4096)):
            early = last[self.step[part] - 1, self.signal[part]] > self.clocks[part]
            for event in part[early.any(axis=1)].tolist():
                missing = last[self.step[event] - 1, self.signal[event]] > self.clocks[event]
                agent = int(np.flatnonzero(missing)[0])
                who = f"block {agent}" if agent < self.blocks else f"item {agent - self.blocks}"
                c = self.signal[event]
                yield Finding("overrun", f"{self.name(event)} may signal counter {c} before {who} of the step before")
