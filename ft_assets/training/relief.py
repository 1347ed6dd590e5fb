"""What to change of settings that need more memory than there is. Pure, and light enough for the code location."""

from ft_assets.training.engine.batching import PART_TOKENS
from ft_assets.training.recipes import Settings
from ft_resources.errors import TrainingError

SMALLEST_PART = min(PART_TOKENS.values())
"""Tokens of a pass where `training.micro_batch_tokens` says nothing: the least on any device, so that relief is one."""


def relieved(settings: Settings, longest_tokens: int, rows: int) -> dict[str, int | bool]:
    """Settings to change, by dotted path, after a training ran out of memory; the batch stays what it is.

    Passes are halved down to the longest row, then activations are recomputed in place of kept.

    Args:
        longest_tokens: Tokens of the longest row that is trained on.
        rows: Training rows.

    Raises:
        TrainingError: Neither is left to change.
    """
    training = settings.training
    longest = max(8, min(longest_tokens, settings.base.max_tokens))
    budget = min(training.micro_batch_tokens or SMALLEST_PART, min(training.batch_size, rows) * longest)
    if budget > longest:
        return {"training.micro_batch_tokens": max(longest, budget // 2)}
    if not training.gradient_checkpointing:
        return {"training.gradient_checkpointing": True}
    raise TrainingError(
        "one row at a time with recomputed activations still needs more memory than there is",
        where="training",
        mend=f"Lower base.max_tokens ({settings.base.max_tokens}) or lora.rank ({settings.lora.rank}), "
        + ("set method to lora, " if settings.method == "full" else "set lora.top_layers, ")
        + "or choose a smaller base.model.",
    )
