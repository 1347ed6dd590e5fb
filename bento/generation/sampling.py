"""Choosing the next token of every row of a pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MANY = 256
"""So many of the most probable tokens are sorted first; mostly the nucleus is among them."""
GREEDY = 1e-5
"""Below this temperature the most probable token is taken: quotients would leave the range of float32."""


@dataclass(frozen=True)
class Choice:
    """How one row is sampled."""

    temperature: float
    """Below `GREEDY`: the most probable token."""
    top_p: float
    draw: float
    """A number of [0, 1) from the request's own generator: the same logits and draw give the same token."""


def choose(
    logits: torch.Tensor, choices: Sequence[Choice], allowed: torch.Tensor | None = None
) -> tuple[list[int], list[float]]:
    """The next token of each row, and its log-probability at temperature 1 among all tokens.

    A row whose logits are not finite has a log-probability that is no number.

    Args:
        logits: float32 [rows, vocabulary].
        allowed: Tokens that may follow, bool [rows, vocabulary]; None: all.
    """
    normaliser = torch.logsumexp(logits, -1)
    wanted = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
    tokens = wanted.argmax(-1)
    drawn = [row for row, choice in enumerate(choices) if choice.temperature >= GREEDY]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _sample(wanted[rows], [choices[row] for row in drawn])
    found = logits.gather(1, tokens[:, None])[:, 0] - normaliser
    both = torch.stack([tokens.double(), found.double()]).tolist()  # one wait for the device
    return [int(token) for token in both[0]], both[1]


def _sample(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """Inverse transform sampling: the first token at which the summed probabilities pass the draw."""
    device = logits.device
    temperature = torch.tensor([choice.temperature for choice in choices], dtype=torch.float32, device=device)
    draw = torch.tensor([choice.draw for choice in choices], dtype=torch.float32, device=device)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    probabilities = torch.softmax(scaled, -1)
    tokens = torch.empty(len(choices), dtype=torch.long, device=device)
    whole = [row for row, choice in enumerate(choices) if choice.top_p >= 1]
    if whole:
        rows = torch.tensor(whole, device=device)
        tokens[rows] = _inverse(probabilities[rows], draw[rows])
    for row, choice in enumerate(choices):
        if choice.top_p < 1:
            tokens[row] = _nucleus(probabilities[row], choice.top_p, draw[row])
    return tokens


def _nucleus(probabilities: torch.Tensor, top_p: float, draw: torch.Tensor) -> torch.Tensor:
    values, order = probabilities.topk(min(MANY, len(probabilities)))
    if len(values) < len(probabilities) and float(values.sum()) < top_p:
        values, order = probabilities.sort(descending=True, stable=True)
    kept = values.cumsum(0) - values < top_p
    kept[0] = True
    return order[_inverse((values * kept)[None], draw[None])[0]]


def _inverse(weights: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """[rows, n] weights and [rows] draws of [0, 1) -> [rows] numbers with a weight above 0."""
    summed = weights.double().cumsum(-1)
    target = draw.double() * summed[:, -1]
    found = torch.searchsorted(summed, target[:, None], right=True)[:, 0]
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding may carry a draw past the end
    return torch.minimum(found, last)
