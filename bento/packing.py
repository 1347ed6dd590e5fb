"""Texts in one row without padding: every token-wise layer computes real tokens only, attention stays within a text.

Attention brings texts of like length together, so that it needs a mask for few and pads hardly any.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "ft_packed"
"""Name of this attention, for `set_attn_implementation`."""
STEP = 16
"""Texts whose lengths round up to the same multiple of this are attended to together."""
NARROW = 64
"""Softmax over fewer scores than this is faster in float32."""


@dataclass(frozen=True)
class Group:
    """Texts that are attended to together: padded with their own first token to the longest."""

    texts: int
    width: int
    source: torch.Tensor
    """long [texts x width]: the place in the pack of each token."""
    real: torch.Tensor | None
    """long [tokens]: which of the texts x width are no padding; None: all."""
    target: torch.Tensor
    """long [tokens]: the places in the pack of those."""
    mask: torch.Tensor | None
    """float32 [texts, 1, width]: -inf at padding; None: there is none."""


@dataclass(frozen=True)
class Layout:
    """Where the texts of a pack lie."""

    tokens: int
    groups: tuple[Group, ...]
    dtype: torch.dtype
    """What attention computes in."""


def layout(lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of texts of these lengths, one after the other."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    alike: dict[int, list[int]] = {}
    for text, count in enumerate(lengths):
        alike.setdefault(-(-count // STEP), []).append(text)
    groups = []
    for texts in alike.values():
        first = torch.tensor([starts[text] for text in texts])[:, None]
        counts = torch.tensor([lengths[text] for text in texts])[:, None]
        width = int(counts.max())
        inside = torch.arange(width)[None]
        there = inside < counts
        source = torch.where(there, first + inside, first)
        full = bool(there.all())
        groups.append(
            Group(
                texts=len(texts),
                width=width,
                source=source.flatten().to(device),
                real=None if full else there.flatten().nonzero().flatten().to(device),
                target=source[there].to(device),
                mask=None
                if full
                else torch.zeros(there.shape, dtype=torch.float32).masked_fill_(~there, -torch.inf)[:, None].to(device),
            )
        )
    return Layout(starts[-1], tuple(groups), dtype)


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
    queries, keys, values = ((query * scale)[0].to(how.dtype), key[0].to(how.dtype), value[0].to(how.dtype))
    heads, _, width = queries.shape
    output = torch.empty(how.tokens, heads, width, dtype=how.dtype, device=query.device)
    for group in how.groups:
        q, k, v = (
            each.index_select(1, group.source).view(heads * group.texts, group.width, width)
            for each in (queries, keys, values)
        )
        if group.mask is None:
            scores = torch.bmm(q, k.transpose(1, 2))
        else:
            scores = torch.baddbmm(group.mask.to(how.dtype).repeat(heads, 1, 1), q, k.transpose(1, 2))
        if group.width < NARROW:
            scores = scores.float()
        states = torch.bmm(torch.softmax(scores, -1).to(how.dtype), v).view(heads, -1, width).transpose(0, 1)
        output.index_copy_(0, group.target, states if group.real is None else states.index_select(0, group.real))
    return output.to(query.dtype)[None], None


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, lambda *_args, **_options: None)  # a pack needs no mask
