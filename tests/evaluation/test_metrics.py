import numpy as np
import pytest

from ft_assets.evaluation.metrics import METRICS, PerLabel, compute_all
from ft_resources.errors import EvaluationError

LABELS = ["spam", "ham", "newsletter", "never seen"]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed: int):
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    rng = np.random.default_rng(seed)
    truth = rng.choice(LABELS[:3], 200, p=[0.2, 0.7, 0.1]).tolist()
    answers = np.where(rng.uniform(size=200) < 0.6, truth, rng.choice([*LABELS[:2], "other"], 200)).tolist()
    options = {"labels": LABELS, "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(truth, answers, average="macro", **options)
    expected = {
        "accuracy": accuracy_score(truth, answers),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
    }
    assert compute_all(truth, answers, LABELS) == pytest.approx(expected, abs=1e-9)
    found = PerLabel().compute(predictions=answers, references=truth, labels=LABELS)
    by_label = precision_recall_fscore_support(truth, answers, average=None, **options)
    for name, values in zip(("precision", "recall", "f1", "support"), by_label, strict=True):
        assert found[name] == pytest.approx(values.tolist(), abs=1e-9)


def test_metrics_add_up_over_batches_and_know_their_direction():
    metric = METRICS["accuracy"].metric()
    for answers in (["spam", "ham"], ["ham", "ham"]):
        metric.add_batch(predictions=answers, references=["spam", "ham"])
    assert metric.compute(labels=LABELS) == {"accuracy": 0.75}
    assert {entry.direction for entry in METRICS.values()} == {"higher"}


def test_an_unknown_reference_is_refused():
    with pytest.raises(EvaluationError, match="eggs"):
        compute_all(["eggs"], ["ham"], LABELS)
