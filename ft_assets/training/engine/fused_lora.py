"""A linear layer with its low-rank update as one operation: fewer passes over memory than one operation each."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear

ADAPTER = "default"
"""The name peft gives the one adapter of a model."""


class LinearWithUpdate(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T for a frozen W and trained A, B, in the type of W."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Args: inputs [..., in]; weight [out, in]; a [rank, in]; b [out, rank]. Returns [..., out]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        a, b = a.to(flat.dtype), b.to(flat.dtype)
        low = flat @ a.t()
        output = flat @ weight.t()
        if bias is not None:
            output.add_(bias)  # addmm would write the bias to all of the output first, another pass over it
        output.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape = scale, inputs.shape
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        for_low = (gradient @ b).mul_(ctx.scale)
        for_inputs = None
        if ctx.needs_input_grad[0]:
            for_inputs = (gradient @ weight).addmm_(for_low, a).view(ctx.shape)
        for_a = (for_low.t() @ flat).float()
        for_b = (low.t() @ gradient).t().mul_(ctx.scale).float()  # a wide result is the faster product
        return for_inputs, None, None, for_a, for_b, None


def fuse(model: torch.nn.Module) -> int:
    """Let every plain low-rank update of `model` compute as one operation; returns how many do.

    Left alone: layers with dropout on the adapter's input, DoRA, and anything that is no plain linear layer.
    """
    fused = 0
    for module in model.modules():
        if isinstance(module, LoraLinear) and _is_plain(module):
            module.__dict__["forward"] = _Forward(
                module
            )  # an attribute of the instance, so that it goes before the class
            fused += 1
    return fused


class _Forward:
    def __init__(self, module: LoraLinear) -> None:
        self.base = module.base_layer
        self.a, self.b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        self.scale = float(module.scaling[ADAPTER])

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weight: Any = self.base.weight
        output: torch.Tensor = LinearWithUpdate.apply(
            inputs.to(weight.dtype), weight, self.base.bias, self.a.weight, self.b.weight, self.scale
        )
        return output


def _is_plain(module: LoraLinear) -> bool:
    return (
        type(module.base_layer) is torch.nn.Linear
        and list(module.lora_A) == [ADAPTER]
        and isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity)
        and not module.lora_variant
    )
