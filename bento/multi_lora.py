"""A linear layer that adds another low-rank update to every segment of a batch.

The method is that of segmented multi-adapter serving (Punica's SGMV, arXiv:2310.18547): rows of one adapter stand
together. How the updates of all segments are multiplied is a matter of `Products`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from bento.bf16 import Bf16Weight
from bento.int8 import Int8Values, Int8Weight, quantise
from ft_resources.errors import ServiceError

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer name -> (A transposed [in, rank], B transposed and scaled [rank, out]), float32."""


class Update(ABC):
    """The low-rank matrices of one adapter, in the form in which some `Products` multiply them."""

    @property
    @abstractmethod
    def tensors(self) -> Iterable[torch.Tensor]:
        """All of them."""

    @property
    def finite(self) -> bool:
        """Whether all values are; scaled and rounded they may not be any more."""
        return all(bool(each.isfinite().all()) for each in self.tensors)

    @property
    def nbytes(self) -> int:
        """Memory of the values."""
        return sum(each.nbytes for each in self.tensors)


U = TypeVar("U", bound=Update)


class Products(ABC, Generic[U]):
    """How the updates of a batch are computed."""

    @abstractmethod
    def update(self, pairs: Pairs) -> U:
        """The adapter with these matrices."""

    @abstractmethod
    def begin(self, rows: int, parts: Sequence[tuple[int, int, U]]) -> None:
        """The batch from now on, see `Segments.batch`; what was kept of the one before is let go of."""

    @abstractmethod
    def add(self, layer: "MultiLora", input: torch.Tensor, output: torch.Tensor, per_row: int) -> None:
        """Add to the output of `layer` what each segment's update makes of its input.

        Args:
            input: [..., in], the very tensor that the layer got: the product with A is kept for the next layer, which
                may have got the same.
            output: [rows x per_row, out]
            per_row: Tokens in each row of the batch.
        """


class Segments:
    """Which rows of the batch now in the model belong to which adapter; shared by all layers of one model.

    In a padded batch a row is a text, in a pack it is a token.
    """

    def __init__(self) -> None:
        self.products: Products[Any] | None = None
        """None: no batch has segments yet."""
        self.rows = 0
        self.empty = True
        """Whether no row gets an update."""
        self._input: torch.Tensor | None = None
        self._quantised: Int8Values | None = None

    @contextmanager
    def batch(self, rows: int, parts: Sequence[tuple[int, int, Update]]) -> Iterator[None]:
        """The batch that is computed inside this block; let go of at its end.

        Args:
            parts: (first row, row after the last, update of `products`), in order.
        """
        self._set(rows, parts)
        try:
            yield
        finally:
            self._set(0, ())

    def _set(self, rows: int, parts: Sequence[tuple[int, int, Update]]) -> None:
        self.rows, self.empty = rows, not parts
        self._input = self._quantised = None
        if self.products is not None:
            self.products.begin(rows, parts)

    def quantised(self, input: torch.Tensor) -> Int8Values:
        """The tokens of `input` in int8, rounded once for neighbouring layers that read the same."""
        if self._quantised is None or self._input is not input:
            self._input, self._quantised = input, quantise(input.reshape(-1, input.shape[-1]))
        return self._quantised


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
        if not self.segments.empty and self.segments.products is not None:
            self.segments.products.add(self, input, output.view(-1, self.out_features), self._per_row(input))
        return output

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(self.kernel, Bf16Weight):
            return self.kernel.product(input)
        if self.kernel is not None:
            return self.kernel.product(self.segments.quantised(input)).view(*input.shape[:-1], self.out_features)
        return super().forward(input)

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
