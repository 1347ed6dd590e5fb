"""What a candidate must be compared with before anyone is impressed: no model at all, and a linear one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ft_resources.errors import EvaluationError

FEW_ROWS = 200
"""Below this many train texts a term seen once is kept: dropping it would leave almost no vocabulary."""


@dataclass(frozen=True)
class Answers:
    """Labels [rows], probabilities float64 [rows, labels] and the labels their columns stand for."""

    labels: list[str]
    probabilities: NDArray[np.float64]
    columns: tuple[str, ...]


def majority_baseline(train_labels: Sequence[str], rows: int) -> Answers:
    """The most frequent train label for every row, ties to the first in the alphabet; probabilities are its shares.

    Raises:
        EvaluationError: There are no train labels.
    """
    if not len(train_labels):
        raise EvaluationError("there are no train labels", mend="Check the train split.")
    names, counts = np.unique(np.asarray(train_labels, dtype=str), return_counts=True)
    winner = str(names[counts.argmax()])
    shares = np.tile(counts / counts.sum(), (rows, 1))
    return Answers([winner] * rows, shares, tuple(map(str, names)))


def linear_baseline(train_texts: Sequence[str], train_labels: Sequence[str], test_texts: Sequence[str]) -> Answers:
    """TF-IDF of words and word pairs with logistic regression, fitted on the train texts; equal input, equal answers.

    Raises:
        EvaluationError: The train rows hold fewer than two labels, no words, or lists of different lengths.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(train_texts) != len(train_labels):
        raise EvaluationError(f"{len(train_labels)} labels for {len(train_texts)} train texts", mend="Align them.")
    if len(set(train_labels)) < 2:
        raise EvaluationError("the train rows hold fewer than two labels", mend="Add rows of the other labels.")
    words = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=1 if len(train_texts) < FEW_ROWS else 2, dtype=np.float64
    )
    try:
        train = words.fit_transform(train_texts)
    except ValueError as error:
        raise EvaluationError(f"no terms in the train texts: {error}", mend="Check the text column.") from error
    model = LogisticRegression(C=10.0, max_iter=1000).fit(train, np.asarray(train_labels, dtype=str))
    columns = tuple(map(str, model.classes_))
    if not len(test_texts):
        return Answers([], np.zeros((0, len(columns))), columns)
    probabilities = model.predict_proba(words.transform(test_texts))
    return Answers([columns[at] for at in probabilities.argmax(axis=1)], probabilities, columns)
