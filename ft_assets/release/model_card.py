"""The model card of an adapter: what it is, what it was made from, how good it is, where it fails."""

from collections.abc import Mapping
from typing import Any

from ft_assets.evaluation.report import EvalReport
from ft_assets.tasks import TaskSpec
from ft_resources.lake import short

REQUIRED = (
    "task",
    "description",
    "type",
    "labels",
    "base_model",
    "adapter",
    "report",
    "mlflow_run",
    "metrics",
    "rows",
    "limits",
)


def model_card(
    task: TaskSpec, about: Mapping[str, Any], report: EvalReport, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The card as JSON.

    Args:
        about: `adapter.json` of the adapter.
        facts: Digests and counts: `report`, `mlflow_run`, `rows` by split, `made_from`.
    """
    weak = [
        f"{part.name} {part.value}: {part.candidate_right}/{part.rows} right"
        for part in sorted(report.slices, key=lambda part: part.candidate_right / max(part.rows, 1))[:5]
        if part.rows
    ]
    return {
        "task": task.full_name,
        "description": task.description or f"{task.type} with labels {', '.join(task.labels)}",
        "type": task.type,
        "labels": list(task.labels),
        "base_model": about["base"]["model"],
        "adapter": report.adapter,
        "template": about["template"],
        "settings": about["settings"],
        "report": facts["report"],
        "mlflow_run": facts["mlflow_run"],
        "rows": facts["rows"],
        "made_from": facts["made_from"],
        "metrics": {
            name: {"value": interval.value, "low": interval.low, "high": interval.high}
            for name, interval in report.models["candidate"].items()
        },
        "calibration_error": report.calibration.ece,
        "limits": {
            "max_tokens": about["max_tokens"],
            "weakest_slices": weak,
            "scope": "Judged on the task's own test split; other text was not measured.",
        },
    }


def missing(card: Mapping[str, Any]) -> list[str]:
    """Required entries that are absent or empty."""
    return [name for name in REQUIRED if not card.get(name)]


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card as people read it."""
    metrics = "\n".join(
        f"| {k} | {v['value']:.4f} | {v['low']:.4f} to {v['high']:.4f} |" for k, v in card["metrics"].items()
    )
    weak = "\n".join(f"- {line}" for line in card["limits"]["weakest_slices"])
    rows = ", ".join(f"{split} {count}" for split, count in card["rows"].items())
    return (
        f"# {card['task']}\n\n{card['description']}\n\n"
        f"LoRA adapter `{short(card['adapter'])}` on `{card['base_model']}`, recipe `{card['template']}`, "
        f"labels {', '.join(card['labels'])}. Rows: {rows}.\n\n"
        f"| metric | value | interval |\n|---|---|---|\n{metrics}\n\n"
        f"## Limits\n\n{card['limits']['scope']} Inputs are cut to {card['limits']['max_tokens']} tokens. "
        f"Weakest slices:\n\n{weak}\n"
    )
