"""Linear layers that add to every row the low-rank update of its own adapter.

Two forms, after the phases of generation. Rows that write one token each are multiplied with the low-rank matrices of
all their adapters side by side, and what is not a row's own is set to zero between the two products: few rows cost the
reading of weights, not the arithmetic, and those are read once however many rows share an adapter. Runs of tokens of
one prompt get two plain products (as in Punica's SGMV, arXiv:2310.18547).

Layers that read the same input are one product: their weights lie behind one another in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bento.adapter_files import LowRank

Pair = tuple[torch.Tensor, torch.Tensor]
"""(A [rank, in], B scaled [out, rank]) in the dtype and on the device of the engine."""


class SharedInput:
    """Linear layers of one model that read the same tensor, computed together for the first of them that is called."""

    def __init__(self, layers: Mapping[str, nn.Linear], updates: "Updates") -> None:
        self.names = tuple(layers)
        self.updates = updates
        sizes = [layer.out_features for layer in layers.values()]
        self.starts = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
        first = next(iter(layers.values()))
        self.weight, self.bias = first.weight.detach(), None
        if len(layers) > 1:
            self.weight = torch.cat([layer.weight.detach() for layer in layers.values()])
        if any(layer.bias is not None for layer in layers.values()):
            self.bias = torch.cat(
                [
                    layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                    for layer in layers.values()
                ]
            )
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def member(self, number: int, input: torch.Tensor) -> torch.Tensor:
        """Output [1, tokens, out] of the layer `number` for `input` [1, tokens, in]."""
        if input is not self._input or self._output is None:
            output = nn.functional.linear(input, self.weight, self.bias)
            self.updates.add(self, input, output)
            self._input, self._output = input, output
        if len(self.names) == 1:
            return self._output
        return self._output[..., self.starts[number] : self.starts[number + 1]]

    def forget(self) -> None:
        """Let go of the last input and output."""
        self._input = self._output = None


class Member(nn.Linear):
    """One layer of a group, in its place in the model; its weight is its part of the group's."""

    def __init__(self, linear: nn.Linear, group: SharedInput, number: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        start, stop = group.starts[number], group.starts[number + 1]
        self.weight = nn.Parameter(group.weight[start:stop], requires_grad=False)
        bias = None if group.bias is None else nn.Parameter(group.bias[start:stop], requires_grad=False)
        self.register_parameter("bias", bias)
        self._group, self._number = group, number

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._group.member(self._number, input)


@dataclass(frozen=True)
class Stack:
    """The low-rank matrices of several adapters for one group, side by side."""

    a: torch.Tensor
    """[columns, in]: for every layer of the group, the ranks of one adapter after the other."""
    parts: Sequence[tuple[int, int, int, int, torch.Tensor]]
    """By layer: first output, output after the last, first column, column after the last, B [outputs, columns]."""
    ranks: tuple[tuple[int, ...], ...]
    """By layer and adapter; equal in groups that adapt alike."""


class Mixture:
    """The updates of `adapters`, ready for rows that each belong to one of them."""

    def __init__(self, adapters: Sequence[Mapping[str, Pair]], groups: Sequence[SharedInput]) -> None:
        self.stacks = {group: stack for group in groups if (stack := _stack(adapters, group)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(stack.a.nbytes + sum(part[-1].nbytes for part in stack.parts) for stack in self.stacks.values())

    def pairs(self) -> dict[str, Pair]:
        """The update of every layer of a mixture of one adapter, on the same memory."""
        return {
            group.names[group.starts.index(start)]: (stack.a[first:last], b)
            for group, stack in self.stacks.items()
            for start, _stop, first, last, b in stack.parts
        }

    def foreign(self, owners: torch.Tensor) -> dict[tuple[tuple[int, ...], ...], torch.Tensor]:
        """For every form of stack: which columns [rows, columns] are not the row's own.

        Args:
            owners: The number of each row's adapter [rows], -1 for none.
        """
        return {
            ranks: torch.tensor(
                [number for layer in ranks for number, rank in enumerate(layer) for _ in range(rank)],
                device=owners.device,
            )
            != owners[:, None]
            for ranks in {stack.ranks for stack in self.stacks.values()}
        }


@dataclass
class Updates:
    """Whose updates the pass now in the model gets; shared by all groups of one model."""

    rows: int = 0
    """Tokens at the start of the pass that write, each for an adapter of `mixture`."""
    mixture: Mixture | None = None
    foreign: Mapping[tuple[tuple[int, ...], ...], torch.Tensor] | None = None
    """See `Mixture.foreign`; None: all rows belong to the one adapter there is."""
    runs: Sequence[tuple[int, int, Mixture]] = field(default_factory=tuple)
    """Tokens that read: first, after the last, and the one adapter."""

    def add(self, group: SharedInput, input: torch.Tensor, output: torch.Tensor) -> None:
        """Add to `output` [1, tokens, out] what the adapters make of `input` [1, tokens, in]."""
        stack = self.mixture.stacks.get(group) if self.mixture is not None else None
        if stack is None and not self.runs:
            return
        tokens, sums = input[0], output[0]
        if stack is not None:
            low = nn.functional.linear(tokens[: self.rows], stack.a)
            if self.foreign is not None:
                low.masked_fill_(self.foreign[stack.ranks], 0)  # not multiplied: another's may be infinite
            _add(low, stack, sums[: self.rows])
        for start, stop, alone in self.runs:
            if (stack := alone.stacks.get(group)) is not None:
                _add(nn.functional.linear(tokens[start:stop], stack.a), stack, sums[start:stop])


def place(low: LowRank, dtype: torch.dtype, device: torch.device) -> Pair:
    """An update as the products want it; it is scaled once, in float32."""
    a, b = low.a, low.b * low.scale
    return a.to(device=device, dtype=dtype).contiguous(), b.to(device=device, dtype=dtype).contiguous()


def group_linears(model: nn.Module, sharing: Sequence[Sequence[str]], updates: Updates) -> list[SharedInput]:
    """Replace linear layers of `model` in place.

    Args:
        sharing: Names of the layers, those together that read the same tensor.
    """
    groups = []
    for names in sharing:
        layers = {name: model.get_submodule(name) for name in names}
        group = SharedInput(layers, updates)  # type: ignore[arg-type]
        groups.append(group)
        for number, (name, layer) in enumerate(layers.items()):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Member(layer, group, number))  # type: ignore[arg-type]
    return groups


def _add(low: torch.Tensor, stack: Stack, output: torch.Tensor) -> None:
    for start, stop, first, last, b in stack.parts:
        output[:, start:stop].addmm_(low[:, first:last], b.t())


def _stack(adapters: Sequence[Mapping[str, Pair]], group: SharedInput) -> Stack | None:
    a: list[torch.Tensor] = []
    parts: list[tuple[int, int, int, int, torch.Tensor]] = []
    ranks: list[tuple[int, ...]] = []
    column = 0
    for number, name in enumerate(group.names):
        pairs = [adapter.get(name) for adapter in adapters]
        ranks.append(tuple(0 if pair is None else len(pair[0]) for pair in pairs))
        if not any(ranks[-1]):
            continue
        a += [pair[0] for pair in pairs if pair is not None]
        b = torch.cat([pair[1] for pair in pairs if pair is not None], 1)
        parts.append((group.starts[number], group.starts[number + 1], column, column + b.shape[1], b))
        column += b.shape[1]
    if not parts:
        return None
    return Stack(torch.cat(a), tuple(parts), tuple(ranks))
