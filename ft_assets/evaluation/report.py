"""report.json: everything a gate or a person looks at before an adapter may answer traffic, and how it is composed."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pydantic

from ft_assets.evaluation.slices import slice_masks
from ft_assets.evaluation.statistics import (
    Bin,
    Interval,
    bootstrap_interval,
    confusion_counts,
    ece,
    label_figures,
    reliability_bins,
)
from ft_resources.errors import EvaluationError

COLUMNS = ("row_id", "text", "label", "event_time", "origin", "candidate_label", "candidate_confidence")
BASELINES = ("majority", "linear")


class Part(pydantic.BaseModel):
    """Unknown keys are refused, values never change, and NaN survives JSON as the string "NaN"."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class LabelFigures(Part):
    """The candidate's figures on one label."""

    precision: float
    recall: float
    f1: float
    support: int


class Paired(Part):
    """Candidate and champion on the same rows; the rows both get right or both get wrong decide nothing."""

    rows: int
    only_candidate_right: int
    only_champion_right: int


class RowGroup(Part):
    """Test rows that have something in common."""

    name: str
    value: str
    rows: int

    @property
    def title(self) -> str:
        """What they have in common, for people."""
        return f"{self.name} = {self.value}"


class Slice(RowGroup):
    """A group of test rows; the champion's counts are None where there is no champion."""

    candidate_right: int
    champion_right: int | None = None
    only_candidate_right: int | None = None
    only_champion_right: int | None = None


class Calibration(Part):
    """How honest the candidate's confidences are: ECE (0..1), Brier score (0..2) and the bins behind the ECE."""

    ece: float
    brier: float
    temperature: float
    bins: list[Bin]


class Latency(Part):
    """Engine time of single requests, in milliseconds."""

    p50_ms: float
    p95_ms: float
    requests: int


class Agreement(Part):
    """The serving engine in one precision against plain peft in fp32, on the same rows."""

    precision: str
    rows: int
    agreement: float
    """Share of rows that get the label of plain peft, among neighbours and, for some of them, also alone."""
    max_probability_difference: float
    probability_shift: float = 0.0
    """What 95 % of the rows stay below: the largest difference of a row's probabilities."""
    mean_probability_difference: float = 0.0
    """Mean over the rows of that difference."""
    changed_by_neighbours: int = 0
    """Rows that get one label alone and another one in a batch."""


class Serving(Agreement):
    """The precision that everything in the report was measured in and that is served, and what was tried for it."""

    tried: list[Agreement] = []
    """Fastest first; the last one was taken."""


class EvalReport(Part):
    """One candidate on one frozen test split; adapters and splits are named by digest."""

    task: str
    adapter: str
    champion: str | None
    test_split: str
    labels: list[str]
    rows: int
    models: dict[str, dict[str, Interval]]
    per_label: dict[str, LabelFigures]
    confusion: list[list[int]]
    paired: Paired | None
    retained: Paired | None
    slices: list[Slice]
    calibration: Calibration
    latency: Latency
    serving: Serving | None
    """None of what the service cannot serve, as what a plug-in trained."""
    created_from: dict[str, str]


def build_report(
    predictions: pd.DataFrame,
    *,
    task: str,
    adapter: str,
    champion: str | None,
    test_split: str,
    labels: Sequence[str],
    temperature: float,
    latency: Latency,
    serving: Serving | None,
    created_from: Mapping[str, str],
    confidence: float = 0.95,
    seed: int = 0,
) -> EvalReport:
    """Compose the report from one row of answers per test row.

    Args:
        predictions: Columns row_id, text, label, event_time, origin, candidate_label, candidate_confidence,
            candidate_p_<label> for every label, majority_label, linear_label; with a champion also champion_label and
            was_in_champion_test (bool: the champion was tested on this row too). Further columns are left alone.
        confidence: Level of the bootstrap intervals.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: Columns, rows or answers are missing, or contradict each other.
    """
    from ft_assets.evaluation.metrics import compute_all

    labels = list(labels)
    _check_columns(predictions, labels, champion)
    truth = predictions["label"].tolist()
    models: dict[str, dict[str, Interval]] = {}
    for name in ("candidate", *(["champion"] if champion else []), *BASELINES):
        answers = predictions[f"{name}_label"].tolist()
        spread = bootstrap_interval(confusion_counts(truth, answers, labels), confidence=confidence, seed=seed)
        values = compute_all(truth, answers, labels)
        models[name] = {metric: spread[metric].model_copy(update={"value": v}) for metric, v in values.items()}
    counts = confusion_counts(truth, predictions["candidate_label"].tolist(), labels)
    by_label = label_figures(counts)
    probabilities = _probabilities(predictions, labels)
    candidate = (predictions["candidate_label"] == predictions["label"]).to_numpy(dtype=bool)
    other = (predictions["champion_label"] == predictions["label"]).to_numpy(dtype=bool) if champion else None
    bins = reliability_bins(predictions["candidate_confidence"], candidate)
    return EvalReport(
        task=task,
        adapter=adapter,
        champion=champion,
        test_split=test_split,
        labels=labels,
        rows=len(predictions),
        models=models,
        per_label={
            label: LabelFigures(
                precision=float(by_label["precision"][at]),
                recall=float(by_label["recall"][at]),
                f1=float(by_label["f1"][at]),
                support=int(by_label["support"][at]),
            )
            for at, label in enumerate(labels)
        },
        confusion=counts[:, : len(labels)].tolist(),
        paired=None if other is None else _paired(candidate, other),
        retained=None
        if other is None
        else _paired(candidate, other, predictions["was_in_champion_test"].to_numpy(dtype=bool)),
        slices=[_slice(name, value, mask, candidate, other) for name, value, mask in slice_masks(predictions)],
        calibration=Calibration(
            ece=ece(bins), brier=brier(probabilities, truth, labels), temperature=temperature, bins=bins
        ),
        latency=latency,
        serving=serving,
        created_from=dict(created_from),
    )


def brier(probabilities: np.ndarray, truth: Sequence[str], labels: Sequence[str]) -> float:
    """Mean squared distance of the probabilities [rows, labels] from the truth, 0 best, 2 worst (Brier 1950)."""
    at = {label: index for index, label in enumerate(labels)}
    target = np.eye(len(labels))[[at[label] for label in truth]]
    return float(((probabilities - target) ** 2).sum(axis=1).mean())


def _paired(candidate: np.ndarray, champion: np.ndarray, mask: np.ndarray | None = None) -> Paired:
    mask = np.ones_like(candidate) if mask is None else mask
    return Paired(
        rows=int(mask.sum()),
        only_candidate_right=int((candidate & ~champion & mask).sum()),
        only_champion_right=int((~candidate & champion & mask).sum()),
    )


def _slice(name: str, value: str, mask: np.ndarray, candidate: np.ndarray, champion: np.ndarray | None) -> Slice:
    rows, right = int(mask.sum()), int((candidate & mask).sum())
    if champion is None:
        return Slice(name=name, value=value, rows=rows, candidate_right=right)
    pair = _paired(candidate, champion, mask)
    return Slice(
        name=name,
        value=value,
        rows=rows,
        candidate_right=right,
        champion_right=int((champion & mask).sum()),
        only_candidate_right=pair.only_candidate_right,
        only_champion_right=pair.only_champion_right,
    )


def _check_columns(predictions: pd.DataFrame, labels: Sequence[str], champion: str | None) -> None:
    wanted = [*COLUMNS, *(f"candidate_p_{label}" for label in labels), *(f"{name}_label" for name in BASELINES)]
    wanted += ["champion_label", "was_in_champion_test"] if champion else []
    mend = "Score every test row with every model once."
    missing = [column for column in wanted if column not in predictions]
    if missing:
        raise EvaluationError(f"the predictions lack the columns {missing}", mend=mend)
    if predictions.empty:
        raise EvaluationError("there are no predictions", mend="Check the test split.")
    empty = [column for column in wanted if column != "event_time" and predictions[column].isna().any()]
    if empty:
        raise EvaluationError(f"values are missing in the columns {empty}", mend=mend)
    twice = predictions["row_id"].duplicated()
    if twice.any():
        raise EvaluationError(f"row {predictions['row_id'][twice].iloc[0]} was scored twice", mend=mend)
    outside = sorted(set(predictions["candidate_label"]) - set(labels))
    if outside:
        raise EvaluationError(f"the candidate answered {outside[:5]}, no labels of the task", mend=mend)


def _probabilities(predictions: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
    values = predictions[[f"candidate_p_{label}" for label in labels]].to_numpy(dtype=np.float64)
    at = {label: index for index, label in enumerate(labels)}
    given = values[np.arange(len(values)), [at[label] for label in predictions["candidate_label"]]]
    sure = predictions["candidate_confidence"].to_numpy(dtype=np.float64)
    for wrong, what in (
        (~np.isfinite(values).all(axis=1), "has probabilities that are not finite"),
        (abs(values.sum(axis=1) - 1) > 1e-2, "has probabilities that do not sum to 1"),
        (abs(given - sure) > 1e-3, "has a confidence that is not the probability of its label"),
        (given < values.max(axis=1) - 1e-3, "has an answer that is not its most probable label"),
    ):
        if wrong.any():
            raise EvaluationError(
                f"row {predictions['row_id'][wrong].iloc[0]} {what}", mend="Check the scoring engine."
            )
    return values
