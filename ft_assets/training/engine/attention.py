"""Attention within packed rows: each row attends to itself alone, without padding and without a mask of the whole pack.

`bento.packing` says where the rows of a pack lie. The library's kernels have a slow backward pass on CPUs; matrix
products and a softmax over rows of like length, with a backward pass of our own, are the faster way there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface

from bento.packing import Layout, gathered, scores

SEGMENTS, SEGMENTS_LIBRARY = "ft_segments", "ft_segments_library"
"""Names of our attention, and of the library's kernel row by row, for `attn_implementation`."""

_present: list[Layout] = []
"""Seen by every thread: off the CPU the backward pass, and what checkpointing computes again in it, has its own."""


@contextmanager
def laid_out(how: Layout) -> Iterator[None]:
    """The pack that is computed inside this block; covers the backward pass."""
    _present[:] = [how]
    try:
        yield
    finally:
        _present.clear()


class SegmentAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v within each row of a pack."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        how: Layout,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Args: query [heads, tokens, width]; key and value [key heads, tokens, width]. Returns as query."""
        (heads, tokens, width), key_heads = query.shape, key.shape[0]
        shared = heads // key_heads
        places, key_places = how.rows(heads, shared), how.rows(key_heads)
        queries = gathered(query, places.source).mul_(scale)
        keys, values = gathered(key, key_places.source), gathered(value, key_places.source)
        output = torch.empty_like(queries)
        kept = []
        for group in how.groups:
            q, k, v, out = (how.part(each, group, key_heads) for each in (queries, keys, values, output))
            kept.append(torch.softmax(scores(q, k, how.mask(group, key_heads, shared, causal=causal)), -1))
            torch.bmm(kept[-1], v, out=out)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.how, ctx.scale, ctx.heads, ctx.key_heads = how, scale, heads, key_heads
        return output.index_select(0, places.target).view(tokens, heads, width).transpose(0, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        how, scale, heads, key_heads = ctx.how, ctx.scale, ctx.heads, ctx.key_heads  # type: ignore[attr-defined]
        places, key_places = how.rows(heads, heads // key_heads), how.rows(key_heads)
        gradient = gathered(gradients[0], places.source).index_fill_(0, places.padding, 0)
        for_queries, for_keys, for_values = (torch.empty_like(each) for each in (queries, keys, values))
        for group, weights in zip(how.groups, kept, strict=True):
            q, k, v, g, for_q, for_k, for_v = (
                how.part(each, group, key_heads)
                for each in (queries, keys, values, gradient, for_queries, for_keys, for_values)
            )
            torch.bmm(weights.transpose(1, 2), g, out=for_v)
            for_weights = torch.bmm(g, v.transpose(1, 2))
            for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
            torch.bmm(for_scores, k, out=for_q)
            torch.bmm(for_scores.transpose(1, 2), q, out=for_k)
        for_queries.mul_(scale)
        return (
            _scattered(for_queries, places.target, how, heads),
            _scattered(for_keys, key_places.target, how, key_heads),
            _scattered(for_values, key_places.target, how, key_heads),
            None,
            None,
            None,
        )


def _scattered(flat: torch.Tensor, target: torch.Tensor, how: Layout, heads: int) -> torch.Tensor:
    """[places x heads, width] as [heads, tokens, width]; zero for what belongs to no row."""
    tokens = flat.index_select(0, target).view(how.tokens, heads, -1)
    tokens[sum(how.lengths) :] = 0
    return tokens.transpose(0, 1)


def _segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    how = _present[0]
    heads = (each[0].to(how.dtype) for each in (query, key, value))  # rotary embeddings may leave them in float32
    output = SegmentAttention.apply(*heads, how, scale, _is_causal(module))
    return output.unsqueeze(0).transpose(1, 2), None


def _segments_library(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    how, start, outputs = _present[0], 0, []
    for length in how.lengths:
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start : start + length],
                key[:, :, start : start + length],
                value[:, :, start : start + length],
                scale=scaling,
                is_causal=_is_causal(module),
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
        start += length
    filled = torch.nn.functional.pad(torch.cat(outputs, 2), (0, 0, 0, how.tokens - start))
    return filled.transpose(1, 2), None


def _is_causal(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))


for _name, _function in ((SEGMENTS, _segments), (SEGMENTS_LIBRARY, _segments_library)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, lambda *_args, **_kwargs: None)  # a pack needs no mask
