"""Texts in one row without padding: every token-wise layer computes real tokens only, attention stays within a text.

Attention is `bento.native`'s where that can compute it. Elsewhere texts of like length are brought together, so that
hardly any is padded. Training packs its rows the same way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from bento.native.attention import attended, unfit
from bento.shapes import rounded

PACKED = "ft_packed"
"""Name of this attention, for `set_attn_implementation`."""
SUMS = (1e-30, 1e30)
"""Sums of exponentials between these lost nothing to the range of the type."""


class Rows(NamedTuple):
    """How tokens by head [tokens x heads] become the texts that are attended to together, and back."""

    source: torch.Tensor
    """long [places x heads]: for each row of the groups, the row of the tokens."""
    target: torch.Tensor
    """long [tokens x heads]: for each row of the tokens, the row of the groups; any for what belongs to no text."""
    padding: torch.Tensor
    """long: rows of the groups that are no token of a text."""


@dataclass(frozen=True)
class Group:
    """Texts that are attended to together: padded with their own first token to one width."""

    texts: int
    width: int
    start: int
    """Its first place, of the texts x width of all groups one after the other."""
    mask: torch.Tensor | None
    """[texts, 1, width]: -inf at padding, else 0; None: there is none."""


@dataclass(frozen=True)
class Layout:
    """Where the texts of a pack lie.

    Query heads that share a key head (grouped-query attention) lie one after the other in each text, so that they are
    rows of one product: a group is [key heads x texts, shared x width, width of a head].
    """

    lengths: tuple[int, ...]
    """Of the texts, which follow each other."""
    dtype: torch.dtype
    """What attention computes in."""
    device: torch.device
    _rows: dict[tuple[int, int], Rows] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int], torch.Tensor | None] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> int:
        """Of the pack; what follows the last text belongs to nobody."""
        return pack_tokens(sum(self.lengths))

    @cached_property
    def bounds(self) -> torch.Tensor:
        """long [texts, 2]: first token of each text, and the one after its last."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return torch.stack([ends - torch.tensor(self.lengths), ends], 1)

    @cached_property
    def _grouped(self) -> tuple[tuple[Group, ...], torch.Tensor, torch.Tensor]:
        starts = self.bounds[:, 0].tolist()
        alike: dict[int, list[int]] = {}
        for text, length in enumerate(self.lengths):
            if length:
                alike.setdefault(rounded(length, 8, 16), []).append(text)
        groups, sources, reals, places = [], [], [], 0
        for width, texts in alike.items():
            source, real = padded_rows([starts[text] for text in texts], [self.lengths[text] for text in texts], width)
            count = rounded(len(texts), 1, 16)
            spare = (0, 0, 0, count - len(texts))
            mask = None
            if not real.all():
                mask = torch.zeros(real.shape, dtype=self.dtype).masked_fill_(~real, -torch.inf)
                mask = torch.nn.functional.pad(mask, spare)[:, None].to(self.device)
            groups.append(Group(count, width, places, mask))
            sources.append(torch.nn.functional.pad(source, spare).flatten())
            reals.append(torch.nn.functional.pad(real, spare).flatten())
            places += count * width
        return tuple(groups), torch.cat(sources).to(self.device), torch.cat(reals).to(self.device)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Texts that are attended to together."""
        return self._grouped[0]

    @property
    def source(self) -> torch.Tensor:
        """long [places]: the token at each place of the groups."""
        return self._grouped[1]

    @property
    def real(self) -> torch.Tensor:
        """bool [places]: whether it is no padding."""
        return self._grouped[2]

    def rows(self, heads: int, shared: int = 1) -> Rows:
        """How tokens by head become groups.

        Args:
            shared: Heads that lie one after the other in a text.
        """
        if (heads, shared) not in self._rows:
            device = self.source.device
            head = torch.arange(heads, device=device).view(-1, 1, shared, 1)
            sources, reals = [], []
            for group in self.groups:
                part = slice(group.start, group.start + group.texts * group.width)
                grid = (1, group.texts, 1, group.width)
                sources.append((self.source[part].view(grid) * heads + head).flatten())
                reals.append(self.real[part].view(grid).expand(len(head), -1, shared, -1).flatten())
            source, real = torch.cat(sources), torch.cat(reals)
            target = torch.zeros(self.tokens * heads, dtype=torch.long, device=device)
            target[source[real]] = real.nonzero().flatten()
            self._rows[heads, shared] = Rows(source, target, (~real).nonzero().flatten())
        return self._rows[heads, shared]

    def part(self, flat: torch.Tensor, group: Group, key_heads: int) -> torch.Tensor:
        """The rows of `group` in a tensor [places x heads, width of a head]."""
        heads = len(flat) // len(self.source)
        part = flat[group.start * heads : (group.start + group.texts * group.width) * heads]
        return part.view(key_heads * group.texts, -1, flat.shape[-1])

    def mask(self, group: Group, key_heads: int, shared: int = 1, *, causal: bool = False) -> torch.Tensor | None:
        """-inf where nothing is looked at, else 0, for scores [key heads x texts, shared x width, width]."""
        key = (group.start, key_heads, shared * causal)
        if key not in self._masks:
            if causal:  # padding follows the text, so that no token of it looks there
                shape = (group.width, group.width)
                later = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.source.device).triu_(1)
                self._masks[key] = later.repeat(shared, 1)[None]
            else:
                self._masks[key] = None if group.mask is None else group.mask.repeat(key_heads, 1, 1)
        return self._masks[key]


def pack_tokens(tokens: int) -> int:
    """Tokens of the pack that holds `tokens`."""
    return rounded(tokens, 8, 32)


def pack(rows: Sequence[Sequence[int]], first: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of the pack that holds `rows`, long [1, tokens of the pack] each.

    Args:
        first: Position of the first token of a row, see `first_place`.
    """
    tokens = sum(map(len, rows))
    spare = pack_tokens(tokens) - tokens
    ids = [token for row in rows for token in row] + [0] * spare
    places = [place for row in rows for place in range(first, first + len(row))] + [first] * spare
    return torch.tensor([ids], device=device), torch.tensor([places], device=device)


def first_place(model: Any) -> int:
    """Position of the first token of a row: RoBERTa and its kin count from the padding token's number on."""
    embeddings: Any = getattr(model, "embeddings", None)
    counts_on = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(embeddings.padding_idx) + 1 if counts_on else 0


def probe_rows(vocabulary: int, step: int) -> list[list[int]]:
    """Two short rows of any tokens, to see whether a model can be packed; those of the second are `step` apart."""
    return [[(7 * at + 11) % vocabulary for at in range(9)], [(step * at + 3) % vocabulary for at in range(5)]]


def padded_rows(starts: Sequence[int], lengths: Sequence[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of parts that are padded to `width` with the first row of each.

    Args:
        starts: First row of each part.
        lengths: Rows of each part.

    Returns:
        Rows, long [parts, width]; whether they are no padding, bool [parts, width].
    """
    first, inside = torch.tensor(starts)[:, None], torch.arange(width)
    real = inside < torch.tensor(lengths)[:, None]
    return torch.where(real, first + inside, first), real


_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def laid_out(how: Layout) -> Iterator[None]:
    """The pack that is computed inside this block."""
    token = _layout.set(how)
    try:
        yield
    finally:
        _layout.reset(token)


def gathered(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows` of [heads, tokens, width] as [tokens x heads, width]."""
    return tensor.transpose(0, 1).reshape(-1, tensor.shape[-1]).index_select(0, rows)


def scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q k^T + mask, [texts, rows, width].

    Args:
        query: [texts, rows, width of a head], already scaled.
        key: [texts, width, width of a head].
        mask: [texts or 1, rows or 1, width]; None: nothing is added.
    """
    keys = key.transpose(1, 2)
    return torch.bmm(query, keys) if mask is None else torch.baddbmm(mask, query, keys)


def exponentials(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp of the `scores` of these, up to a factor for each row, and sums of the rows: their quotient is the softmax.

    Without the search for the largest score of a row it takes half the time of a softmax; it is searched for only
    where the range of the type would be left.

    Returns:
        [texts, rows, width] and [texts, rows, 1].
    """
    weights = scores(query, key, mask).exp_()
    sums = weights.sum(-1, keepdim=True)
    low, high = sums.aminmax()
    if not (low > SUMS[0] and high < SUMS[1]):
        shifted = scores(query, key, mask)
        weights = shifted.sub_(shifted.amax(-1, keepdim=True)).exp_()
        sums = weights.sum(-1, keepdim=True)
    return weights, sums


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
    whole = query.shape == key.shape == value.shape and query.shape[2] == how.tokens
    if whole and not unfit(width, how.dtype, how.device):
        queries, keys, values = (each.to(how.dtype) for each in (query, key, value))
        return attended(queries, keys, values, scale, how.bounds).to(query.dtype), None
    rows = how.rows(heads)
    queries, keys, values = (gathered(each[0].to(how.dtype), rows.source) for each in (query, key, value))
    queries.mul_(scale)
    output = torch.empty_like(queries)
    for group in how.groups:
        q, k, v, out = (how.part(each, group, heads) for each in (queries, keys, values, output))
        weights, sums = exponentials(q, k, how.mask(group, heads))
        torch.bmm(weights, v, out=out).div_(sums)
    return output.index_select(0, rows.target).view(1, how.tokens, heads, width).to(query.dtype), None


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, lambda *_args, **_options: None)  # a pack needs no mask
