"""report.json of a task that writes text: what a gate or a person looks at, and how it is composed."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bento.conversation import Field, Fields
from ft_assets.evaluation.generation.fields import Extracted, compare
from ft_assets.evaluation.generation.metrics import SCORE, Kind, figures, row_counts
from ft_assets.evaluation.generation.paired import Gain, gain_of
from ft_assets.evaluation.report import Part, RowGroup
from ft_assets.evaluation.slices import slice_masks
from ft_assets.evaluation.statistics import Interval
from ft_resources.errors import EvaluationError

MODELS = ("candidate", "champion", "base")
COLUMNS = ("row_id", "text", "label", "event_time", "origin")


class ScoreSlice(RowGroup):
    """A group of test rows with mean scores; `gain` is the candidate's over the champion, None without one."""

    candidate: float
    champion: float | None = None
    gain: Gain | None = None


class FieldFigures(Part):
    """One declared field over all rows; a wrong value is a false positive and a false negative."""

    true_positives: int
    false_positives: int
    false_negatives: int
    precision: float
    recall: float
    f1: float


class AnswerLatency(Part):
    """Engine time of single requests: milliseconds to the first text, tokens per second of the whole answer."""

    first_token_p50_ms: float
    first_token_p95_ms: float
    tokens_per_second: float
    requests: int


class TokenAgreement(Part):
    """The tokens that the serving engine wrote, against what plain peft in fp32 would have written in their place."""

    engine: str = "torch"
    """`torch` or `vllm`."""
    precision: str
    rows: int
    tokens: int
    same: float
    """Share of tokens that plain peft would have chosen too."""
    agreement: float
    """The same, with tokens counted in between which plain peft is undecided: less than `TIE` nats apart."""
    max_logprob_difference: float
    """Of the mean log-probability of an answer, at most, in nats."""


class Forgetting(Part):
    """Loss on general questions that no task is about, in nats per token of their answers."""

    questions: int
    base_loss: float
    candidate_loss: float

    @property
    def increase(self) -> float:
        """What was lost against the base model."""
        return self.candidate_loss - self.base_loss


class GenerationReport(Part):
    """One candidate on one frozen test split; adapters and splits are named by digest."""

    type: Kind
    task: str
    adapter: str
    champion: str | None
    test_split: str
    fields: dict[str, Field]
    rows: int
    """Rows that were answered."""
    test_rows: int
    """Rows of the test split."""
    max_tokens: int
    """Longest answer asked for."""
    cut: int
    """Answers of the candidate that did not end by themselves."""
    unanswered: int
    """Rows whose prompt the candidate could not take; they count as empty answers."""
    models: dict[str, dict[str, Interval]]
    score: str
    over_base: Gain
    paired: Gain | None
    """Against the champion."""
    retained: Gain | None
    """Against the champion, on the rows it was tested on."""
    slices: list[ScoreSlice]
    per_field: dict[str, FieldFigures]
    latency: AnswerLatency
    serving: TokenAgreement
    forgetting: Forgetting | None
    created_from: dict[str, str]


def build_report(
    answers: pd.DataFrame,
    *,
    kind: Kind,
    fields: Fields,
    task: str,
    adapter: str,
    champion: str | None,
    test_split: str,
    test_rows: int,
    max_tokens: int,
    latency: AnswerLatency,
    serving: TokenAgreement,
    forgetting: Forgetting | None,
    created_from: Mapping[str, str],
    confidence: float = 0.95,
    seed: int = 0,
) -> GenerationReport:
    """Compose the report from one row of answers per test row.

    Args:
        answers: Columns row_id, text, label (the reference), event_time, origin; for candidate and base, and with a
            champion for it too, MODEL_answer, MODEL_loss (nats summed over the reference's tokens) and MODEL_tokens;
            candidate_finish (stop, length or refused); with a champion was_in_champion_test (bool).
        confidence: Level of the bootstrap intervals.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: Columns or rows are missing, or a row stands there twice.
        DataError: A reference of an extraction does not fit the fields.
    """
    names = [name for name in MODELS if name != "champion" or champion]
    _check(answers, names)
    counts = {
        name: row_counts(kind, answers[f"{name}_answer"].tolist(), answers["label"].tolist(), fields).assign(
            loss=answers[f"{name}_loss"].to_numpy(dtype=np.float64),
            tokens=answers[f"{name}_tokens"].to_numpy(dtype=np.float64),
        )
        for name in names
    }
    scores = {name: counts[name][SCORE[kind]].to_numpy() for name in names}
    ours, theirs = scores["candidate"], scores.get("champion")
    extracted = {name: _extracted(answers, name, fields) for name in names} if kind == "extraction" else {}
    finish = answers["candidate_finish"]
    return GenerationReport(
        type=kind,
        task=task,
        adapter=adapter,
        champion=champion,
        test_split=test_split,
        fields=dict(fields),
        rows=len(answers),
        test_rows=test_rows,
        max_tokens=max_tokens,
        cut=int((finish == "length").sum()),
        unanswered=int((finish == "refused").sum()),
        models={name: figures(kind, counts[name], confidence=confidence, seed=seed) for name in names},
        score=SCORE[kind],
        over_base=gain_of(ours, scores["base"]),
        paired=None if theirs is None else gain_of(ours, theirs),
        retained=None if theirs is None else gain_of(ours, theirs, answers["was_in_champion_test"]),
        slices=[
            *(_slice(name, value, ours, theirs, mask) for name, value, mask in slice_masks(answers.assign(label=""))),
            *_field_slices(extracted, fields),
        ],
        per_field={name: _field_figures(extracted["candidate"], name) for name in fields} if extracted else {},
        latency=latency,
        serving=serving,
        forgetting=forgetting,
        created_from=dict(created_from),
    )


def _slice(
    name: str,
    value: str,
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64] | None,
    mask: NDArray[np.bool_] | None = None,
) -> ScoreSlice:
    chosen = np.ones(len(ours), dtype=bool) if mask is None else mask
    return ScoreSlice(
        name=name,
        value=value,
        rows=int(chosen.sum()),
        candidate=float(ours[chosen].mean()),
        champion=None if theirs is None else float(theirs[chosen].mean()),
        gain=None if theirs is None else gain_of(ours, theirs, chosen),
    )


def _field_slices(extracted: Mapping[str, list[Extracted]], fields: Fields) -> Iterator[ScoreSlice]:
    """Every field by itself: the score of a row is whether it is right."""
    if len(fields) < 2:
        return
    for name in fields if extracted else ():
        right = {
            model: np.array([float(row.valid and row.fields[name].right) for row in rows])
            for model, rows in extracted.items()
        }
        yield _slice("field", name, right["candidate"], right.get("champion"))


def _field_figures(rows: list[Extracted], name: str) -> FieldFigures:
    true, false, missed = (sum(part) for part in zip(*(row.fields[name].counts for row in rows), strict=True))
    return FieldFigures(
        true_positives=true,
        false_positives=false,
        false_negatives=missed,
        precision=true / (true + false) if true + false else 0.0,
        recall=true / (true + missed) if true + missed else 0.0,
        f1=2 * true / (2 * true + false + missed) if true + false + missed else 0.0,
    )


def _extracted(answers: pd.DataFrame, model: str, fields: Fields) -> list[Extracted]:
    pairs = zip(answers[f"{model}_answer"], answers["label"], strict=True)
    return [compare(answer, wanted, fields) for answer, wanted in pairs]


def _check(answers: pd.DataFrame, names: list[str]) -> None:
    wanted = [*COLUMNS, "candidate_finish", *(["was_in_champion_test"] if "champion" in names else [])]
    wanted += [f"{name}_{what}" for name in names for what in ("answer", "loss", "tokens")]
    mend = "Let every model answer every test row once."
    missing = [column for column in wanted if column not in answers]
    if missing:
        raise EvaluationError(f"the answers lack the columns {missing}", mend=mend)
    if answers.empty:
        raise EvaluationError("there are no answers", mend="Check the test split.")
    empty = [column for column in wanted if column != "event_time" and answers[column].isna().any()]
    if empty:
        raise EvaluationError(f"values are missing in the columns {empty}", mend=mend)
    twice = answers["row_id"].duplicated()
    if twice.any():
        raise EvaluationError(f"row {answers['row_id'][twice].iloc[0]} was answered twice", mend=mend)
