"""Keys and values of the requests in flight: slots in static tensors, bounded in bytes.

A request knows how many tokens it can come to, and gets a slot of the lane that holds them; the length of lanes doubles
from one to the next. So nothing in flight is ever moved out, and a batch of short requests pays for no long one.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

SHORTEST = 64
"""Tokens of a slot in the first lane."""


@dataclass(eq=False)
class Place:
    """A slot taken by one request."""

    lane: "Lane"
    slot: int
    kept: int = 0
    """Tokens whose keys and values are there."""
    owner: Any = None
    """Who took it, for whoever walks through the lane."""


@dataclass(eq=False)
class Lane:
    """Slots of one length. Those that write stand first, so that they are a part of the tensors without a copy."""

    length: int
    keys: torch.Tensor
    """[layers, slots, length, key heads, width]"""
    values: torch.Tensor
    numbers: torch.Tensor
    """0, 1, 2 ... [slots]"""
    places: list[Place] = field(default_factory=list)
    """By slot."""
    writing: int = 0
    """How many of the slots, from the first on, write."""

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    def start_writing(self, place: Place) -> None:
        """The prompt at `place` has been read."""
        self._swap(place.slot, self.writing)
        self.writing += 1

    def release(self, place: Place, *, wipe: bool = False) -> None:
        """Free the slot. `wipe`: what it holds is not finite, and would reach whoever comes after it."""
        if wipe:
            self.keys[:, place.slot] = 0
            self.values[:, place.slot] = 0
        hole = place.slot
        if hole < self.writing:
            self.writing -= 1
            self._move(self.writing, hole)
            hole = self.writing
        self._move(len(self.places) - 1, hole)
        self.places.pop()

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        place = self.places[source]
        for tensor in (self.keys, self.values):
            tensor[:, target, : place.kept] = tensor[:, source, : place.kept]
        place.slot = target
        self.places[target] = place

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        first, second = self.places[one], self.places[other]
        kept = max(first.kept, second.kept)
        for tensor in (self.keys, self.values):
            saved = tensor[:, one, :kept].clone()
            tensor[:, one, :kept] = tensor[:, other, :kept]
            tensor[:, other, :kept] = saved
        first.slot, second.slot = other, one
        self.places[one], self.places[other] = second, first


class Cache:
    """All lanes of one model.

    Args:
        shape: layers, key heads, width of a head.
        context: Most tokens of a request.
        budget: Bytes of all lanes together, tensors that are copied into larger ones included.
    """

    def __init__(
        self, shape: tuple[int, int, int], context: int, budget: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._heads, self._width = shape
        self._budget = budget
        self._lengths = [context]
        """Of the lanes there may be, shortest first."""
        while self._lengths[0] > SHORTEST:
            longer = 1 << (self._lengths[0] - 1).bit_length()
            self._lengths.insert(0, longer // 2)
        self._dtype, self._device = dtype, device
        self.lanes: dict[int, Lane] = {}
        """By length."""

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        return sum(self._size(lane.length, lane.slots) for lane in self.lanes.values())

    @property
    def most_tokens(self) -> int:
        """Of one request alone."""
        return max((length for length in self._lengths if self._size(length, 1) <= self._budget), default=0)

    def take(self, tokens: int) -> Place | None:
        """A slot for a request of at most `tokens` (<= `most_tokens`) tokens; None while there is no room."""
        length = next(length for length in self._lengths if length >= tokens)
        lane = self.lanes.get(length)
        if lane is None or len(lane.places) == lane.slots:
            lane = self._grow(length, lane)
            if lane is None:
                return None
        place = Place(lane, len(lane.places))
        lane.places.append(place)
        return place

    def release(self, place: Place, *, wipe: bool = False) -> None:
        """Free a slot; see `Lane.release`."""
        place.lane.release(place, wipe=wipe)

    def clear(self) -> None:
        """Forget all lanes, and whoever has a slot."""
        self.lanes.clear()

    def _size(self, length: int, slots: int) -> int:
        return 2 * self._layers * self._heads * self._width * self._dtype.itemsize * length * slots

    def _grow(self, length: int, lane: Lane | None) -> Lane | None:
        now = lane.slots if lane else 0
        if not self._fits(length, 2 * now or 1):
            for other in [one for one in self.lanes.values() if not one.places]:
                del self.lanes[other.length]
        slots = next((wanted for wanted in (2 * now or 1, now + 1) if self._fits(length, wanted)), None)
        if slots is None:
            return None
        shape = (self._layers, slots, length, self._heads, self._width)
        # zeros: what nobody wrote is weighted with zero, and zero times what is not a number is none
        keys, values = (torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        numbers = torch.arange(slots, device=self._device)
        if lane is None:
            lane = self.lanes[length] = Lane(length, keys, values, numbers)
        else:
            keys[:, :now], values[:, :now] = lane.keys, lane.values
            lane.keys, lane.values, lane.numbers = keys, values, numbers
        return lane

    def _fits(self, length: int, slots: int) -> bool:
        return self.nbytes + self._size(length, slots) <= self._budget
