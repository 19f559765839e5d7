"""Page numbers of the KV cache: who holds which page, and which full pages can be used again.

Integers only; knows nothing of arrays, models, or what a page contains beyond the token ids that filled it.

    pool = PagePool(pages=64, page_size=16)
    pages, chain = pool.match(tokens, limit=len(tokens) - 1)     # full pages whose prefix is already cached

A full page is remembered under (serial of the page before it, its own token ids), compared by content: two different
prefixes can never be taken for one another.  A serial is given once and never again, so when a page is forgotten, what
followed it can no longer be reached by mistake.  Only full pages are shared, and a full page is never written again,
so nothing is ever copied.  A sequence's pages follow each other where they can: a run of neighbours is memory that is
read in one go.  The idea of sharing whole pages is that of vLLM (Kwon et al. 2023, arXiv:2309.06180, 4.3).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0  # the serial before the first page of every sequence

RUN = 256  # positions whose pages are dealt out together: what the kernels of attention take at once

_Key = tuple[int, tuple[int, ...]]


class PagePool:
    """`pages` pages of `page_size` positions each, reference-counted.

    A page is in exactly one of three places: free; held (one or more references); or idle, which is cached and
    held by nobody.  Idle pages are evicted in least-recently-used order, when no page is free.

    Args:
        reuse: remember full pages, so that a later sequence with the same prefix finds them.
        max_idle: pages that nobody holds are remembered, at most so many; None: all.
    """

    def __init__(self, pages: int, page_size: int, *, reuse: bool = True, max_idle: int | None = None) -> None:
        assert pages > 0 and page_size > 0, (pages, page_size)
        self.pages = pages
        self.page_size = page_size
        self.reuse = reuse
        self.max_idle = pages if max_idle is None else max_idle
        self.releases = 0  # grows whenever pages may have become available: tells a queue when to look again
        self._next_serial = ROOT + 1
        self._run = max(1, RUN // page_size)  # pages
        self._free: dict[int, None] = {}  # freed last: last
        self._whole: dict[int, None] = {}  # runs of which all pages are free
        self._left: list[int] = []  # free pages of each run
        self._refs: list[int] = []
        self._keys: list[_Key | None] = []
        self._serials: list[int] = []
        self._cached: dict[_Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.clear()

    def clear(self) -> None:
        """Forget everything: all pages are free.  Whoever held pages must drop its list."""
        runs = -(-self.pages // self._run)
        self._free = dict.fromkeys(range(self.pages - 1, -1, -1))
        self._whole = dict.fromkeys(range(runs - 1, -1, -1))
        self._left = [min(self._run, self.pages - run * self._run) for run in range(runs)]
        self._refs = [0] * self.pages
        self._keys = [None] * self.pages
        self._serials = [ROOT] * self.pages
        self._cached = {}
        self._idle = OrderedDict()
        self.releases += 1

    @property
    def available(self) -> int:
        """How many pages `allocate` can give now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """How many pages somebody holds."""
        return self.pages - self.available

    @property
    def idle(self) -> int:
        """How many pages are kept for reuse alone."""
        return len(self._idle)

    def pages_for(self, positions: int) -> int:
        """How many pages hold that many positions."""
        return -(-positions // self.page_size)

    def allocate(self, after: int | None = None) -> int:
        """A page with one reference; evicts the least recently used idle page when none is free.

        Args:
            after: the page before it in its sequence.  The next one is given if it is free, else the first of a run
                that is free as a whole, so that sequences which grow side by side do not take every other page.
        """
        if self._free:
            if after is not None and after + 1 in self._free:
                page = after + 1
            elif self._whole:
                page = self._whole.popitem()[0] * self._run
            else:
                page = self._free.popitem()[0]
            self._take(page)
        else:
            assert self._idle, "allocate() without an available page"
            page, _ = self._idle.popitem(last=False)
            self._drop_key(page)
        self._refs[page] = 1
        return page

    def match(self, tokens: Sequence[int], limit: int) -> tuple[list[int], int]:
        """The cached pages with the longest prefix of tokens[:limit] in full pages, and the serial of the last one.

        Takes no reference: call `acquire` before anything else happens to the pool.
        """
        found: list[int] = []
        serial = ROOT
        if not self.reuse:
            return found, serial
        size = self.page_size
        for start in range(0, limit - size + 1, size):
            page = self._cached.get((serial, tuple(tokens[start : start + size])))
            if page is None:
                break
            found.append(page)
            serial = self._serials[page]
        return found, serial

    def idle_among(self, pages: Sequence[int]) -> int:
        """How many of `pages` are idle now, so that acquiring them makes as many fewer available."""
        return sum(1 for page in pages if self._refs[page] == 0)

    def acquire(self, pages: Sequence[int]) -> None:
        """One more reference to each page, held or idle."""
        for page in pages:
            if self._refs[page] == 0:
                del self._idle[page]
            self._refs[page] += 1

    def register(self, page: int, parent: int, tokens: Sequence[int]) -> int:
        """Remember a held page, full with `tokens`, as what follows serial `parent`; returns its serial.

        When another page is already remembered for the same content, that one stays and its serial is returned:
        `page` remains a private copy.
        """
        if not self.reuse:
            return ROOT
        assert self._refs[page] > 0 and len(tokens) == self.page_size
        key = (parent, tuple(tokens))
        known = self._cached.get(key)
        if known is not None:
            return self._serials[known]
        assert self._keys[page] is None, f"page {page} is registered twice"
        serial = self._next_serial
        self._next_serial += 1
        self._cached[key] = page
        self._keys[page] = key
        self._serials[page] = serial
        return serial

    def forget(self, page: int) -> None:
        """Stop sharing a page whose contents cannot be trusted; it stays with those who hold it."""
        self._drop_key(page)
        if self._refs[page] == 0 and page in self._idle:
            del self._idle[page]
            self._put(page)

    def release(self, pages: Sequence[int]) -> None:
        """Give one reference of each page back.  Cached ones become idle, the last page the first to be evicted."""
        self.releases += 1
        for page in reversed(pages):
            left = self._refs[page] - 1
            assert left >= 0, f"page {page} released twice"
            self._refs[page] = left
            if left == 0:
                if self._keys[page] is None:
                    self._put(page)
                else:
                    self._idle[page] = None
        while len(self._idle) > self.max_idle:
            page, _ = self._idle.popitem(last=False)
            self._drop_key(page)
            self._put(page)

    def _take(self, page: int) -> None:
        """Out of the free pages, if it is still among them."""
        self._free.pop(page, None)
        run = page // self._run
        self._left[run] -= 1
        self._whole.pop(run, None)

    def _put(self, page: int) -> None:
        """To the free pages."""
        self._free[page] = None
        run = page // self._run
        self._left[run] += 1
        if self._left[run] == min(self._run, self.pages - run * self._run):
            self._whole[run] = None

    def _drop_key(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._cached[key]
            self._keys[page] = None
            self._serials[page] = ROOT

    def check(self) -> None:
        """Assert that every page is in exactly one place.  O(pages): for tests."""
        free, idle = set(self._free), set(self._idle)
        runs = [range(at, min(at + self._run, self.pages)) for at in range(0, self.pages, self._run)]
        assert [len(free.intersection(run)) for run in runs] == self._left
        assert set(self._whole) == {at for at, run in enumerate(runs) if free.issuperset(run)}
        held = {page for page in range(self.pages) if self._refs[page] > 0}
        assert len(free) + len(idle) + len(held) == self.pages, (free, idle, held)
        assert free | idle | held == set(range(self.pages)), (free, idle, held)
        assert all(self._keys[page] is None for page in free), "a free page is still cached"
        assert all(self._keys[page] is not None for page in idle), "an idle page that nobody can find"
        assert {key: page for page, key in enumerate(self._keys) if key is not None} == self._cached
