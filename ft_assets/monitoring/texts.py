"""Written answers in the form in which drift is tested: what is asked by its words, what is answered by its length.

The log keeps no state of the model for a written answer, so the words of the inputs stand for it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bento import conversation
from bento.preparation import prepare_content
from ft_assets.evaluation.generation.texts import words
from ft_assets.monitoring.drift import AccuracyResult, Reference, Window
from ft_resources.errors import DataError

DIMENSIONS = 512
"""Of the hashed word counts; see Weinberger et al. 2009 (ICML)."""
QUARTILES = (0.25, 0.5, 0.75)


def text_drift(report: pd.DataFrame, traffic: pd.DataFrame, kinds: Sequence[str]) -> tuple[Reference, Window]:
    """What was asked and answered at evaluation, and since.

    Args:
        report: Answers of the evaluation (text, candidate_answer, candidate_confidence, candidate_finish).
        traffic: Answered requests (input, output, confidence, finish_reason); those that were broken off count not.
        kinds: Personal data that are masked in evaluated inputs and therefore in served ones, too.
    """
    then = report[report["candidate_finish"] != "refused"]
    now = traffic[traffic["finish_reason"] != "cancelled"]
    lengths = then["candidate_answer"].str.len().astype(int)
    bounds = sorted({int(bound) for bound in lengths.quantile(QUARTILES)}) if len(then) else []
    sure = then["candidate_confidence"].to_numpy()
    return (
        Reference(_hashed(then["text"], ()), _lengths(then["candidate_answer"], bounds), sure),
        Window(_hashed(now["input"], kinds), _lengths(now["output"], bounds), now["confidence"].to_numpy()),
    )


def corrected(traffic: pd.DataFrame, reference_score: float) -> AccuracyResult:
    """What the texts that people gave instead tell: people correct what is wrong, so they give no accuracy."""
    rows = int(traffic["true_text"].notna().sum())
    return AccuracyResult(
        rows=rows,
        right=0,
        accuracy=None,
        reference_accuracy=reference_score,
        drop=None,
        alarm=False,
        reason=f"No verdict on accuracy: {rows} corrected texts came back, and people correct what is wrong.",
    )


def _hashed(inputs: pd.Series, kinds: Sequence[str]) -> np.ndarray:
    """float64 [rows, DIMENSIONS]: signed hashes of the words that the caller wrote, of length 1."""
    from sklearn.feature_extraction.text import HashingVectorizer

    if inputs.empty:
        return np.zeros((0, DIMENSIONS))
    vectors = HashingVectorizer(n_features=DIMENSIONS, analyzer=words, norm="l2")
    return np.asarray(vectors.transform([_asked(text, kinds) for text in inputs]).todense())


def _asked(text: str, kinds: Sequence[str]) -> str:
    """All turns of a conversation but the system's; any other text as it is."""
    try:
        turns = [one["content"] for one in conversation.load(text) if one["role"] != "system"]
    except DataError:
        turns = [text]
    return "\n".join(prepare_content(turn, kinds)[0] for turn in turns)


def _lengths(answers: pd.Series, bounds: Sequence[int]) -> list[str]:
    """The quarter of the evaluated answers that each one is as long as."""
    names = [f"up to {bound} characters" for bound in bounds] + ["longer"]
    return [names[at] for at in np.searchsorted(bounds, answers.str.len().to_numpy(), side="left")]
