"""Attention of a pass whose tokens belong to many requests, over the keys and values of each.

A pass holds first the rows that write one token each, lane by lane, then runs of tokens of prompts. The model calls
`attend` for each layer through transformers' attention interface; `planned` says what the pass consists of.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from bento.generation.cache import Lane
from ft_resources.errors import ServiceError

NAME = "ft_generation"
"""Of this attention, for `attn_implementation`."""
NOT_COMPUTED = ("softcap", "s_aux", "sinks")
"""What some models ask of their attention beside the plain softmax."""


@dataclass(frozen=True)
class Rows:
    """Tokens of a pass that write, one for each of the first slots of a lane."""

    start: int
    lane: Lane
    places: torch.Tensor
    """Where in its slot each token stands, [rows]."""
    longest: int
    """Places that any of the rows looks at."""
    hidden: torch.Tensor | None
    """-inf where a row does not look, else 0: [rows, 1, 1, longest]; None: all look at all."""


@dataclass(frozen=True)
class Run:
    """Tokens of a pass that one request reads, in order."""

    start: int
    stop: int
    lane: Lane | None
    """None: nothing is kept of them, and nothing stands before them."""
    slot: int = 0
    past: int = 0
    """Tokens of the request that were read before."""
    hidden: torch.Tensor | None = None
    """-inf above the diagonal, else 0: [tokens, past + tokens]; None where nothing stands before them."""


@dataclass(frozen=True)
class Plan:
    """What the tokens of a pass are."""

    rows: Sequence[Rows] = ()
    runs: Sequence[Run] = ()


def lower_triangle(tokens: int, past: int, like: torch.Tensor) -> torch.Tensor:
    """`Run.hidden` in the dtype and on the device of `like`."""
    hidden = torch.full((tokens, past + tokens), float("-inf"), dtype=like.dtype, device=like.device)
    return hidden.triu_(past + 1)


_now = threading.local()


@contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """The plan of the pass that this thread computes inside this block."""
    _now.plan = plan
    try:
        yield
    finally:
        del _now.plan


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Keep the keys and values of the pass where they belong, and attend.

    Args:
        query: [1, heads, tokens, width].
        key, value: [1, key heads, tokens, width].

    Returns:
        [1, tokens, heads, width], and no weights.

    Raises:
        ServiceError: The model asks for an attention that this is not.
    """
    for name in NOT_COMPUTED:
        if more.get(name) is not None:
            raise ServiceError(f"the base model's attention has '{name}'", mend="Use another base model.")
    plan: Plan = _now.plan
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, width]
    output = query.new_empty(queries.shape)
    for rows in plan.rows:
        stop = rows.start + len(rows.places)
        output[rows.start : stop] = _rows(
            rows, layer, queries[rows.start : stop], keys[rows.start : stop], values[rows.start : stop], scaling
        )
    for run in plan.runs:
        part = slice(run.start, run.stop)
        seen_keys, seen_values = keys[part], values[part]
        if run.lane is not None:
            at, end = run.past, run.past + run.stop - run.start
            slot_keys, slot_values = run.lane.keys[layer, run.slot], run.lane.values[layer, run.slot]
            slot_keys[at:end], slot_values[at:end] = seen_keys, seen_values
            if run.past:
                seen_keys, seen_values = slot_keys[:end], slot_values[:end]
        attended = scaled_dot_product_attention(
            query[:, :, part],
            seen_keys.transpose(0, 1).unsqueeze(0),
            seen_values.transpose(0, 1).unsqueeze(0),
            attn_mask=run.hidden,
            is_causal=run.hidden is None and run.stop - run.start > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output[part] = attended[0].transpose(0, 1)
    return output.unsqueeze(0), None


def _rows(
    rows: Rows, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One token for each slot; query heads that share a key head (grouped-query attention) are rows of one product.

    Args: query [rows, heads, width]; key and value [rows, key heads, width]. Returns as query.
    """
    count, heads, width = query.shape
    slots = rows.lane.numbers[:count]
    kept_keys, kept_values = rows.lane.keys[layer], rows.lane.values[layer]
    kept_keys[slots, rows.places], kept_values[slots, rows.places] = key, value
    attended = scaled_dot_product_attention(
        query.reshape(count, key.shape[1], heads // key.shape[1], width),
        kept_keys[:count, : rows.longest].transpose(1, 2),
        kept_values[:count, : rows.longest].transpose(1, 2),
        attn_mask=rows.hidden,
        scale=scaling,
    )
    return attended.reshape(count, heads, width)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)  # the plan says who sees what
