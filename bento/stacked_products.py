"""Updates of mixed adapters by batched matrix products, in any precision on any device.

Segments of like length whose adapters have the same form are one product, padded to the longest of them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from bento.multi_lora import MultiLora, Pairs, Products, Update
from bento.packing import padded_rows
from bento.shapes import rounded

LIKE = 0.7
"""Segments are padded to the longest of their group while they are longer than this share of it."""
LONG = 160
"""Rows from which on a segment is a product of its own."""
EQUAL = 4
"""As many segments of one length stay by themselves: if it is a rounded one, their rows are not moved."""


class StackedUpdate(Update):
    """An adapter's matrices, to be stacked with those of others.

    Args:
        families: Layers that read the same input, see `families_of`; the A of each family are one matrix.
    """

    def __init__(
        self, pairs: Pairs, families: Iterable[Sequence[str]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.form = tuple((module, a.shape[1]) for module, (a, _) in sorted(pairs.items()))
        """Layers and ranks; adapters where it is equal can be stacked."""
        self.a: dict[str, torch.Tensor] = {}
        """By the first layer of a family: [in, sum of ranks]."""
        self.columns: dict[str, slice] = {}
        """By layer: its part of that."""
        self.b: dict[str, torch.Tensor] = {
            module: b.to(device=device, dtype=dtype).contiguous() for module, (_, b) in pairs.items()
        }
        """By layer: [rank, out]."""
        for family in families:
            parts = [(module, pairs[module][0]) for module in family if module in pairs]
            if not parts:
                continue
            self.a[family[0]] = torch.cat([a for _, a in parts], 1).to(device=device, dtype=dtype)
            at = 0
            for module, a in parts:
                self.columns[module] = slice(at, at + a.shape[1])
                at += a.shape[1]

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        return chain(self.a.values(), self.b.values())


Segment = tuple[int, int, StackedUpdate]
"""First row, row after the last, update."""


@dataclass(frozen=True)
class Group:
    """Neighbouring segments of like length, whose adapters have the same form."""

    start: int
    """First of its rows, of all tokens one after the other."""
    stop: int
    width: int
    """Rows of each segment; of a single one, some that follow it may be among them."""
    source: torch.Tensor | None
    """long [segments x width]: the row of each place; None: they follow each other."""
    real: torch.Tensor | None
    """long [stop - start]: the place of each row."""
    updates: Sequence[StackedUpdate]
    """Of each segment."""


@dataclass
class Reading:
    """An input, and what the layers that read the same one have in common."""

    input: torch.Tensor
    gathered: dict[int, torch.Tensor] = field(default_factory=dict)
    """By first row of a group: [segments, width, in] in the dtype of the updates."""
    low: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    """By that and the first layer of a family: the product with A, [segments, width, sum of ranks]."""


class StackedProducts(Products[StackedUpdate]):
    """Args:
    families: Layers that read the same input, see `families_of`.
    dtype: Of the updates.
    """

    def __init__(self, families: Iterable[Sequence[str]], dtype: torch.dtype, device: torch.device) -> None:
        self._families, self._dtype, self._device = families, dtype, device
        self._room = torch.empty(0, dtype=dtype, device=device)
        self.begin(0, ())

    def update(self, pairs: Pairs) -> StackedUpdate:
        return StackedUpdate(pairs, self._families, self._dtype, self._device)

    def begin(self, rows: int, parts: Sequence[Segment]) -> None:
        self._rows, self._alike = rows, _alike([part for part in parts if part[2].form])
        self._groups: dict[int, Sequence[Group]] = {}
        self._reading: Reading | None = None

    def add(self, layer: MultiLora, input: torch.Tensor, output: torch.Tensor, per_row: int) -> None:
        for group in self._groups_of(per_row):
            if layer.name in group.updates[0].b:
                low = self._low(input, group, layer.family)[..., group.updates[0].columns[layer.name]]
                self._add(group, low, [update.b[layer.name] for update in group.updates], output)

    def _add(self, group: Group, low: torch.Tensor, matrices: list[torch.Tensor], output: torch.Tensor) -> None:
        """Add low [segments, width, rank] @ matrices [rank, out] to the rows of `group`."""
        if len(matrices) == 1:
            rows = output[group.start : group.start + group.width]
            if low.dtype == output.dtype:
                rows.addmm_(low[0], matrices[0])
            else:
                rows.add_(low[0] @ matrices[0])
            return
        rows = output[group.start : group.stop]
        b = self._stacked(matrices)
        if group.real is None and low.dtype == output.dtype:
            rows.view(-1, group.width, output.shape[-1]).baddbmm_(low, b)
            return
        added = torch.bmm(low, b).view(-1, output.shape[-1])
        rows.add_(added if group.real is None else added.index_select(0, group.real))

    def _groups_of(self, per_row: int) -> Sequence[Group]:
        """The groups of a layer that gets `per_row` tokens in each row."""
        if per_row not in self._groups:
            rows = self._rows * per_row
            self._groups[per_row] = [_group(alike, per_row, rows, self._device) for alike in self._alike]
        return self._groups[per_row]

    def _stacked(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """[matrices, ...]; valid until the next call.

        They are stacked when a layer needs them, so that they are still in the cache when they are multiplied, and
        always in the same memory: new memory would cost more than the copy, because the kernel clears it first.
        """
        shape = (len(matrices), *matrices[0].shape)
        size = math.prod(shape)
        if self._room.numel() < size:
            self._room = self._room.new_empty(size)
        return torch.stack(matrices, out=self._room[:size].view(shape))

    def _low(self, input: torch.Tensor, group: Group, family: str) -> torch.Tensor:
        """The product of the rows of `group` with the A of the layers that read `input`."""
        if self._reading is None or self._reading.input is not input:
            self._reading = Reading(input)
        reading, key = self._reading, (group.start, family)
        if key not in reading.low:
            inputs = self._gathered(reading, group)
            if len(group.updates) > 1:
                reading.low[key] = torch.bmm(inputs, self._stacked([update.a[family] for update in group.updates]))
            else:  # plain products are faster than a batch of one
                reading.low[key] = (inputs[0] @ group.updates[0].a[family])[None]
                reading.low[key][0, group.stop - group.start :] = 0  # rows of others: they get nothing added
        return reading.low[key]

    def _gathered(self, reading: Reading, group: Group) -> torch.Tensor:
        """[segments, width, in]"""
        if group.start not in reading.gathered:
            rows = reading.input.reshape(-1, reading.input.shape[-1])
            if group.source is None:
                rows = rows[group.start : group.start + len(group.updates) * group.width]
            else:
                rows = rows.index_select(0, group.source)
            reading.gathered[group.start] = rows.to(self._dtype).view(len(group.updates), group.width, -1)
        return reading.gathered[group.start]


def _alike(parts: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours that are one product."""
    groups: list[list[Segment]] = []
    longest = shortest = 0
    for start, stop, update in parts:
        length = stop - start
        joins = (
            max(length, longest) <= LONG
            and bool(groups)
            and groups[-1][-1][1] == start
            and groups[-1][-1][2].form == update.form
        )
        if joins:
            like = min(shortest, length) > LIKE * max(longest, length)
            joins = like and (length == longest == shortest or longest > shortest or len(groups[-1]) < EQUAL)
        if not joins:
            groups.append([])
            longest, shortest = length, length
        groups[-1].append((start, stop, update))
        longest, shortest = max(longest, length), min(shortest, length)
    return groups


def _group(parts: Sequence[Segment], per_row: int, rows: int, device: torch.device) -> Group:
    starts = [start * per_row for start, *_ in parts]
    lengths = [(stop - start) * per_row for start, stop, _ in parts]
    start, stop, width = starts[0], starts[-1] + lengths[-1], max(lengths)
    if device.type == "cpu":
        width = rounded(width, 8, 16)
    updates = [update for *_, update in parts]
    if len(parts) == 1:
        return Group(start, stop, min(width, rows - start), None, None, updates)
    if min(lengths) == width:
        return Group(start, stop, width, None, None, updates)
    source, real = padded_rows(starts, lengths, width)
    places = real.flatten().nonzero().flatten()
    return Group(start, stop, width, source.flatten().to(device), places.to(device), updates)
