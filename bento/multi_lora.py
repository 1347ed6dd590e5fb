"""A linear layer that adds another low-rank update to every segment of a batch.

The method is that of segmented multi-adapter serving (Punica's SGMV, arXiv:2310.18547) with batched matrix products:
rows of one adapter stand together, and segments of like length whose adapters have the same form are one product,
padded to the longest of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from bento.bf16 import Bf16Weight
from bento.int8 import Int8Values, Int8Weight, quantise
from bento.packing import padded_rows
from bento.shapes import rounded
from ft_resources.errors import ServiceError

LIKE = 0.7
"""Segments are padded to the longest of their group while they are longer than this share of it."""
LONG = 160
"""Rows from which on a segment is a product of its own."""
EQUAL = 4
"""As many segments of one length stay by themselves: if it is a rounded one, their rows are not moved."""


class Update:
    """The low-rank matrices of one adapter.

    Args:
        pairs: Module name -> (A transposed [in, rank], B transposed and scaled [rank, out]).
        families: Modules that read the same input, see `families_of`; the A of each family are one matrix.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        families: Iterable[Sequence[str]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.form = tuple((module, a.shape[1]) for module, (a, _) in sorted(pairs.items()))
        """Modules and ranks; adapters where it is equal can be stacked."""
        self.a: dict[str, torch.Tensor] = {}
        """By the first module of a family: [in, sum of ranks]."""
        self.columns: dict[str, slice] = {}
        """By module: its part of that."""
        self.b: dict[str, torch.Tensor] = {
            module: b.to(device=device, dtype=dtype).contiguous() for module, (_, b) in pairs.items()
        }
        """By module: [rank, out]."""
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
    def finite(self) -> bool:
        """Whether all its values are; scaled and rounded to `dtype` they may not be any more."""
        return all(bool(each.isfinite().all()) for each in (*self.a.values(), *self.b.values()))

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        return sum(each.nbytes for each in (*self.a.values(), *self.b.values()))


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
    updates: Sequence[Update]
    """Of each segment."""


@dataclass
class Reading:
    """An input, and what the layers that read the same one have in common."""

    input: torch.Tensor
    quantised: Int8Values | None = None
    gathered: dict[int, torch.Tensor] = field(default_factory=dict)
    """By first row of a group: [segments, width, in] in the dtype of the updates."""
    low: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    """By that and the first module of a family: the product with A, [segments, width, sum of ranks]."""


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

    @contextmanager
    def batch(self, rows: int, parts: Sequence[tuple[int, int, Update]]) -> Iterator[None]:
        """The batch that is computed inside this block; let go of at its end.

        Args:
            parts: (first row, row after the last, update), in order.
        """
        self._set(rows, parts)
        try:
            yield
        finally:
            self._set(0, ())

    def _set(self, rows: int, parts: Sequence[tuple[int, int, Update]]) -> None:
        self.rows, self._alike = rows, _alike([part for part in parts if part[2].form])
        self._groups, self._reading = {}, None

    def reading(self, input: torch.Tensor) -> Reading:
        """What is known of `input`, if it was the last one asked for."""
        if self._reading is None or self._reading.input is not input:
            self._reading = Reading(input)
        return self._reading

    def groups(self, per_row: int) -> Sequence[Group]:
        """The groups of a layer that gets `per_row` tokens in each row."""
        if per_row not in self._groups:
            rows = self.rows * per_row
            self._groups[per_row] = [_group(alike, per_row, rows, self.device) for alike in self._alike]
        return self._groups[per_row]

    def stacked(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """[matrices, ...]; valid until the next call.

        They are stacked when a layer needs them, so that they are still in the cache when they are multiplied, and
        always in the same memory: new memory would cost more than the copy, because the kernel clears it first.
        """
        if len(matrices) == 1:
            return matrices[0][None]
        shape = (len(matrices), *matrices[0].shape)
        size = math.prod(shape)
        if self._room.numel() < size:
            self._room = self._room.new_empty(size)
        return torch.stack(matrices, out=self._room[:size].view(shape))

    def low(self, input: torch.Tensor, group: Group, family: str) -> torch.Tensor:
        """The product of the rows of `group` with the A of the layers that read `input`."""
        reading = self.reading(input)
        key = (group.start, family)
        if key not in reading.low:
            inputs = self._gathered(reading, group)
            if len(group.updates) > 1:
                reading.low[key] = torch.bmm(inputs, self.stacked([update.a[family] for update in group.updates]))
            else:  # plain products are faster than a batch of one
                reading.low[key] = (inputs[0] @ group.updates[0].a[family])[None]
                reading.low[key][0, group.stop - group.start :] = 0  # rows of others: they get nothing added
        return reading.low[key]

    def _gathered(self, reading: Reading, group: Group) -> torch.Tensor:
        """[segments, width, in]"""
        if group.start not in reading.gathered:
            flat = reading.input.reshape(-1, reading.input.shape[-1])
            if group.source is None:
                flat = flat[group.start : group.start + len(group.updates) * group.width]
            else:
                flat = flat.index_select(0, group.source)
            reading.gathered[group.start] = flat.to(self.dtype).view(len(group.updates), group.width, -1)
        return reading.gathered[group.start]

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
        self.family = name
        """First of the layers that read the same input."""
        self.kernel: Int8Weight | Bf16Weight | None = None

    def take(self, kernel: type[Int8Weight] | type[Bf16Weight]) -> None:
        """From now on multiply with the weight as `kernel` keeps it, which takes the place of the present one."""
        self.kernel = kernel(self.weight.detach(), self.bias)
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
        if isinstance(self.kernel, Bf16Weight):
            return self.kernel.product(input)
        if self.kernel is not None:
            reading = self.segments.reading(input)
            if reading.quantised is None:
                reading.quantised = quantise(input.reshape(-1, self.in_features))
            return self.kernel.product(reading.quantised).view(*input.shape[:-1], self.out_features)
        return super().forward(input)

    def _update(self, input: torch.Tensor, output: torch.Tensor) -> None:
        for group in self.segments.groups(self._per_row(input)):
            update = group.updates[0]
            if self.name not in update.b:
                continue
            low = self.segments.low(input, group, self.family)[..., update.columns[self.name]]
            if len(group.updates) == 1:
                rows = output[group.start : group.start + group.width]
                if low.dtype == output.dtype:
                    rows.addmm_(low[0], update.b[self.name])
                else:
                    rows.add_(low[0] @ update.b[self.name])
                continue
            rows = output[group.start : group.stop]
            b = self.segments.stacked([update.b[self.name] for update in group.updates])
            if group.real is None and low.dtype == output.dtype:
                rows.view(-1, group.width, self.out_features).baddbmm_(low, b)
                continue
            added = torch.bmm(low, b).view(-1, self.out_features)
            rows.add_(added if group.real is None else added.index_select(0, group.real))

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


def families_of(layers: Mapping[str, MultiLora], run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Layers that read the same input one after the other, as they did while `run` used each; the layers know it."""
    read: list[tuple[str, torch.Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, MultiLora)
        read.append((layer.name, inputs[0]))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    families: list[list[str]] = []
    seen: set[str] = set()
    last: torch.Tensor | None = None
    for name, input in [*read, *((name, torch.empty(0)) for name in layers)]:
        if name in seen:
            continue  # a model may use its layers again, or not at all
        if input is not last:
            families.append([])
        families[-1].append(name)
        seen.add(name)
        last = input
    for family in families:
        for name in family:
            layers[name].family = family[0]
    return [tuple(family) for family in families]


def _alike(parts: Sequence[tuple[int, int, Update]]) -> list[list[tuple[int, int, Update]]]:
    """Neighbours that are one product."""
    groups: list[list[tuple[int, int, Update]]] = []
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


def _group(parts: Sequence[tuple[int, int, Update]], per_row: int, rows: int, device: torch.device) -> Group:
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
