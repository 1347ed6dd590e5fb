"""What a task may demand of a candidate: the limits of the gates."""

from typing import Annotated, Literal

from pydantic import Field

from ft_assets.specs import Strict

Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["int8", "bf16", "fp32"]
Threshold = Literal[
    "accuracy",
    "macro_f1",
    "macro_precision",
    "macro_recall",
    "exact_match",
    "token_f1",
    "rouge_l",
    "chrf",
    "bleu",
    "field_f1",
    "field_precision",
    "field_recall",
    "field_accuracy",
    "exact_rows",
    "valid_json",
]
THRESHOLDS: dict[str, tuple[Threshold, ...]] = {
    "text-classification": ("accuracy", "macro_f1", "macro_precision", "macro_recall"),
    "text-generation": ("exact_match", "token_f1", "rouge_l", "chrf", "bleu"),
    "extraction": ("field_f1", "field_precision", "field_recall", "field_accuracy", "exact_rows", "valid_json"),
}
"""The metrics of each type of task for which a least value can be set."""
OF_TYPES = {
    "max_calibration_error": ("text-classification",),
    "latency_p95_ms": ("text-classification",),
    "max_probability_shift": ("text-classification",),
    "precisions": ("text-classification",),
    "first_token_p95_ms": ("text-generation", "extraction"),
    "min_tokens_per_second": ("text-generation", "extraction"),
    "max_answered_rows": ("text-generation", "extraction"),
    "max_loss_increase": ("text-generation",),
}
"""Limits that only some types of task have."""


class GatePolicy(Strict):
    """What a candidate must show before it may answer traffic.

    Two models are compared row by row: by right labels (accuracy), by token_f1 of written answers, and by
    field_accuracy of an extraction. Margins are in that unit.
    """

    thresholds: dict[Threshold, Share] = Field(
        default={"accuracy": 0.8}, description="Metric to its least value on the test split."
    )
    min_test_rows: int = Field(20, ge=2, description="Fewer test rows decide nothing: the gate refuses.")
    non_inferiority_margin: float = Field(
        0.02, gt=0, lt=0.5, description="How much accuracy a candidate may lose against the champion, at most."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence of the intervals the gates look at.")
    slice_margin: float = Field(0.03, gt=0, lt=1, description="Accuracy loss on one slice that counts as regression.")
    slice_min_rows: int = Field(30, ge=5, description="Smaller slices are shown, not judged.")
    max_calibration_error: float = Field(
        0.1, gt=0, le=1, description="text-classification: largest expected calibration error."
    )
    latency_p95_ms: float = Field(
        200, gt=0, description="text-classification: engine time of one request at the 95th percentile."
    )
    first_token_p95_ms: float = Field(
        5000,
        gt=0,
        description="text-generation, extraction: engine time to the first text of one request at the 95th percentile.",
    )
    min_tokens_per_second: float = Field(
        5, gt=0, description="text-generation, extraction: least speed at which one request is answered."
    )
    min_serving_agreement: float = Field(
        0.99,
        gt=0,
        le=1,
        description="Least share of rows, or of written tokens, on which serving engine and plain peft agree; tokens "
        "between which plain peft is undecided count as agreed.",
    )
    max_probability_shift: float = Field(
        0.1,
        gt=0,
        le=1,
        description="text-classification: by how much the serving engine may shift probabilities against plain peft, "
        "on 95 % of the rows.",
    )
    precisions: tuple[Precision, ...] = Field(
        ("int8", "bf16", "fp32"),
        min_length=1,
        description="text-classification: precisions it may be served in; the fastest that keeps the two limits is.",
    )
    forgetting_margin: float = Field(
        0.02, gt=0, lt=0.5, description="Accuracy a candidate may lose on the rows the champion was tested on."
    )
    max_loss_increase: float = Field(
        0.5,
        gt=0,
        description="text-generation: how much worse than its base model a candidate may answer general questions, in "
        "nats per token.",
    )
    max_answered_rows: int = Field(
        300, ge=2, description="text-generation, extraction: more test rows than these are sampled down to them."
    )
