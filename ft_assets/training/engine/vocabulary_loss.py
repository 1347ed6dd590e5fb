"""Cross-entropy over a large vocabulary without keeping its logits: computed in slices, with their gradient at once."""

from typing import Any

import torch

SLICE = 256
"""Tokens whose logits exist at the same time: 256 x 49,152 in float32 are 50 MB."""


class SlicedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(states W^T)[target]."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Args: states [tokens, hidden]; weight [vocabulary, hidden]; targets [tokens]. Returns a float32 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for_states = torch.empty_like(states)
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), SLICE):
            part, wanted = states[start : start + SLICE], targets[start : start + SLICE, None]
            logits = (part @ weight.t()).float()
            highest = torch.logsumexp(logits, -1, keepdim=True)
            total += (highest - logits.gather(1, wanted)).sum(dtype=torch.float64)
            error = logits.sub_(highest).exp_()
            error.scatter_add_(1, wanted, error.new_full(wanted.shape, -1.0))
            rounded = error.to(weight.dtype)
            for_states[start : start + SLICE] = rounded @ weight
            if for_weight is not None:
                for_weight += rounded.t() @ part
        ctx.save_for_backward(for_states, for_weight)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_states, for_weight = ctx.saved_tensors
        by = gradients[0]
        return (
            for_states * by.to(for_states.dtype),
            None if for_weight is None else for_weight * by,
            None,
        )
