"""Attention of packed rows beside plain attention of each row alone."""

from collections.abc import Sequence

import pytest
import torch

from bento.packing import Layout
from ft_assets.training.engine.attention import SegmentAttention

LENGTHS = (1, 17, 9, 24, 23, 3)


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], causal: bool
) -> torch.Tensor:
    """[heads, tokens, width], row by row; zero after the last."""
    output, start = torch.zeros_like(query), 0
    for length in lengths:
        part = slice(start, start + length)
        output[:, part] = torch.nn.functional.scaled_dot_product_attention(
            query[None, :, part], key[None, :, part], value[None, :, part], is_causal=causal, enable_gqa=True
        )[0]
        start += length
    return output


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_states_and_gradients_are_those_of_each_row_alone(key_heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    how, real = Layout(tuple(LENGTHS), torch.float64, torch.device("cpu")), sum(LENGTHS)
    assert how.tokens > real, "the gradient of what belongs to no row is looked at too"
    inputs = [
        torch.randn(heads, how.tokens, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, key_heads, key_heads)
    ]
    upstream = torch.randn(6, how.tokens, 8, dtype=torch.float64)
    expected = plain(*inputs, LENGTHS, causal)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    found = SegmentAttention.apply(*inputs, how, 8**-0.5, causal)
    torch.testing.assert_close(found[:, :real], expected[:, :real])
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
