"""Linear layers in int8: weights with a scale per output, inputs with a scale per token.

The scale of a token comes from its own values (dynamic per-token quantisation, as in arXiv:2206.01861), so that an
answer depends on its own text alone. The usual scale over a whole batch would let neighbours change each other's
answers. Products of integers are exact; what is rounded is what enters them.
"""

from typing import NamedTuple

import torch

LEVELS = 127
MIDDLE = 128
"""Kernels take unsigned inputs: what is stored is the signed value plus this."""


def int8_gap(device: torch.device) -> str:
    """Why `device` cannot multiply in int8; empty: it can.

    Without VNNI or AMX the sums of two products saturate at 16 bits, and answers would depend on the processor.
    """
    if device.type != "cpu":
        return "int8 products are there for CPUs only"
    features = torch.cpu.get_capabilities()
    if not any(features.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "this CPU has neither VNNI nor AMX"
    return ""


class Int8Weight:
    """A weight matrix [out, in], symmetric with one scale per output, in the layout of the kernel.

    Args:
        weight: float32 [out, in].
        bias: float32 [out].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        top = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * LEVELS)
        levels = (weight * (LEVELS / top)[:, None]).round_().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(levels, None)
        self._scales = top / LEVELS
        self._sums = levels.sum(1, dtype=torch.float32) * self._scales
        self._zeros = torch.zeros(len(weight), dtype=torch.long)
        self._bias = torch.zeros(len(weight), dtype=torch.float32) if bias is None else bias.detach().clone()

    def product(self, inputs: "Int8Values") -> torch.Tensor:
        """input @ weight.T + bias, float32 [tokens, out]."""
        output = torch.ops.onednn.qlinear_pointwise(
            inputs.levels,
            1.0,
            MIDDLE,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return torch.addcmul(self._bias, output, inputs.scales, out=output).addr_(inputs.shifts, self._sums)


class Int8Values(NamedTuple):
    """float32 [tokens, in], rounded: value = (level - 128) * scale + shift."""

    levels: torch.Tensor
    """uint8 [tokens, in]"""
    scales: torch.Tensor
    """float32 [tokens, 1]"""
    shifts: torch.Tensor
    """float32 [tokens]"""


def quantise(values: torch.Tensor) -> Int8Values:
    """The levels of each token span its own smallest to its own largest value, and zero is one of them.

    A token with a value that is not finite has a scale that is not finite.
    """
    low = values.amin(-1, keepdim=True).clamp_max_(0)
    high = values.amax(-1, keepdim=True).clamp_min_(0)
    # one step less than there are levels: both ends are rounded
    scales = ((high - low) / (2 * LEVELS)).clamp_min_(torch.finfo(torch.float32).tiny)
    per_value = 1 / scales
    shift = (low * per_value).round_().add_(MIDDLE)
    signed = torch.mul(values, per_value).sub_(shift).round_().to(torch.int8)
    return Int8Values(signed.view(torch.uint8).bitwise_xor_(MIDDLE), scales, (shift * scales)[:, 0])
