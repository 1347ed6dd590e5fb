"""Updates of mixed adapters by the functions of `machine_code`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bento.multi_lora import MultiLora, Pairs, Products, Update
from bento.native.machine_code import kind_of, missing, segment_products
from bento.native.segments_program import Call, Weights, interleaved
from bento.native.writing import NUMBER


@dataclass(frozen=True, eq=False)
class NativeUpdate(Update):
    """An adapter's matrices as the functions read them."""

    values: torch.Tensor
    """[values]: all of them, one after the other."""
    table: torch.Tensor
    """long [layers, fields]: the `Weights` of every layer."""

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        return (self.values,)


class NativeProducts(Products[NativeUpdate]):
    """Two calls a layer, whatever the ranks, layers and lengths of a batch are.

    Args:
        families: Layers that read the same input, see `families_of`; the A of each family are one matrix.
        dtype: Of the layers and the updates; one that is not `missing`.
    """

    def __init__(self, families: Sequence[Sequence[str]], dtype: torch.dtype) -> None:
        self._kind = kind_of(dtype)
        self._code = segment_products(self._kind)
        self._families = families
        self._places = {name: at for at, name in enumerate(name for family in families for name in family)}
        self._nothing = torch.zeros(1, len(self._places), len(Weights._fields), dtype=torch.long)
        self._room = torch.empty(0, dtype=dtype)
        self.begin(0, ())

    @staticmethod
    def missing(layers: Iterable[MultiLora], dtype: torch.dtype, device: torch.device) -> str:
        """Why a model of these layers cannot have them; empty: it can."""
        if gap := missing(dtype, device):
            return gap
        kind = kind_of(dtype)
        for layer in layers:
            if layer.in_features % kind.depth or layer.out_features % kind.lanes:
                size = f"{layer.in_features} x {layer.out_features}"
                return f"{layer.name} is {size}, no multiple of {kind.depth} x {kind.lanes}"
        return ""

    def update(self, pairs: Pairs) -> NativeUpdate:
        kind = self._kind
        table = [Weights(0, 0, 0, 0, 0) for _ in self._places]
        pieces: list[torch.Tensor] = []
        used = 0

        def keep(matrix: torch.Tensor, tiles: Mapping[int, Sequence[int]]) -> int:
            """Where `matrix` begins, in bytes."""
            nonlocal used
            pieces.append(interleaved(matrix, kind, tiles))
            used += len(pieces[-1])
            return (used - len(pieces[-1])) * kind.value

        for family in self._families:
            parts = {name: pairs[name] for name in family if name in pairs}
            columns, first = [], 0
            for name, (a, b) in parts.items():
                columns.append(_padded(a, columns=kind.depth))
                words = columns[-1].shape[1] // kind.depth
                kept = keep(_padded(b, rows=kind.depth), kind.add_tiles)
                table[self._places[name]] = Weights(0, 0, kept, words, first)
                first += words
            if parts:
                a = _padded(torch.cat(columns, 1), columns=kind.lanes)
                head = self._places[family[0]]
                table[head] = table[head]._replace(a=keep(a, kind.low_tiles), registers=a.shape[1] // kind.lanes)
        values = torch.cat([*pieces, torch.empty(0)]).to(kind.dtype)
        numbers = torch.tensor(table)
        numbers[:, [Weights._fields.index("a"), Weights._fields.index("b")]] += values.data_ptr()
        return NativeUpdate(values, numbers)

    def begin(self, rows: int, parts: Sequence[tuple[int, int, NativeUpdate]]) -> None:
        if parts and parts[-1][1] > rows:
            raise ValueError(f"a segment ends at row {parts[-1][1]} of {rows}")
        self._parts = parts
        self._bounds: dict[int, torch.Tensor] = {}
        self._low: tuple[torch.Tensor, int, torch.Tensor] | None = None
        self._weights = torch.stack([update.table for *_, update in parts]) if parts else self._nothing
        largest = self._weights.amax(0)
        self._registers = largest[:, Weights._fields.index("registers")].tolist()
        self._words = largest[:, Weights._fields.index("words")].tolist()

    def add(self, layer: MultiLora, input: torch.Tensor, output: torch.Tensor, per_row: int) -> None:
        place, family = self._places[layer.name], self._places[layer.family]
        if not self._words[place]:
            return
        if self._low is None or self._low[0] is not input or self._low[1] != family:
            self._low = input, family, self._product(input, family, per_row)
        call = self._call(self._low[2], output, output.shape[1] // self._kind.lanes, place, per_row)
        self._code.add(call, torch.get_num_threads())

    def _product(self, input: torch.Tensor, place: int, per_row: int) -> torch.Tensor:
        """The product of each segment with its A, [rows x per_row, columns of the widest]; valid until the next one."""
        flat = input.reshape(-1, input.shape[-1]).contiguous()
        columns = self._registers[place] * self._kind.lanes
        if self._room.numel() < len(flat) * columns:
            self._room = self._room.new_empty(len(flat) * columns)
        low = self._room[: len(flat) * columns].view(-1, columns)
        words = input.shape[-1] // self._kind.depth
        self._code.low(self._call(flat, low, words, place, per_row), torch.get_num_threads())
        return low

    def _call(self, input: torch.Tensor, output: torch.Tensor, size: int, place: int, per_row: int) -> Call:
        if per_row not in self._bounds:
            bounds = torch.tensor([(start, stop) for start, stop, _ in self._parts])
            self._bounds[per_row] = bounds * per_row
        weights = self._weights
        return Call(
            input.data_ptr(),
            input.stride(0) * self._kind.value,
            output.data_ptr(),
            output.stride(0) * self._kind.value,
            size,
            self._bounds[per_row].data_ptr(),
            weights.data_ptr() + weights.stride(1) * place * NUMBER,
            weights.stride(0) * NUMBER,
            len(weights),
        )


def _padded(matrix: torch.Tensor, rows: int = 1, columns: int = 1) -> torch.Tensor:
    """With zeros after it, up to a multiple of so many rows and columns."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
