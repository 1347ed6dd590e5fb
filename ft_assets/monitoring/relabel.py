"""Which answers are worth a person's time: the ones the model is unsure of, and the ones somebody disagreed with."""

import pandas as pd

from ft_resources.errors import DataError

LOW_CONFIDENCE = "low_confidence"
DISAGREED = "disagreed_feedback"
COLUMNS = ("prediction_id", "confidence", "true_label", "rating")


def rank(answers: pd.DataFrame, below: float, limit: int) -> pd.DataFrame:
    """Unlabelled answers that want a label, most uncertain first, ties by prediction id.

    Args:
        answers: Columns prediction_id (str), confidence (float), true_label (str, null while unlabelled) and rating
            (-1 bad, 1 good, null); further columns are carried along. An answer may stand there once per feedback.
        below: An answer strictly less confident than this is uncertain.
        limit: Most answers returned.

    Returns:
        The rows, each answer once, with two more columns: `rank` (int, from 1) and `reasons` (list of
        "low_confidence", "disagreed_feedback").

    Raises:
        DataError: A column is missing, or a confidence is not a number.
    """
    missing = [column for column in COLUMNS if column not in answers]
    if missing:
        raise DataError(f"the answers lack the columns {missing}", mend="Join predictions and feedback first.")
    if answers[["prediction_id", "confidence"]].isna().any(axis=None):
        raise DataError("an answer has no id or no confidence", mend="Check the request log.")
    try:
        ratings = pd.to_numeric(answers["rating"])
    except (TypeError, ValueError) as error:
        raise DataError(f"a rating is not a number: {error}", mend="Use -1 for bad and 1 for good.") from error
    ids = answers["prediction_id"]
    labelled = answers["true_label"].notna().groupby(ids, sort=False).transform("any").astype(bool)
    disliked = (ratings < 0).groupby(ids, sort=False).transform("any").astype(bool)
    unsure = answers["confidence"] < below
    kept = answers.assign(_unsure=unsure, _disliked=disliked)[~labelled & (unsure | disliked)]
    kept = kept.drop_duplicates("prediction_id").sort_values(["confidence", "prediction_id"], kind="stable")
    kept = kept.head(max(limit, 0)).reset_index(drop=True)
    reasons = [
        [code for code, holds in ((LOW_CONFIDENCE, low), (DISAGREED, bad)) if holds]
        for low, bad in zip(kept["_unsure"], kept["_disliked"], strict=True)
    ]
    kept = kept.drop(columns=["_unsure", "_disliked"])
    return kept.assign(rank=range(1, len(kept) + 1), reasons=pd.Series(reasons, dtype=object, index=kept.index))
