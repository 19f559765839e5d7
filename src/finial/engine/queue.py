"""Whose turn it is: a queue in which owners take turns, so that one who asks for much does not keep others waiting.

Knows nothing of what waits in it but its owner.  With one owner it is first in, first out.

    queue = FairQueue[str](); queue.append("a", owner="x"); queue[0]; queue.popleft()
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items in the order in which they leave.

    What is put back at the front (`appendleft`) leaves before everything else: it has had its turn already.
    """

    def __init__(self) -> None:
        self._front: deque[Item] = deque()
        self._owners: OrderedDict[str, deque[Item]] = OrderedDict()  # the one whose turn it is first

    def __len__(self) -> int:
        return len(self._front) + sum(map(len, self._owners.values()))

    def __bool__(self) -> bool:
        return bool(self._front or self._owners)

    def __iter__(self) -> Iterator[Item]:
        yield from self._front
        left = [iter(items) for items in self._owners.values()]
        while left:
            still = []
            for items in left:
                for item in items:
                    yield item
                    still.append(items)
                    break
            left = still

    def __getitem__(self, index: int) -> Item:
        """The item that leaves next; no other index is known."""
        assert index == 0
        return self._front[0] if self._front else next(iter(self._owners.values()))[0]

    def append(self, item: Item, owner: str = "") -> None:
        """Behind the owner's other items."""
        self._owners.setdefault(owner, deque()).append(item)

    def appendleft(self, item: Item) -> None:
        """Before everything."""
        self._front.appendleft(item)

    def popleft(self) -> Item:
        """Take the next item; its owner's turn comes again after the others'."""
        if self._front:
            return self._front.popleft()
        owner, items = self._owners.popitem(last=False)
        item = items.popleft()
        if items:
            self._owners[owner] = items
        return item

    def remove(self, item: Item) -> bool:
        """Take an item out, wherever it is; False when it is not there."""
        if item in self._front:
            self._front.remove(item)
            return True
        for owner, items in self._owners.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._owners[owner]
                return True
        return False

    def clear(self) -> None:
        """Take everything out."""
        self._front.clear()
        self._owners.clear()
