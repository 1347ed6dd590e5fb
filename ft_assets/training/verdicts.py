"""What must hold of a trained adapter: pure, asked by checks and again by `release`."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ft_assets.data.forms import Verdict


def of_adapter(history: Mapping[str, Any], validation: pd.DataFrame) -> dict[str, Verdict]:
    """loss_finite, and beats_trivial_baseline, on validation rows.

    The trivial baseline of a classifier is always answering the commonest label; of answers, the untrained base model.

    Args:
        history: `training.json` of the adapter.
        validation: The validation rows (label).
    """
    values = [*history["loss"], *(value for epoch in history["validation"] for value in epoch.values())]
    best = history["validation"][history["best_epoch"] - 1]
    untrained = history.get("untrained")
    if untrained:
        beats = Verdict(
            best["loss"] < untrained["loss"],
            f"validation loss {best['loss']:.3f} a token on {len(validation)} rows; "
            f"the base model without an adapter has {untrained['loss']:.3f}",
        )
    else:
        trivial = float(validation["label"].value_counts(normalize=True).max())
        beats = Verdict(
            best["accuracy"] > trivial,
            f"validation accuracy {best['accuracy']:.3f} on {len(validation)} rows; "
            f"the commonest label alone gets {trivial:.3f}",
        )
    return {
        "loss_finite": Verdict(
            bool(history["loss"]) and all(math.isfinite(value) for value in values),
            f"{len(history['loss'])} steps, loss {history['loss'][0]:.3f} to {history['loss'][-1]:.3f}",
        ),
        "beats_trivial_baseline": beats,
    }
