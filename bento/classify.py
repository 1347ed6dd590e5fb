"""From hidden states to answers, and how texts are grouped into passes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ft_resources.errors import ServiceError


@dataclass(frozen=True)
class Scored:
    """The answer to one text."""

    label: str
    confidence: float
    probabilities: np.ndarray
    """float32 [labels], sums to 1; order of `labels`."""
    labels: tuple[str, ...]
    embedding: np.ndarray
    """float16 [hidden]: the pooled last hidden state the head saw."""


def passes(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of texts, longest first, in groups whose padded size stays within `budget` tokens."""
    group: list[int] = []
    width = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if group and (len(group) + 1) * width > budget:
            yield group
            group = []
        width = width if group else lengths[place]
        group.append(place)
    if group:
        yield group


def classify(
    pooled: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: tuple[str, ...], temperature: float
) -> Iterator[Scored]:
    """Answers of one head to its rows.

    Args:
        pooled: float32 [rows, hidden].
        weight: float32 [labels, hidden].
        bias: float32 [labels].

    Raises:
        ServiceError: A probability is not finite.
    """
    logits = torch.nn.functional.linear(pooled, weight, bias)
    probabilities = torch.softmax(logits / temperature, dim=-1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise ServiceError(
            "the model gives values that are not finite",
            mend="Serve it with precision fp32, or train it with a smaller learning rate.",
        )
    embeddings = pooled.to(torch.float16).cpu().numpy()
    for row, embedding in zip(probabilities, embeddings, strict=True):
        best = int(row.argmax())
        yield Scored(labels[best], float(row[best]), row, labels, embedding)
