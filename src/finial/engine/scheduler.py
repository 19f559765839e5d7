"""Who computes what in the next step: admission, chunked prefill, decode, preemption.

Integers and queues; knows nothing of arrays, logits, text or time.

    scheduler = Scheduler(PagePool(64, 16), max_batch=8, max_step_tokens=256, max_context=1024)
    scheduler.add(Sequence([1, 2, 3], max_new=5))
    plan = scheduler.schedule()          # chunks; compute their rows, then scheduler.advance(plan)

Order of a step: one row for each sequence that only lacks its newest token (decode), then chunks of prompts that
are being prefilled, oldest first, then new sequences in the order of arrival.  Decode rows are never refused for
lack of room in a step, so a long prompt does not stall those who are already generating; a prompt that does not end in
a step leaves half of its room to those behind it.  Owners of waiting sequences take turns.  When pages run out the
youngest sequence gives its pages back and goes to the front of the queue; it recomputes later (preemption by
recompute, as in vLLM, Kwon et al. 2023, arXiv:2309.06180, 4.5).  The oldest sequence is therefore never preempted,
and as `add` refuses what cannot fit alone, every sequence ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from finial.engine.kvcache import ROOT, PagePool
from finial.engine.queue import FairQueue
from finial.errors import RequestError


class Sequence:
    """One sequence of tokens on its way through the cache.

    Attributes:
        tokens: prompt and what was generated; the only copy.
        owner: whose it is; owners take turns.
        computed: how many positions, from 0, have their keys and values in the cache.
        wanted_from: the first position whose logits nobody has had yet.
        pool_from: the first position whose hidden state is wanted, and no logits at all; None: none is.
        pages: page numbers, in order of position; only ever appended to, a new object after pages were given back.
    """

    __slots__ = (
        "all_logits",
        "chain",
        "computed",
        "max_new",
        "owner",
        "pages",
        "pool_from",
        "preempted",
        "prompt_length",
        "registered",
        "reused",
        "tokens",
        "wanted_from",
    )

    def __init__(
        self,
        tokens: list[int],
        max_new: int,
        *,
        all_logits: bool = False,
        pool_from: int | None = None,
        owner: str = "",
    ) -> None:
        self.tokens = tokens
        self.prompt_length = len(tokens)
        self.max_new = max_new
        self.owner = owner
        self.all_logits = all_logits
        self.pool_from = pool_from
        self.wanted_from = 0 if all_logits else len(tokens) - 1
        if pool_from is not None:
            self.wanted_from = len(tokens)
        self.computed = 0
        self.pages = array("i")
        self.registered = 0  # how many of its pages were offered to the prefix cache
        self.chain = ROOT  # serial of the last of those
        self.reused = 0  # positions found in the cache when it was admitted first
        self.preempted = 0


class Chunk(NamedTuple):
    """Rows for positions start .. stop-1; logits are wanted from position `wanted` on (none when wanted == stop)."""

    sequence: Sequence
    start: int
    stop: int
    wanted: int


class Scheduler:
    """Continuous batching over one page pool.

    Args:
        max_batch: sequences that may hold pages at the same time.
        max_step_tokens: rows of a step, at least max_batch.
        max_context: positions of one sequence, prompt and generated together.
        max_logit_rows: rows of one chunk when the logits of all of them are wanted (bounds the memory of the result).
        cache: False recomputes every sequence from position 0 for each new token.

    Attributes:
        prompt_rows: rows of prompts at most in a step that also decodes; may change at any time.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_batch: int,
        max_step_tokens: int,
        max_context: int,
        max_logit_rows: int = 64,
        cache: bool = True,
    ) -> None:
        assert 0 < max_batch <= max_step_tokens and max_context > 0 and max_logit_rows > 0
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.max_context = max_context
        self.max_logit_rows = max_logit_rows
        self.cache = cache
        self.prompt_rows = max_step_tokens
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []  # in order of arrival
        self._blocked: tuple[Sequence, int, int] | None = None

    @property
    def busy(self) -> bool:
        """Whether any sequence is running or waiting."""
        return bool(self.running or self.waiting)

    def check_length(self, prompt: int, max_new: int) -> None:
        """Raises RequestError when prompt + max_new positions fit neither the context nor the cache."""
        total = prompt + max_new
        if total > self.max_context:
            room = self.max_context - prompt
            raise RequestError(
                f"{prompt} prompt tokens + {max_new} new tokens = {total}, over the context of {self.max_context}",
                fix=f"ask for max_tokens={room} or less" if room > 0 else "shorten the prompt or raise max_context",
            )
        need, have = self.pool.pages_for(max(prompt, total - 1)), self.pool.pages
        if need > have:
            size = self.pool.page_size
            raise RequestError(
                f"{prompt} prompt + {max_new} new tokens need {need * size} cache positions, there are {have * size}",
                fix="shorten the prompt, ask for fewer tokens, or give the cache more memory",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError when it could never run."""
        self.check_length(sequence.prompt_length, sequence.max_new)
        self.waiting.append(sequence, sequence.owner)

    def schedule(self) -> list[Chunk]:
        """The rows of the next step; empty when there is nothing to do.

        Pages for every row are held, and full pages are already offered for reuse: a sequence admitted in the same
        step may share them, because each layer writes all rows of a step before it attends.
        """
        budget = self.max_step_tokens
        plan: dict[Sequence, Chunk] = {}
        prefilling = False
        running = self.running
        i = 0
        while i < len(running):
            sequence = running[i]
            i += 1
            length = len(sequence.tokens)
            start = sequence.computed
            if length - start != 1:
                prefilling = True
            elif self._hold(sequence, length, plan):
                plan[sequence] = Chunk(sequence, start, length, sequence.wanted_from)
                budget -= 1
        if plan:
            budget = min(budget, self.prompt_rows)
        if prefilling:
            i = 0
            while i < len(running) and budget > 0:
                sequence = running[i]
                i += 1
                if len(sequence.tokens) - sequence.computed > 1:
                    chunk = self._chunk(sequence, self._share(sequence, budget, i))
                    if self._hold(sequence, chunk.stop, plan):
                        plan[sequence] = chunk
                        budget -= chunk.stop - chunk.start
        for chunk in plan.values():
            self._register(chunk)
        while self.waiting and budget > 0 and len(running) < self.max_batch:
            admitted = self._admit(budget)
            if admitted is None:
                break
            plan[admitted.sequence] = admitted
            budget -= admitted.stop - admitted.start
        return list(plan.values())

    def advance(self, plan: list[Chunk]) -> None:
        """The rows of `plan` are computed."""
        for sequence, _, stop, _ in plan:
            sequence.computed = stop

    @property
    def admits(self) -> bool:
        """Whether somebody waits and there is a place beside those who run; pages may be missing."""
        return bool(self.waiting) and len(self.running) < self.max_batch

    def reserve(self, sequences: list[Sequence], left: list[int], steps: int) -> int:
        """Pages for the positions that so many decode steps write, or as many as there are pages for.

        Nobody is preempted for it; what is not used goes back with `trim`.

        Args:
            left: how many steps each sequence takes part in at most.
        Returns:
            steps there are pages for; 0 when there are none beyond what the sequences hold.
        """

        def missing(sequence: Sequence, most: int) -> int:
            reached = len(sequence.tokens) + min(most, steps) - 1
            return max(0, self.pool.pages_for(reached) - len(sequence.pages))

        while steps and sum(map(missing, sequences, left)) > self.pool.available:
            steps //= 2
        for sequence, most in zip(sequences, left, strict=True) if steps else ():
            for _ in range(missing(sequence, most)):
                sequence.pages.append(self.pool.allocate(sequence.pages[-1] if sequence.pages else None))
        return steps

    def ran(self, sequence: Sequence) -> None:
        """All tokens that a sequence has are computed, by a step that was not planned here."""
        start, sequence.computed = sequence.computed, len(sequence.tokens)
        self._register(Chunk(sequence, start, sequence.computed, sequence.computed))

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages beyond its tokens; nothing when it does not run."""
        keep = self.pool.pages_for(len(sequence.tokens))
        if sequence in self.running and len(sequence.pages) > keep:
            surplus, sequence.pages = sequence.pages[keep:], sequence.pages[:keep]
            self.pool.release(surplus)

    def append(self, sequence: Sequence, token: int) -> None:
        """A new token at the end of a sequence whose positions are all computed."""
        sequence.wanted_from = len(sequence.tokens)
        sequence.tokens.append(token)
        if not self.cache:
            sequence.computed = 0

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take a sequence out, wherever it is; its pages go back.  A second call does nothing.

        Args:
            forget: do not share its pages with later sequences (their contents are suspect).
        """
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence, forget=forget)
        elif self.waiting.remove(sequence):
            self._blocked = None

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """All pages are free, nothing is cached, and `sequences` wait in this order: for when a step was torn apart."""
        self.pool.clear()
        self.running.clear()
        self.waiting.clear()
        self._blocked = None
        for sequence in sequences:
            self._reset(sequence)
            self.waiting.append(sequence, sequence.owner)

    def _share(self, sequence: Sequence, budget: int, behind: int) -> int:
        """Rows that a prompt may have: half of what there is when it does not end with all and somebody is behind it.

        Args:
            behind: where those begin in `running` that came later.
        """
        if len(sequence.tokens) - sequence.computed <= budget:
            return budget
        others = any(len(s.tokens) - s.computed > 1 for s in self.running[behind:])
        admissible = self.waiting and self._blocked is None and len(self.running) < self.max_batch
        return max(1, budget // 2) if others or admissible else budget

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start, length = sequence.computed, len(sequence.tokens)
        rows = min(budget, length - start)
        if sequence.wanted_from < length - 1:
            rows = min(rows, self.max_logit_rows + max(0, sequence.wanted_from - start))
        stop = start + rows
        return Chunk(sequence, start, stop, min(max(start, sequence.wanted_from), stop))

    def _hold(self, sequence: Sequence, stop: int, plan: dict[Sequence, Chunk]) -> bool:
        """Pages for the positions below `stop`; False when it was preempted itself."""
        need = self.pool.pages_for(stop) - len(sequence.pages)
        while need > self.pool.available:
            victim = self.running.pop()
            plan.pop(victim, None)
            victim.preempted += 1
            self._give_back(victim)
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        for _ in range(need):
            sequence.pages.append(self.pool.allocate(sequence.pages[-1] if sequence.pages else None))
        return True

    def _admit(self, budget: int) -> Chunk | None:
        """The first chunk of the sequence at the front of the queue, or None while its pages are missing.

        All of its present tokens and one more must fit beside what the prompts that are being prefilled still
        need; otherwise it would be the first to be preempted.
        """
        sequence = self.waiting[0]
        state = (sequence, self.pool.releases, len(self.running))
        if state == self._blocked:
            return None
        limit = min(len(sequence.tokens) - 1, sequence.wanted_from) if self.cache else 0
        if sequence.pool_from is not None:
            limit = min(limit, sequence.pool_from)
        pages, chain = self.pool.match(sequence.tokens, limit)
        positions = min(len(sequence.tokens) + 1, sequence.prompt_length + max(sequence.max_new - 1, 0))
        need = self.pool.pages_for(max(positions, len(sequence.tokens))) - len(pages) + self.pool.idle_among(pages)
        owed = sum(max(0, self.pool.pages_for(len(other.tokens)) - len(other.pages)) for other in self.running)
        if need + owed > self.pool.available:
            assert self.running, "a sequence that fits alone was refused"
            self._blocked = state
            return None
        self._blocked = None
        self.waiting.popleft()
        self.pool.acquire(pages)
        sequence.pages.extend(pages)
        sequence.registered, sequence.chain = len(pages), chain
        sequence.computed = len(pages) * self.pool.page_size
        if not sequence.preempted:
            sequence.reused = sequence.computed
        self.running.append(sequence)
        chunk = self._chunk(sequence, self._share(sequence, budget, len(self.running)))
        for _ in range(self.pool.pages_for(chunk.stop) - len(sequence.pages)):
            sequence.pages.append(self.pool.allocate(sequence.pages[-1] if sequence.pages else None))
        self._register(chunk)
        return chunk

    def _register(self, chunk: Chunk) -> None:
        """Offer the pages that this chunk fills."""
        sequence, size = chunk.sequence, self.pool.page_size
        if not self.cache or not self.pool.reuse:
            return
        while (sequence.registered + 1) * size <= chunk.stop:
            first = sequence.registered * size
            page = sequence.pages[sequence.registered]
            sequence.chain = self.pool.register(page, sequence.chain, sequence.tokens[first : first + size])
            sequence.registered += 1

    def _give_back(self, sequence: Sequence, *, forget: bool = False) -> None:
        if forget:
            for page in sequence.pages:
                self.pool.forget(page)
        self.pool.release(sequence.pages)
        self._reset(sequence)

    def _reset(self, sequence: Sequence) -> None:
        sequence.pages = array("i")
        sequence.computed = sequence.registered = 0
        sequence.chain = ROOT
