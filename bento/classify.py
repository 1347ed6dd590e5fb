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


def passes(lengths: Sequence[int], budget: int, *, padded: bool) -> Iterator[list[int]]:
    """Places of texts, longest first, in groups that stay within `budget` tokens.

    Args:
        padded: A text counts as many tokens as the longest of its group.
    """
    group: list[int] = []
    width = tokens = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = width if padded and group else lengths[place]
        if group and tokens + length > budget:
            yield group
            group, tokens, length = [], 0, lengths[place]
        if not group:
            width = length
        group.append(place)
        tokens += length
    if group:
        yield group


@dataclass(frozen=True)
class Head:
    """Which rows a classification head answers."""

    start: int
    stop: int
    weight: torch.Tensor
    """float32 [labels, hidden]"""
    bias: torch.Tensor
    """float32 [labels]"""
    labels: tuple[str, ...]
    temperature: float


def classify(pooled: torch.Tensor, heads: Sequence[Head]) -> list[Scored]:
    """The answer to each row.

    Args:
        pooled: float32 [rows, hidden].
        heads: In the order of their rows, which are all.

    Raises:
        ServiceError: A probability is not finite.
    """
    most = max(len(head.labels) for head in heads)
    logits = torch.full((len(pooled), most), -torch.inf, dtype=torch.float32, device=pooled.device)
    for head in heads:
        rows = torch.nn.functional.linear(pooled[head.start : head.stop], head.weight, head.bias)
        logits[head.start : head.stop, : len(head.labels)] = rows / head.temperature
    probabilities = torch.softmax(logits, dim=-1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise ServiceError(
            "the model gives values that are not finite",
            mend="Serve it with precision fp32, or train it with a smaller learning rate.",
        )
    embeddings = pooled.to(torch.float16).cpu().numpy()
    best = probabilities.argmax(1).tolist()
    return [
        Scored(
            head.labels[best[row]],
            float(probabilities[row, best[row]]),
            probabilities[row, : len(head.labels)],
            head.labels,
            embeddings[row],
        )
        for head in heads
        for row in range(head.start, head.stop)
    ]
