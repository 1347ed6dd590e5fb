"""The metrics of the platform as `evaluate.Metric`s that need no hub; for worker processes, importing it takes seconds.

Every metric takes string labels and the fixed list of labels, so that a label absent from the rows counts as 0 in a
macro mean instead of leaving it, and figures of different test splits stay comparable.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import datasets
import evaluate

from ft_assets.evaluation.statistics import confusion_counts, label_figures, overall_figures


class LabelMetric(evaluate.Metric):
    """A metric over string labels; `compute(predictions=, references=, labels=)`.

    Raises:
        EvaluationError: On `compute`, when a reference is not among `labels`.
    """

    description: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"keep_in_memory": True} | options))

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions and references: lists of labels; labels: all labels of the task.",
            features=datasets.Features({"predictions": text, "references": text}),
        )


class OverallMetric(LabelMetric):
    """One of the figures over all rows."""

    figure: ClassVar[str]

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]
    ) -> dict[str, float]:
        return {self.figure: float(overall_figures(confusion_counts(references, predictions, labels))[self.figure])}


class Accuracy(OverallMetric):
    description = "Share of rows answered with their label."
    figure = "accuracy"


class MacroPrecision(OverallMetric):
    description = "Precision averaged over labels, each label counting the same."
    figure = "macro_precision"


class MacroRecall(OverallMetric):
    description = "Recall averaged over labels, each label counting the same."
    figure = "macro_recall"


class MacroF1(OverallMetric):
    description = "F1 averaged over labels, each label counting the same."
    figure = "macro_f1"


class PerLabel(LabelMetric):
    """Precision, recall, F1 and support of each label, as lists in the order of `labels`."""

    description = "Precision, recall, F1 and support of each label."

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]
    ) -> dict[str, list[float]]:
        by_label = label_figures(confusion_counts(references, predictions, labels))
        return {name: values.tolist() for name, values in by_label.items()}


class Registered(NamedTuple):
    """A metric and which way is better."""

    metric: type[OverallMetric]
    direction: Literal["higher", "lower"]


METRICS: dict[str, Registered] = {
    kind.figure: Registered(kind, "higher") for kind in (Accuracy, MacroPrecision, MacroRecall, MacroF1)
}


def compute_all(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Every registered metric by name."""
    return {
        name: entry.metric().compute(predictions=predictions, references=references, labels=labels)[name]
        for name, entry in METRICS.items()
    }
