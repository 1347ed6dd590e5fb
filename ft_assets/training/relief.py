"""How a training goes on that needs more memory than there is. Pure, and light enough for the code location."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from ft_assets.specs import Strict
from ft_assets.training.engine.batching import PART_TOKENS
from ft_assets.training.recipes import Settings
from ft_resources.errors import TrainingError

SMALLEST_PART = min(PART_TOKENS.values())
"""Tokens of a pass where `training.micro_batch_tokens` says nothing: the least on any device, so that relief is one."""
RELIEF = "relief"
"""Key in what an adapter is made from: every `Relief` of its training, in order. Most have none."""


class Relief(Strict):
    """How steps are computed from one on, in place of what the settings say; their rows stay what they are."""

    after_step: int = Field(ge=0, description="The last step before it; 0: from the first on.")
    micro_batch_tokens: int = Field(ge=8, description="A step is computed in parts of at most this many tokens.")
    gradient_checkpointing: bool = Field(description="Activations are recomputed in place of kept.")

    def __str__(self) -> str:
        recomputed = ", activations recomputed" if self.gradient_checkpointing else ""
        return f"after step {self.after_step} in passes of {self.micro_batch_tokens} tokens{recomputed}"


def reliefs_of(made_from: Mapping[str, Any]) -> list[Relief]:
    """What the training of an adapter that is made from this went on under."""
    return [Relief.model_validate(one) for one in made_from.get(RELIEF, [])]


def under(made_from: Mapping[str, Any], reliefs: Sequence[Relief]) -> dict[str, Any]:
    """What an adapter is made from whose training goes on under these; without any nothing is added."""
    return {**made_from, **({RELIEF: [one.model_dump() for one in reliefs]} if reliefs else {})}


def relieved(settings: Settings, before: Iterable[Relief], after_step: int, longest_tokens: int, rows: int) -> Relief:
    """How to go on after a training ran out of memory; the batch stays what it is.

    Passes are halved down to the longest row, then activations are recomputed in place of kept.

    Args:
        before: The reliefs it had already.
        after_step: The step it goes on from.
        longest_tokens: Tokens of the longest row that is trained on.
        rows: Training rows.

    Raises:
        TrainingError: Neither is left to change.
    """
    training = settings.training
    tokens, recomputed = training.micro_batch_tokens or SMALLEST_PART, training.gradient_checkpointing
    for one in before:
        tokens, recomputed = one.micro_batch_tokens, one.gradient_checkpointing
    longest = max(8, min(longest_tokens, settings.base.max_tokens))
    budget = min(tokens, min(training.batch_size, rows) * longest)
    if budget > longest:
        budget = max(longest, budget // 2)
    elif not recomputed:
        recomputed = True
    else:
        raise TrainingError(
            "one row at a time with recomputed activations still needs more memory than there is",
            where="training",
            mend=f"Lower base.max_tokens ({settings.base.max_tokens}) or lora.rank ({settings.lora.rank}), "
            + ("set method to lora, " if settings.method == "full" else "set lora.top_layers, ")
            + "or choose a smaller base.model.",
        )
    return Relief(after_step=after_step, micro_batch_tokens=budget, gradient_checkpointing=recomputed)
