"""A moving average of the weights that are trained: better on new rows than the last (Polyak and Juditsky, 1992)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average over about the last steps.

    Args:
        weights: What is trained, by name.
        share: The window as a share of the steps taken so far, so that the beginning is forgotten.
    """

    def __init__(self, weights: Mapping[str, torch.nn.Parameter], share: float) -> None:
        self._weights, self._share = weights, share
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}
        """The average, by the weights' names."""

    def follow(self, step: int) -> None:
        """Take in the weights as they are after step number `step`, counted from 1."""
        decay = 1.0 - 1.0 / max(1.0, self._share * step)
        current = [weight.detach() for weight in self._weights.values()]
        get_ema_multi_avg_fn(decay)(list(self.tensors.values()), current, step)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Inside, the weights are their average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            current = weight.detach().clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(current)
