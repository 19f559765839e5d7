"""Proves the ring of stages: no stage is overwritten before all warps let go of it, none is read before it is there.

Every order of events is tried, on a small ring: a warp that copies, warps that wait for a stage, use it and give it
back, copies that land in any order, and barriers of which only the parity of the phase can be seen (PTX ISA,
mbarrier.test_wait.parity).  Slots know nothing of each other, so that a longer ring has no other mistakes.

    findings = check_ring()    # [] is the proof
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from finial.backends.cuda.mega.events import Finding


@dataclass(frozen=True)
class Ring:
    """The protocol of kernels/cuda/ring.cuh, and what may be wrong with one.

    Attributes:
        stages: slots; warps: that work; length: stages that go through.
        arrivals: on a slot's barrier that end a use; None: one a warp.
        producer_waits: for an empty slot before it copies.
        all_wait: also for stages of which a warp needs nothing; False: the last warp needs nothing and does not wait.
        parity_flips: the parity that is waited for changes from use to use.
    """

    stages: int = 3
    warps: int = 2
    length: int = 10
    arrivals: int | None = None
    producer_waits: bool = True
    all_wait: bool = True
    parity_flips: bool = True


# Stages issued, which of them have landed (a bit each), and of each warp 2 · its stage, + 1 while it uses it.
_State = tuple[int, int, tuple[int, ...]]


@functools.cache
def check_ring(ring: Ring | None = None) -> tuple[Finding, ...]:
    """What can go wrong; nothing is the proof."""
    ring = ring or Ring()
    start: _State = (0, 0, (0,) * ring.warps)
    seen, todo, found = {start}, [start], {}
    while todo:
        state = todo.pop()
        moves = list(_moves(ring, state))
        if not moves and not (state[0] == ring.length and all(w == 2 * ring.length for w in state[2])):
            found["nobody can go on"] = state
        for wrong, after in moves:
            if wrong:
                found[wrong] = state
            elif after not in seen:
                seen.add(after)
                todo.append(after)
    return tuple(
        Finding("ring", f"{wrong}: {state[0]} stages issued, warps at {[w // 2 for w in state[2]]}")
        for wrong, state in found.items()
    )


def _moves(ring: Ring, state: _State) -> Iterator[tuple[str, _State]]:
    issued, landed, warps = state
    given_back = [(w // 2) for w in warps]  # by each warp, so many stages
    # The copying warp.
    if issued < ring.length:
        slot, use = issued % ring.stages, issued // ring.stages
        arrivals = sum(max(0, -(-(count - slot) // ring.stages)) for count in given_back)
        free = use == 0 or not ring.producer_waits or _passed(ring, arrivals // (ring.arrivals or ring.warps), use - 1)
        if free:
            wrong = any(count <= issued - ring.stages for count in given_back)
            yield "a stage is overwritten" if wrong else "", (issued + 1, landed, warps)
    # Copies on their way.
    for stage in range(max(0, issued - 2 * ring.stages), issued):
        if not landed >> stage & 1:
            yield "", (issued, landed | 1 << stage, warps)
    # Warps that work.
    for number, at in enumerate(warps):
        stage, using = divmod(at, 2)
        if stage == ring.length:
            continue
        if not using:
            slot, use = stage % ring.stages, stage // ring.stages
            there = sum(landed >> s & 1 for s in range(slot, issued, ring.stages))
            idle = not ring.all_wait and number == ring.warps - 1
            if not idle and not _passed(ring, there, use):
                continue
            if not idle and not (stage < issued and landed >> stage & 1):
                yield "a stage is read before it is there", state
                continue
        after = (*warps[:number], at + 1, *warps[number + 1 :])
        yield "", (issued, landed, after if not ring.all_wait else tuple(sorted(after)))


def _passed(ring: Ring, phases: int, use: int) -> bool:
    """Whether a wait for the end of phase `use` goes on, of which only the parity is seen; so many have ended."""
    return (phases & 1) != ((use & 1) if ring.parity_flips else 0)
