"""The metrics of written answers: each a function of what is counted row by row, registered once with its direction.

Counting by row lets the bootstrap draw rows without asking a model again, and `release` recount a stored report.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bento.conversation import Fields
from ft_assets.evaluation.generation.fields import compare
from ft_assets.evaluation.generation.texts import exact_match, rouge_l, token_f1
from ft_assets.evaluation.statistics import Interval
from ft_resources.errors import EvaluationError

Kind = Literal["text-generation", "extraction"]
Sums = Mapping[str, NDArray[np.float64]]
BLEU_COUNTS = (*(f"bleu_right_{n}" for n in range(1, 5)), *(f"bleu_all_{n}" for n in range(1, 5)))
BLEU_LENGTHS = ("bleu_answer_length", "bleu_reference_length")
SCORE: dict[Kind, str] = {"text-generation": "token_f1", "extraction": "field_accuracy"}
"""The figure by which two models are compared row by row."""


@dataclass(frozen=True)
class Metric:
    """`value` takes sums over rows, float [draws] by name, `rows` among them, and gives [draws]."""

    kinds: tuple[Kind, ...]
    direction: Literal["higher", "lower"]
    description: str
    value: Callable[[Sums], NDArray[np.float64]]


def row_counts(kind: Kind, answers: Sequence[str], references: Sequence[str], fields: Fields) -> pd.DataFrame:
    """What the metrics of `kind` count, one row per answer, float64; the loss comes from a model and is not among it.

    Raises:
        EvaluationError: There are no rows, or the lists differ in length.
        DataError: A reference of an extraction does not fit the fields.
    """
    if not len(answers) or len(answers) != len(references):
        raise EvaluationError(f"{len(answers)} answers for {len(references)} rows", mend="Answer every row once.")
    count = _extraction_counts if kind == "extraction" else _generation_counts
    rows = [count(answer, wanted, fields) for answer, wanted in zip(answers, references, strict=True)]
    return pd.DataFrame(rows, dtype=np.float64)


def figures(kind: Kind, counts: pd.DataFrame, *, confidence: float, seed: int = 0) -> dict[str, Interval]:
    """Every metric of `kind` whose counts are there, with its percentile bootstrap over rows (1000 draws).

    Args:
        counts: As of `row_counts`, perhaps with `loss` (summed over the tokens of a reference) and `tokens`.
    """
    table = counts.assign(rows=1.0)
    drawn = np.random.default_rng(seed).multinomial(len(table), np.full(len(table), 1 / len(table)), size=1000)
    spread = _sums(table, drawn.astype(np.float64))
    whole = _sums(table, np.ones((1, len(table))))
    tail = (1 - confidence) / 2
    found = {}
    for name, metric in METRICS.items():
        if kind not in metric.kinds or (name in ("loss", "perplexity") and "loss" not in table):
            continue
        low, high = np.quantile(metric.value(spread), [tail, 1 - tail])
        value = float(metric.value(whole)[0])
        found[name] = Interval(value=value, low=float(low), high=float(high), confidence=confidence)
    return found


def _sums(table: pd.DataFrame, weights: NDArray[np.float64]) -> Sums:
    summed = weights @ table.to_numpy(dtype=np.float64)
    return {name: summed[:, at] for at, name in enumerate(table.columns)}


def _generation_counts(answer: str, reference: str, fields: Fields) -> dict[str, float]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu = BLEU(effective_order=True).sentence_score(answer, [reference])
    return {
        "exact_match": exact_match(answer, reference),
        "token_f1": token_f1(answer, reference),
        "rouge_l": rouge_l(answer, reference),
        "chrf": CHRF().sentence_score(answer, [reference]).score / 100,
        **dict(zip(BLEU_COUNTS, [*bleu.counts, *bleu.totals], strict=True)),
        **dict(zip(BLEU_LENGTHS, [bleu.sys_len, bleu.ref_len], strict=True)),
    }


def _extraction_counts(answer: str, reference: str, fields: Fields) -> dict[str, float]:
    found = compare(answer, reference, fields)
    right, false, missed = (sum(part) for part in zip(*(one.counts for one in found.fields.values()), strict=True))
    return {
        "true_positives": right,
        "false_positives": false,
        "false_negatives": missed,
        "field_accuracy": found.share_right,
        "exact_rows": float(found.share_right == 1),
        "valid_json": float(found.valid),
    }


def _mean(name: str) -> Callable[[Sums], NDArray[np.float64]]:
    return lambda sums: sums[name] / sums["rows"]


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _precision(sums: Sums) -> NDArray[np.float64]:
    return _ratio(sums["true_positives"], sums["true_positives"] + sums["false_positives"])


def _recall(sums: Sums) -> NDArray[np.float64]:
    return _ratio(sums["true_positives"], sums["true_positives"] + sums["false_negatives"])


def _field_f1(sums: Sums) -> NDArray[np.float64]:
    twice = 2 * sums["true_positives"]
    return _ratio(twice, twice + sums["false_positives"] + sums["false_negatives"])


def _bleu(sums: Sums) -> NDArray[np.float64]:
    from sacrebleu.metrics.bleu import BLEU

    table = np.stack([sums[name] for name in (*BLEU_COUNTS, *BLEU_LENGTHS)], axis=1).astype(int).tolist()
    scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in table]
    return np.array(scores, dtype=np.float64) / 100


def _loss(sums: Sums) -> NDArray[np.float64]:
    return np.divide(sums["loss"], sums["tokens"], out=np.full_like(sums["loss"], math.nan), where=sums["tokens"] > 0)


_TEXT: tuple[Kind, ...] = ("text-generation",)
_FIELDS: tuple[Kind, ...] = ("extraction",)
METRICS: dict[str, Metric] = {
    "exact_match": Metric(_TEXT, "higher", "Share of answers equal to the reference.", _mean("exact_match")),
    "token_f1": Metric(_TEXT, "higher", "Mean F1 of the words of answer and reference.", _mean("token_f1")),
    "rouge_l": Metric(_TEXT, "higher", "Mean ROUGE-L F1 of answer and reference.", _mean("rouge_l")),
    "chrf": Metric(_TEXT, "higher", "Mean chrF (Popovic 2015) of answer and reference, 0..1.", _mean("chrf")),
    "bleu": Metric(_TEXT, "higher", "BLEU (Papineni et al. 2002, Post 2018) over all rows, 0..1.", _bleu),
    "field_f1": Metric(_FIELDS, "higher", "F1 over all values of all rows.", _field_f1),
    "field_precision": Metric(_FIELDS, "higher", "Share of the values given that are right.", _precision),
    "field_recall": Metric(_FIELDS, "higher", "Share of the values wanted that were given.", _recall),
    "field_accuracy": Metric(_FIELDS, "higher", "Share of fields that are right, nulls too.", _mean("field_accuracy")),
    "exact_rows": Metric(_FIELDS, "higher", "Share of rows with every field right.", _mean("exact_rows")),
    "valid_json": Metric(_FIELDS, "higher", "Share of answers that fit the declared fields.", _mean("valid_json")),
    "loss": Metric((*_TEXT, *_FIELDS), "lower", "Nats per token of the reference answers.", _loss),
    "perplexity": Metric((*_TEXT, *_FIELDS), "lower", "exp(loss).", lambda sums: np.exp(_loss(sums))),
}
