"""Page numbers of the KV cache: who holds which page, and which full pages can be used again.

Integers only; knows nothing of arrays, models, or what a page contains beyond the token ids that filled it.

    pool = PagePool(pages=64, page_size=16)
    pages, chain = pool.match(tokens, limit=len(tokens) - 1)     # full pages whose prefix is already cached

A full page is remembered under (serial of the page before it, its own token ids), compared by content: two different
prefixes can never be taken for one another.  A serial is given once and never again, so when a page is forgotten, what
followed it can no longer be reached by mistake.  Only full pages are shared, and a full page is never written again,
so nothing is ever copied.  The idea of sharing whole pages is that of vLLM (Kwon et al. 2023, arXiv:2309.06180, 4.3).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0  # the serial before the first page of every sequence

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
        self._free: list[int] = []
        self._refs: list[int] = []
        self._keys: list[_Key | None] = []
        self._serials: list[int] = []
        self._cached: dict[_Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.clear()

    def clear(self) -> None:
        """Forget everything: all pages are free.  Whoever held pages must drop its list."""
        self._free = list(range(self.pages - 1, -1, -1))
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

    def allocate(self) -> int:
        """A page with one reference; evicts the least recently used idle page when none is free."""
        if self._free:
            page = self._free.pop()
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
            self._free.append(page)

    def release(self, pages: Sequence[int]) -> None:
        """Give one reference of each page back.  Cached ones become idle, the last page the first to be evicted."""
        self.releases += 1
        for page in reversed(pages):
            left = self._refs[page] - 1
            assert left >= 0, f"page {page} released twice"
            self._refs[page] = left
            if left == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None
        while len(self._idle) > self.max_idle:
            page, _ = self._idle.popitem(last=False)
            self._drop_key(page)
            self._free.append(page)

    def _drop_key(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._cached[key]
            self._keys[page] = None
            self._serials[page] = ROOT

    def check(self) -> None:
        """Assert that every page is in exactly one place.  O(pages): for tests."""
        free, idle = set(self._free), set(self._idle)
        held = {page for page in range(self.pages) if self._refs[page] > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(idle) + len(held) == self.pages, (free, idle, held)
        assert free | idle | held == set(range(self.pages)), (free, idle, held)
        assert all(self._keys[page] is None for page in free), "a free page is still cached"
        assert all(self._keys[page] is not None for page in idle), "an idle page that nobody can find"
        assert {key: page for page, key in enumerate(self._keys) if key is not None} == self._cached
