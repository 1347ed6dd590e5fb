"""Attention within packed rows: each row attends to itself alone, without padding and without a mask of the whole pack.

`bound(pack)` tells the attention of every layer where the rows of a pack begin and end. The library's kernels have a
slow backward pass on CPUs; matrix products and a softmax, with a backward pass of our own, are the faster way there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface

SEGMENTS, SEGMENTS_LIBRARY = "ft_segments", "ft_segments_library"
"""Names of our attention, and of the library's kernel row by row, for `attn_implementation`."""

_bounds: list[tuple[int, int]] = []


@contextmanager
def bound(bounds: list[tuple[int, int]]) -> Iterator[None]:
    """Rows of the pack that is computed inside this block, as (start, end) token places; covers the backward pass."""
    _bounds[:] = bounds
    try:
        yield
    finally:
        _bounds.clear()


class SegmentAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v within each segment.

    Query heads that share a key head (grouped-query attention) are folded into the rows of one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: list[tuple[int, int]],
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        """Args: query [heads, tokens, width]; key and value [key heads, tokens, width]. Returns as query."""
        output = _like(query)
        weights = []
        for start, end in bounds:
            folded = _fold(query, start, end, key.shape[0])
            scores = torch.bmm(folded, key[:, start:end].transpose(1, 2)).mul_(scale)
            if causal:
                _hide_later(scores, end - start)
            weight = torch.softmax(scores, -1)
            weights.append(weight)
            output[:, start:end] = torch.bmm(weight, value[:, start:end]).view(query.shape[0], end - start, -1)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.bounds, ctx.scale = bounds, scale
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors  # type: ignore[attr-defined]
        heads, key_heads = query.shape[0], key.shape[0]
        for_query, for_key, for_value = _like(query), _like(key), _like(value)
        for (start, end), weight in zip(ctx.bounds, weights, strict=True):  # type: ignore[attr-defined]
            gradient = _fold(gradients[0], start, end, key_heads)
            for_value[:, start:end] = torch.bmm(weight.transpose(1, 2), gradient)
            for_weight = torch.bmm(gradient, value[:, start:end].transpose(1, 2))
            scores = torch._softmax_backward_data(for_weight, weight, -1, weight.dtype).mul_(ctx.scale)  # type: ignore[attr-defined]
            for_query[:, start:end] = torch.bmm(scores, key[:, start:end]).view(heads, end - start, -1)
            for_key[:, start:end] = torch.bmm(scores.transpose(1, 2), _fold(query, start, end, key_heads))
        return for_query, for_key, for_value, None, None, None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros [heads, tokens, width] whose memory lies token by token, as the next layer reads it."""
    heads, tokens, width = tensor.shape
    return tensor.new_zeros(tokens, heads, width).transpose(0, 1)


def _fold(tensor: torch.Tensor, start: int, end: int, groups: int) -> torch.Tensor:
    """[heads, tokens, width] from `start` to `end` as [groups, heads per group x tokens, width]."""
    return tensor[:, start:end].reshape(groups, -1, tensor.shape[-1])


def _hide_later(scores: torch.Tensor, length: int) -> None:
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(-1, length, length).masked_fill_(later, float("-inf"))


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
    output = SegmentAttention.apply(query[0], key[0], value[0], list(_bounds), scale, _is_causal(module))
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
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            scale=scaling,
            is_causal=_is_causal(module),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in _bounds
    ]
    filled = torch.nn.functional.pad(torch.cat(outputs, 2), (0, 0, 0, query.shape[2] - _bounds[-1][1]))
    return filled.transpose(1, 2), None


def _is_causal(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))


for _name, _function in ((SEGMENTS, _segments), (SEGMENTS_LIBRARY, _segments_library)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, lambda *_args, **_kwargs: None)  # a pack needs no mask
