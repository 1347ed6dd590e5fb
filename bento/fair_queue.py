"""A queue in which tasks take turns, within a task its callers, and within a caller its requests.

Start-time fair queueing (Goyal, Vin, Cheng 1996) on each of the three levels: whoever has been served least goes next,
and who comes new starts where the one served now stands. Served cost counts, not the number of requests, so that
neither many requests nor long ones take more than their share.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Path = tuple[str, ...]


@dataclass
class _Level(Generic[Item]):
    """Children in order of the cost they were served; a child is a level, or at the end an item."""

    heap: "list[tuple[float, int, str | None, _Level[Item] | Item]]" = field(default_factory=list)
    by_name: "dict[str, _Level[Item]]" = field(default_factory=dict)
    now: float = 0.0
    """Cost served to the child that was taken last: where new children begin."""


class FairQueue(Generic[Item]):
    """Items below paths of names; all paths of one queue have the same length."""

    def __init__(self) -> None:
        self._root: _Level[Item] = _Level()
        self._entries = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, path: Path, item: Item) -> None:
        """Add an item that was served nothing yet."""
        level = self._root
        for name in path:
            below = level.by_name.get(name)
            if below is None:
                below = level.by_name[name] = _Level()
                self._push(level, name, below)
            level = below
        self._push(level, None, item)
        self._size += 1

    def take(self) -> "Turn[Item]":
        """The item whose turn it is, taken out; `give_back` tells what it was served.

        Raises:
            IndexError: The queue is empty.
        """
        level = self._root
        steps: list[_Step[Item]] = []
        while True:
            served, entry, name, child = heapq.heappop(level.heap)
            level.now = served
            steps.append(_Step(level, served, entry, name))
            if not isinstance(child, _Level):
                self._size -= 1
                return Turn(child, steps)
            level = child

    def give_back(self, turn: "Turn[Item]", cost: float, *, again: bool) -> None:
        """Count `cost` for the item's task and caller; with `again` the item waits for its next turn."""
        child: _Level[Item] | Item = turn.item
        keep = again
        self._size += again
        for level, served, entry, name in reversed(turn.steps):
            if keep:
                heapq.heappush(level.heap, (served + cost, entry, name, child))
            elif name is not None:
                del level.by_name[name]
            child, keep = level, bool(level.heap)

    def _push(self, level: _Level[Item], name: str | None, child: "_Level[Item] | Item") -> None:
        self._entries += 1  # of equals, the one that came first is first; and children are never compared
        heapq.heappush(level.heap, (level.now, self._entries, name, child))


@dataclass(frozen=True)
class Turn(Generic[Item]):
    """An item that was taken, and the way to it."""

    item: Item
    steps: "Sequence[_Step[Item]]"


class _Step(NamedTuple, Generic[Item]):
    level: _Level[Item]
    served: float
    entry: int
    name: str | None
    """None for an item."""
