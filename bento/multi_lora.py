"""A linear layer that adds another low-rank update to every segment of a batch.

The method is that of segmented multi-adapter serving (Punica's SGMV, arXiv:2310.18547) with one plain matrix
product per segment: rows of one adapter stand together, and each segment gets the update of its own adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ft_resources.errors import ServiceError

Update = tuple[torch.Tensor, torch.Tensor]
"""(A transposed [in, rank], B transposed and scaled [rank, out]) in the dtype and on the device of the engine."""


@dataclass
class Segments:
    """Which rows of the batch now in the model belong to which adapter; shared by all layers of one model."""

    rows: int = 0
    parts: Sequence[tuple[int, int, Mapping[str, Update]]] = field(default_factory=tuple)
    """(first row, row after the last, module name -> update), in order."""


class MultiLora(nn.Linear):
    """`linear` itself, on the same weight tensors, plus the update of each segment.

    Shapes: input [rows, ..., in], output [rows, ..., out]; `rows` is `segments.rows`.
    """

    def __init__(self, name: str, linear: nn.Linear, segments: Segments) -> None:
        nn.Module.__init__(self)
        self.name, self.segments = name, segments
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Raises:
        ServiceError: The first dimension of the input is not the batch.
        """
        output = super().forward(input)
        for start, stop, updates in self.segments.parts:
            update = updates.get(self.name)
            if update is None:
                continue
            if input.shape[0] != self.segments.rows:
                raise ServiceError(
                    f"layer '{self.name}' gets {input.shape[0]} rows for a batch of {self.segments.rows}",
                    mend="This base model does not keep the batch first; exclude the layer from the adapter's targets.",
                )
            a, b = update
            low = input[start:stop].reshape(-1, self.in_features) @ a
            output[start:stop].view(-1, self.out_features).addmm_(low, b)
        return output


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
