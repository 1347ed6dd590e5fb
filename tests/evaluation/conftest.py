"""Made-up answers of made-up models, for tests that need predictions or a report."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ft_assets.evaluation.report import (
    Calibration,
    EvalReport,
    LabelFigures,
    Latency,
    Paired,
    Serving,
    Slice,
    build_report,
)
from ft_assets.evaluation.statistics import (
    Bin,
    Interval,
    confusion_counts,
    label_figures,
    overall_figures,
)

LABELS = ["spam", "ham"]
CHAMPION = "c" * 64


def predictions(
    rows: int = 600, *, candidate_right: float = 0.95, champion_right: float | None = 0.93, seed: int = 0
) -> pd.DataFrame:
    """Two labels, lengths from 8 to 312 characters, three months; the asked shares of right answers at random."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "row_id": [f"{at:032x}" for at in range(rows)],
            "text": ["buy now " * int(n) for n in rng.integers(1, 40, rows)],
            "label": np.where(np.arange(rows) % 3 == 0, "spam", "ham"),
            "event_time": pd.Timestamp("2002-07-01", tz="UTC") + pd.to_timedelta(np.arange(rows) % 90, unit="D"),
            "origin": np.where(np.arange(rows) % 5 == 0, "feedback", "package"),
        }
    )
    answer(frame, "candidate", rng.permutation(rows) < round(candidate_right * rows))
    sure = rng.beta(12, 1.2, rows).clip(0.51, 0.999)
    frame["candidate_confidence"] = sure
    for label in LABELS:
        frame[f"candidate_p_{label}"] = np.where(frame["candidate_label"] == label, sure, 1 - sure)
    frame["majority_label"] = "ham"
    answer(frame, "linear", rng.permutation(rows) < round(0.9 * rows))
    if champion_right is not None:
        answer(frame, "champion", rng.permutation(rows) < round(champion_right * rows))
        frame["was_in_champion_test"] = np.arange(rows) % 4 != 0
    return frame


def answer(frame: pd.DataFrame, model: str, right: np.ndarray) -> None:
    """Let the model answer right where `right` holds and with the other label elsewhere."""
    frame[f"{model}_label"] = _answers(frame["label"].to_numpy(), right)


def _answers(truth: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where(right, truth, np.where(truth == "spam", "ham", "spam"))


def report_of(frame: pd.DataFrame, **changes: object) -> EvalReport:
    settings = {
        "task": "mail-triage",
        "adapter": "a" * 64,
        "champion": CHAMPION if "champion_label" in frame else None,
        "test_split": "5" * 64,
        "labels": LABELS,
        "temperature": 1.3,
        "latency": Latency(p50_ms=9.0, p95_ms=21.0, requests=200),
        "serving": Serving(precision="bf16", rows=len(frame), agreement=0.998, max_probability_difference=0.004),
        "created_from": {"adapter": "a" * 64, "test_split": "5" * 64},
    }
    return build_report(frame, **(settings | changes))


def counted(
    candidate: np.ndarray,
    champion: np.ndarray | None = None,
    *,
    group: np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> EvalReport:
    """A report from bool arrays [rows] of right answers, without a bootstrap: fast enough for thousands of cases."""
    rows = len(candidate)
    truth = np.where(np.arange(rows) % 2 == 0, "spam", "ham") if truth is None else truth
    group = np.array(["one"] * rows) if group is None else group

    def figures(right: np.ndarray) -> dict[str, Interval]:
        counts = confusion_counts(truth.tolist(), _answers(truth, right).tolist(), LABELS)
        values = {name: float(value) for name, value in overall_figures(counts).items()}
        return {name: Interval(value=value, low=value, high=value) for name, value in values.items()}

    def pair(mask: np.ndarray) -> Paired:
        return Paired(
            rows=int(mask.sum()),
            only_candidate_right=int((candidate & ~champion & mask).sum()),
            only_champion_right=int((~candidate & champion & mask).sum()),
        )

    def part(value: str) -> Slice:
        mask = group == value
        counts = {"name": "group", "value": value, "rows": int(mask.sum())}
        counts["candidate_right"] = int((candidate & mask).sum())
        if champion is not None:
            counts |= pair(mask).model_dump(exclude={"rows"}) | {"champion_right": int((champion & mask).sum())}
        return Slice(**counts)

    confusion = confusion_counts(truth.tolist(), _answers(truth, candidate).tolist(), LABELS)
    by_label = label_figures(confusion)
    everything = np.ones(rows, dtype=bool)
    share = float(candidate.mean())
    return EvalReport(
        task="mail-triage",
        adapter="a" * 64,
        champion=None if champion is None else CHAMPION,
        test_split="5" * 64,
        labels=LABELS,
        rows=rows,
        models={
            "candidate": figures(candidate),
            **({} if champion is None else {"champion": figures(champion)}),
            "majority": figures(truth == "ham"),
            "linear": figures(everything),
        },
        per_label={
            label: LabelFigures(
                precision=by_label["precision"][at],
                recall=by_label["recall"][at],
                f1=by_label["f1"][at],
                support=int(by_label["support"][at]),
            )
            for at, label in enumerate(LABELS)
        },
        confusion=confusion[:, :2].tolist(),
        paired=None if champion is None else pair(everything),
        retained=None if champion is None else pair(np.arange(rows) % 4 != 0),
        slices=[part(value) for value in dict.fromkeys(group.tolist())],
        calibration=Calibration(
            ece=0.0,
            brier=0.1,
            temperature=1.0,
            bins=[Bin(low=0.0, high=1.0, count=rows, confidence=share, accuracy=share)],
        ),
        latency=Latency(p50_ms=9.0, p95_ms=21.0, requests=200),
        serving=Serving(precision="fp32", rows=rows, agreement=1.0, max_probability_difference=1e-6),
        created_from={"adapter": "a" * 64},
    )


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    return SimpleNamespace(
        predictions=predictions, answer=answer, report_of=report_of, counted=counted, labels=LABELS, champion=CHAMPION
    )
