"""What must hold of a trained adapter: pure, asked by checks and again by `release`."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ft_assets.data.forms import Verdict


def of_adapter(history: Mapping[str, Any], validation: pd.DataFrame) -> dict[str, Verdict]:
    """loss_finite, and beats_trivial_baseline: on validation rows better than always the commonest label.

    Args:
        history: `training.json` of the adapter.
        validation: The validation rows (label).
    """
    values = [*history["loss"], *(value for epoch in history["validation"] for value in epoch.values())]
    trivial = float(validation["label"].value_counts(normalize=True).max())
    accuracy = history["validation"][history["best_epoch"] - 1]["accuracy"]
    return {
        "loss_finite": Verdict(
            bool(history["loss"]) and all(math.isfinite(value) for value in values),
            f"{len(history['loss'])} steps, loss {history['loss'][0]:.3f} to {history['loss'][-1]:.3f}",
        ),
        "beats_trivial_baseline": Verdict(
            accuracy > trivial,
            f"validation accuracy {accuracy:.3f} on {len(validation)} rows; "
            f"the commonest label alone gets {trivial:.3f}",
        ),
    }
