"""Texts in one row without padding: every token-wise layer computes real tokens only, attention stays within a text.

Attention brings texts of like length together, so that it pads hardly any.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from bento.shapes import rounded

PACKED = "ft_packed"
"""Name of this attention, for `set_attn_implementation`."""
SUMS = (1e-30, 1e30)
"""Sums of exponentials between these lost nothing that bfloat16 could tell."""


@dataclass(frozen=True)
class Group:
    """Texts that are attended to together: padded with their own first token to one width."""

    texts: int
    width: int
    start: int
    """Its first place, of the texts x width of all groups one after the other."""
    mask: torch.Tensor | None
    """float32 [texts, 1, width]: -inf at padding; None: there is none."""


@dataclass(frozen=True)
class Layout:
    """Where the texts of a pack lie."""

    tokens: int
    """Of the pack; what follows the last text belongs to nobody."""
    groups: tuple[Group, ...]
    source: torch.Tensor
    """long [places]: the token at each place of the groups."""
    target: torch.Tensor
    """long [tokens]: the place of each token."""
    dtype: torch.dtype
    """What attention computes in."""
    _rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def rows(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`source` and `target` by head: the rows of [tokens x heads] that make up each group's [heads x texts x
        width], and the rows of these that make up [tokens x heads]."""
        if heads not in self._rows:
            head = torch.arange(heads, device=self.source.device)
            source, starts, sizes = [], [], []
            for group in self.groups:
                size = group.texts * group.width
                source.append((self.source[group.start : group.start + size] * heads + head[:, None]).flatten())
                starts += [group.start] * size
                sizes += [size] * size
            start = torch.tensor(starts, device=self.source.device)[self.target, None]
            places = torch.tensor(sizes, device=self.source.device)[self.target, None]
            target = start * heads + head * places + (self.target[:, None] - start)
            self._rows[heads] = torch.cat(source), target.flatten()
        return self._rows[heads]


def layout(lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of texts of these lengths, one after the other."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    alike: dict[int, list[int]] = {}
    for text, length in enumerate(lengths):
        alike.setdefault(rounded(length, 8, 16), []).append(text)
    groups, sources, places = [], [], 0
    target = torch.zeros(rounded(starts[-1], 8, 32), dtype=torch.long)
    for width, texts in alike.items():
        first, inside = torch.tensor([starts[text] for text in texts])[:, None], torch.arange(width)
        there = inside < torch.tensor([lengths[text] for text in texts])[:, None]
        source = torch.where(there, first + inside, first)
        target[source[there]] = places + there.flatten().nonzero().flatten()
        count = rounded(len(texts), 1, 16)
        spare = count - len(texts)
        mask = None
        if not there.all():
            mask = torch.zeros(there.shape, dtype=dtype).masked_fill_(~there, -torch.inf)
            mask = torch.cat([mask, mask[:1].expand(spare, -1)])[:, None].to(device)
        groups.append(Group(count, width, places, mask))
        sources.append(torch.cat([source, source[:1].expand(spare, -1)]).flatten())
        places += count * width
    return Layout(len(target), tuple(groups), torch.cat(sources).to(device), target.to(device), dtype)


_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def laid_out(how: Layout) -> Iterator[None]:
    """The pack that is computed inside this block."""
    token = _layout.set(how)
    try:
        yield
    finally:
        _layout.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scale * q k^T) v within each text; [1, heads, tokens, width] each, [1, tokens, heads, width] returned."""
    how = _layout.get()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    _, heads, _, width = query.shape
    source, target = how.rows(heads)
    queries, keys, values = (
        each[0].transpose(0, 1).reshape(-1, width).to(how.dtype).index_select(0, source) for each in (query, key, value)
    )
    queries.mul_(scale)
    states = torch.empty_like(queries)
    for group in how.groups:
        shape = (heads * group.texts, group.width, width)
        part = slice(group.start * heads, group.start * heads + shape[0] * shape[1])
        q, k, v, out = (each[part].view(shape) for each in (queries, keys, values, states))
        softmax_product(q, k, v, None if group.mask is None else group.mask.repeat(heads, 1, 1), out)
    return states.index_select(0, target).view(1, how.tokens, heads, width).to(query.dtype), None


def softmax_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = softmax(q k^T + mask) v; [texts, width, width of a head] each."""
    keys = key.transpose(1, 2)
    scores = torch.bmm(query, keys) if mask is None else torch.baddbmm(mask, query, keys)
    if scores.dtype == torch.bfloat16:
        # without the search for the largest score, and divided at the end: half the time of a softmax
        weights = scores.exp_()
        sums = weights.sum(-1, keepdim=True)
        low, high = sums.aminmax()
        if low > SUMS[0] and high < SUMS[1]:
            torch.bmm(weights, value, out=out).div_(sums)
            return
        scores = torch.bmm(query, keys) if mask is None else torch.baddbmm(mask, query, keys)
    torch.bmm(torch.softmax(scores, -1), value, out=out)


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, lambda *_args, **_options: None)  # a pack needs no mask
