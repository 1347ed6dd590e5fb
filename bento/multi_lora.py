"""A linear layer that adds another low-rank update to every segment of a batch.

The method is that of segmented multi-adapter serving (Punica's SGMV, arXiv:2310.18547) with batched matrix products:
rows of one adapter stand together, and segments of like length whose adapters have the same form are one product,
padded to the longest of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bento.int8 import Int8Values, Int8Weight, quantise
from ft_resources.errors import ServiceError

LIKE = 0.7
"""Segments are padded to the longest of their group while they are longer than this share of it."""
EQUAL = 4
"""As many segments of one length stay by themselves: they need no padding, so that their rows are not moved."""


class Update:
    """The low-rank matrices of one adapter. Those of one module lie together, so that they are stacked in one copy.

    Args:
        pairs: Module name -> (A transposed [in, rank], B transposed and scaled [rank, out]).
    """

    def __init__(
        self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.form = tuple((module, a.shape[1]) for module, (a, _) in sorted(pairs.items()))
        """Modules and ranks; adapters where it is equal can be stacked."""
        self.matrices: Mapping[str, torch.Tensor] = {
            module: torch.cat([a.flatten(), b.flatten()]).to(device=device, dtype=dtype)
            for module, (a, b) in pairs.items()
        }
        """By module: A row after row, then B, see `_split`."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        return sum(each.nbytes for each in self.matrices.values())


@dataclass(frozen=True)
class Group:
    """Neighbouring segments of like length, whose adapters have the same form."""

    start: int
    """First of its rows, of all tokens one after the other."""
    stop: int
    width: int
    """Rows of the longest segment."""
    source: torch.Tensor | None
    """long [segments x width]: the row of each place; None: segments are equally long."""
    real: torch.Tensor | None
    """long [stop - start]: the place of each row."""
    updates: Sequence[Update]
    """Of each segment."""


@dataclass
class Reading:
    """An input, and what the layers that read the same one have in common."""

    input: torch.Tensor
    quantised: Int8Values | None = None
    gathered: dict[int, torch.Tensor] = field(default_factory=dict)
    """By first row of a group: [segments, width, in] in the dtype of the updates."""


class Segments:
    """Which rows of the batch now in the model belong to which adapter; shared by all layers of one model.

    In a padded batch a row is a text, in a pack it is a token.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        """Of updates."""
        self.rows = 0
        self._alike: Sequence[Sequence[tuple[int, int, Update]]] = ()
        self._groups: dict[int, Sequence[Group]] = {}
        self._room = torch.empty(0, dtype=dtype, device=device)
        self._reading: Reading | None = None

    def set(self, rows: int, parts: Sequence[tuple[int, int, Update]]) -> None:
        """The next batch.

        Args:
            parts: (first row, row after the last, update), in order.
        """
        self.rows, self._alike = rows, _alike([part for part in parts if part[2].form])
        self._groups, self._reading = {}, None

    def clear(self) -> None:
        """Let go of the batch."""
        self.set(0, ())

    def reading(self, input: torch.Tensor) -> Reading:
        """What is known of `input`, if it was the last one asked for."""
        if self._reading is None or self._reading.input is not input:
            self._reading = Reading(input)
        return self._reading

    def groups(self, per_row: int) -> Sequence[Group]:
        """The groups of a layer that gets `per_row` tokens in each row."""
        if per_row not in self._groups:
            self._groups[per_row] = [_group(alike, per_row, self.device) for alike in self._alike]
        return self._groups[per_row]

    def stacked(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """[matrices, elements]; valid until the next call.

        They are stacked when a layer needs them, so that they are still in the cache when they are multiplied, and
        always in the same memory: new memory would cost more than the copy, because the kernel clears it first.
        """
        if len(matrices) == 1:
            return matrices[0][None]
        size = len(matrices) * len(matrices[0])
        if self._room.numel() < size:
            self._room = self._room.new_empty(size)
        return torch.cat(matrices, out=self._room[:size]).view(len(matrices), -1)

    @property
    def empty(self) -> bool:
        """Whether no row gets an update."""
        return not self._alike


class MultiLora(nn.Linear):
    """`linear` itself, on the same weight tensors, plus the update of each segment.

    Shapes: input [rows, ..., in] or [1, rows, in], output likewise; `rows` is `segments.rows`.
    """

    def __init__(self, name: str, linear: nn.Linear, segments: Segments) -> None:
        nn.Module.__init__(self)
        self.name, self.segments = name, segments
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.int8: Int8Weight | None = None

    def to_int8(self) -> None:
        """From now on multiply with the weight in int8, which takes the place of the float32 one."""
        self.int8 = Int8Weight(self.weight.detach(), self.bias)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Raises:
        ServiceError: The first dimension of the input is not the batch.
        """
        output = self._product(input)
        if not self.segments.empty:
            self._update(input, output.view(-1, self.out_features))
        return output

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        if self.int8 is not None:
            reading = self.segments.reading(input)
            if reading.quantised is None:
                reading.quantised = quantise(input.reshape(-1, self.in_features))
            return self.int8.product(reading.quantised).view(*input.shape[:-1], self.out_features)
        if self.bias is not None and input.dtype == torch.bfloat16 and input.device.type == "cpu":
            return nn.functional.linear(input, self.weight).add_(self.bias)  # faster than a bias in the product
        return super().forward(input)

    def _update(self, input: torch.Tensor, output: torch.Tensor) -> None:
        for group in self.segments.groups(self._per_row(input)):
            if self.name not in group.updates[0].matrices:
                continue
            a, b = self._split(self.segments.stacked([update.matrices[self.name] for update in group.updates]))
            rows, inputs = output[group.start : group.stop], self._gathered(input, group)
            if len(group.updates) == 1:  # plain products are faster than a batch of one
                low = inputs[0] @ a[0]
                if low.dtype == output.dtype:
                    rows.addmm_(low, b[0])
                else:
                    rows.add_(low @ b[0])
                continue
            low = torch.bmm(inputs, a)
            if group.real is None and low.dtype == output.dtype:
                rows.view(-1, group.width, self.out_features).baddbmm_(low, b)
                continue
            added = torch.bmm(low, b).view(-1, self.out_features)
            rows.add_(added if group.real is None else added.index_select(0, group.real))

    def _split(self, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A [adapters, in, rank] and B [adapters, rank, out] of what `Update` holds for this layer."""
        rank = stack.shape[1] // (self.in_features + self.out_features)
        a, b = stack.tensor_split([self.in_features * rank], 1)
        return a.unflatten(1, (self.in_features, rank)), b.unflatten(1, (rank, self.out_features))

    def _gathered(self, input: torch.Tensor, group: Group) -> torch.Tensor:
        """[segments, width, in]"""
        known = self.segments.reading(input).gathered
        if group.start not in known:
            flat = input.reshape(-1, self.in_features)
            flat = flat[group.start : group.stop] if group.source is None else flat.index_select(0, group.source)
            known[group.start] = flat.to(self.segments.dtype).view(len(group.updates), group.width, self.in_features)
        return known[group.start]

    def _per_row(self, input: torch.Tensor) -> int:
        """Tokens in a row."""
        rows = self.segments.rows
        if input.shape[0] != rows and input.shape[:2] != (1, rows):
            raise ServiceError(
                f"layer '{self.name}' gets an input of shape {list(input.shape)} for {rows} rows",
                mend="This base model does not keep the batch first; exclude the layer from the adapter's targets.",
            )
        return input.numel() // (rows * self.in_features)


def wrap_linears(model: nn.Module, segments: Segments) -> dict[str, MultiLora]:
    """Replace every plain `nn.Linear` of `model` in place; returns the new layers by module name.

    Subclasses of `nn.Linear` are left alone: they may use their weight without calling the layer.
    """
    wrapped: dict[str, MultiLora] = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            wrapped[name] = MultiLora(name, module, segments)
            setattr(model.get_submodule(parent), leaf, wrapped[name])
    return wrapped


def _alike(parts: Sequence[tuple[int, int, Update]]) -> list[list[tuple[int, int, Update]]]:
    """Neighbours that are one product."""
    groups: list[list[tuple[int, int, Update]]] = []
    longest = shortest = 0
    for start, stop, update in parts:
        length = stop - start
        joins = bool(groups) and groups[-1][-1][1] == start and groups[-1][-1][2].form == update.form
        if joins:
            like = min(shortest, length) > LIKE * max(longest, length)
            joins = like and (length == longest == shortest or longest > shortest or len(groups[-1]) < EQUAL)
        if not joins:
            groups.append([])
            longest, shortest = length, length
        groups[-1].append((start, stop, update))
        longest, shortest = max(longest, length), min(shortest, length)
    return groups


def _group(parts: Sequence[tuple[int, int, Update]], per_row: int, device: torch.device) -> Group:
    first = torch.tensor([start * per_row for start, *_ in parts])[:, None]
    counts = torch.tensor([(stop - start) * per_row for start, stop, _ in parts])[:, None]
    width = int(counts.max())
    inside = torch.arange(width)[None]
    there = inside < counts
    source = real = None
    if not bool(there.all()):
        source = torch.where(there, first + inside, first).flatten().to(device)
        real = there.flatten().nonzero().flatten().to(device)
    return Group(int(first[0]), int(first[-1] + counts[-1]), width, source, real, [update for *_, update in parts])
