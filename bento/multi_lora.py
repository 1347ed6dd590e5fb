"""A linear layer that adds another low-rank update to every segment of a batch.

The method is that of segmented multi-adapter serving (Punica's SGMV, arXiv:2310.18547) with one plain matrix
product per segment: rows of one adapter stand together, and each segment gets the update of its own adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bento.int8 import Int8Values, Int8Weight, quantise
from ft_resources.errors import ServiceError

Update = tuple[torch.Tensor, torch.Tensor]
"""(A transposed [in, rank], B transposed and scaled [rank, out]) in the dtype and on the device of the engine."""


@dataclass
class Segments:
    """Which rows of the batch now in the model belong to which adapter; shared by all layers of one model.

    In a padded batch a row is a text, in a pack it is a token.
    """

    rows: int = 0
    parts: Sequence[tuple[int, int, Mapping[str, Update]]] = field(default_factory=tuple)
    """(first row, row after the last, module name -> update), in order."""
    quantised: tuple[torch.Tensor, Int8Values] | None = None
    """The last input and what it is in int8: query, key and value read the same one."""


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
        output = super().forward(input) if self.int8 is None else self._int8(self.int8, input)
        if not self.segments.parts:
            return output
        flat_input = flat_output = None
        for start, stop, updates in self.segments.parts:
            update = updates.get(self.name)
            if update is None:
                continue
            if flat_input is None or flat_output is None:
                per_row = self._per_row(input)
                flat_input, flat_output = input.reshape(-1, self.in_features), output.view(-1, self.out_features)
            a, b = update
            places = slice(start * per_row, stop * per_row)
            flat_output[places].addmm_(flat_input[places] @ a, b)
        return output

    def _int8(self, weight: Int8Weight, input: torch.Tensor) -> torch.Tensor:
        known = self.segments.quantised
        if known is None or known[0] is not input:
            known = self.segments.quantised = (input, quantise(input.reshape(-1, self.in_features)))
        return weight.product(known[1]).view(*input.shape[:-1], self.out_features)

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
