"""What the frozen lower layers give for a row never changes: computed once, then replayed at every epoch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ft_assets.training.engine.examples import Example
from ft_resources.errors import TrainingError


def layers_of(network: Any) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of the transformer layers of `network`.

    Raises:
        TrainingError: It has no such list, as models that share one layer.
    """
    count = getattr(network.config, "num_hidden_layers", None)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, module
    raise TrainingError(
        f"a base model of type {network.config.model_type} has no list of separate layers",
        where="lora.top_layers",
        mend="Leave it out.",
    )


class _Reached(Exception):
    """The first trained layer was reached: what is above is not needed."""


@dataclass
class Recorded:
    """What entered the first trained layer in a forward pass that stopped there."""

    states: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def _skip(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stands for the computation of a lower layer while its result is replayed."""
    return hidden_states


class LowerLayers:
    """The first `count` layers of a model, and what they gave for each row that was kept.

    Args:
        kept: Where it is kept, by the number of the row: another run with the same layers and rows goes on with it.
    """

    def __init__(self, inner: Any, count: int, kept: dict[int, torch.Tensor]) -> None:
        _, self._layers = layers_of(inner)
        self._count = count
        self.kept = kept

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Stop a forward pass inside this block at the first trained layer and record what would enter it."""
        recorded = Recorded()

        def stop(_: Any, arguments: tuple[Any, ...]) -> None:
            recorded.states = arguments[0]
            raise _Reached

        handle = self._layers[self._count].register_forward_pre_hook(stop)
        try:
            yield recorded
        except _Reached:
            pass
        finally:
            handle.remove()

    def keep(self, examples: Sequence[Example], states: torch.Tensor) -> None:
        """Remember `states` [tokens, hidden] of `examples`, row after row."""
        for one, part in zip(examples, states.split([len(one.ids) for one in examples]), strict=True):
            self.kept[one.number] = part.clone()

    def of(self, examples: Sequence[Example]) -> torch.Tensor:
        """What was kept for `examples`: [tokens, hidden], row after row."""
        return torch.cat([self.kept[one.number] for one in examples])

    @contextmanager
    def replaying(self, states: torch.Tensor) -> Iterator[None]:
        """Let a forward pass inside this block start above the lower layers, with `states`."""
        lower = self._layers[: self._count]

        def enter(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (states, *arguments[1:])

        handle = self._layers[self._count].register_forward_pre_hook(enter)
        for layer in lower:
            layer.forward = _skip
        try:
            yield
        finally:
            handle.remove()
            for layer in lower:
                del layer.forward
