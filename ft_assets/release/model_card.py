"""The model card of an adapter: what it is, what it was made from, how good it is, where it fails."""

from collections.abc import Mapping
from typing import Any

from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.stored import Report
from ft_assets.tasks import TaskSpec
from ft_resources.lake import short

REQUIRED = (
    "task",
    "description",
    "type",
    "base_model",
    "adapter",
    "report",
    "mlflow_run",
    "metrics",
    "rows",
    "limits",
)
REQUIRED_OF = {"text-classification": ("labels",), "extraction": ("fields",), "text-generation": ()}
"""Further entries by type of task."""


def model_card(task: TaskSpec, about: Mapping[str, Any], report: Report, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The card as JSON.

    Args:
        about: `adapter.json` of the adapter.
        facts: Digests and counts: `report`, `mlflow_run`, `rows` by split, `made_from`.
    """
    return {
        "task": task.full_name,
        "description": task.description or f"{task.type} of {', '.join(task.labels or task.fields) or 'answers'}",
        "type": task.type,
        **({"labels": list(task.labels)} if task.labels else {}),
        **({"fields": {name: one.model_dump() for name, one in task.fields.items()}} if task.fields else {}),
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
        **({} if isinstance(report, GenerationReport) else {"calibration_error": report.calibration.ece}),
        "limits": {
            "max_tokens": about["max_tokens"],
            "weakest_slices": _weakest(report),
            "scope": "Judged on the task's own test split; other text was not measured.",
        },
    }


def missing(card: Mapping[str, Any]) -> list[str]:
    """Required entries that are absent or empty."""
    return [name for name in (*REQUIRED, *REQUIRED_OF.get(card.get("type", ""), ())) if not card.get(name)]


def _weakest(report: Report) -> list[str]:
    if isinstance(report, GenerationReport):
        return [
            f"{part.name} {part.value}: {report.score} {part.candidate:.3f} on {part.rows} rows"
            for part in sorted(report.slices, key=lambda part: part.candidate)[:5]
        ]
    return [
        f"{part.name} {part.value}: {part.candidate_right}/{part.rows} right"
        for part in sorted(report.slices, key=lambda part: part.candidate_right / max(part.rows, 1))[:5]
        if part.rows
    ]


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card as people read it."""
    metrics = "\n".join(
        f"| {k} | {v['value']:.4f} | {v['low']:.4f} to {v['high']:.4f} |" for k, v in card["metrics"].items()
    )
    weak = "\n".join(f"- {line}" for line in card["limits"]["weakest_slices"])
    rows = ", ".join(f"{split} {count}" for split, count in card["rows"].items())
    about = [f"recipe `{card['template']}`", *(f"{w} {', '.join(card[w])}" for w in ("labels", "fields") if w in card)]
    taken = "Inputs are cut to" if "labels" in card else "It was trained on rows of up to"
    return (
        f"# {card['task']}\n\n{card['description']}\n\n"
        f"LoRA adapter `{short(card['adapter'])}` on `{card['base_model']}`, {', '.join(about)}. Rows: {rows}.\n\n"
        f"| metric | value | interval |\n|---|---|---|\n{metrics}\n\n"
        f"## Limits\n\n{card['limits']['scope']} {taken} {card['limits']['max_tokens']} tokens. "
        f"Weakest slices:\n\n{weak}\n"
    )
