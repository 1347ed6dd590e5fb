"""Reading a stored report back, with the identity it was made for."""

import math

import pydantic

from ft_assets.evaluation.generation.metrics import figures, row_counts
from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.report import EvalReport
from ft_resources.errors import EvaluationError, GateRefusal
from ft_resources.lake import Artefact, Lake, short

Report = EvalReport | GenerationReport


def read_report(lake: Lake, task: str) -> tuple[Artefact, Report]:
    """The report that `task`'s eval_report points at, and its artefact.

    Raises:
        ArtefactError: It was never made, or its bytes were changed.
        EvaluationError: What the pointer names is no evaluation report of this platform.
    """
    artefact = lake.require(task, "eval_report")
    return artefact, parse_report(artefact)


def parse_report(artefact: Artefact) -> Report:
    """The report inside an `eval_report` artefact; errors as of `read_report`."""
    if artefact.kind != "eval_report":
        raise EvaluationError(
            f"{short(artefact.digest)} is a {artefact.kind}, not an eval_report",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        )
    stored = artefact.json("report.json")
    written = isinstance(stored, dict) and stored.get("type") in ("text-generation", "extraction")
    try:
        return (GenerationReport if written else EvalReport).model_validate(stored)
    except pydantic.ValidationError as error:
        raise EvaluationError(
            f"report {short(artefact.digest)} does not have the agreed form: {error.error_count()} fields are wrong",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        ) from error


def served_precision(report: Report) -> str:
    """What a release on this report is served in: what everything in it was measured in.

    Raises:
        GateRefusal: It was measured in nothing that can be served.
    """
    if report.serving is None:
        raise GateRefusal(
            "what the report is about cannot be served",
            where=f"release of {report.task}",
            mend="Release an adapter: name a recipe without `trainer`.",
        )
    return report.serving.precision


def require_engine(report: Report, engine: str) -> None:
    """What writes texts here, `torch` or `vllm`, is what wrote those of the report; labels have one engine only.

    Raises:
        GateRefusal: It is another one.
    """
    if isinstance(report, GenerationReport) and report.serving.engine != engine:
        raise GateRefusal(
            f"the answers were evaluated as {report.serving.engine} writes them, and {engine} would serve them",
            where=f"release of {report.task}",
            mend=f"Materialise eval_report with FT_GENERATION_ENGINE={engine}, or release with "
            f"FT_GENERATION_ENGINE={report.serving.engine}.",
        )


def require_recounted(artefact: Artefact, report: Report) -> None:
    """The report is about the adapters it was made from, and its figures are those of the answers stored beside it.

    Raises:
        EvaluationError: It names other adapters or another split, or a figure is not what its rows give.
    """
    made_from = artefact.made_from
    told = {"adapter": report.adapter, "champion": report.champion or "", "test_split": report.test_split}
    wrong = [name for name, digest in told.items() if made_from.get(name) != digest]
    wrong += _written(artefact, report) if isinstance(report, GenerationReport) else _labelled(artefact, report)
    if wrong:
        raise EvaluationError(
            f"report {short(artefact.digest)} does not agree with what it was made from: {', '.join(wrong)}",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        )


def _labelled(artefact: Artefact, report: EvalReport) -> list[str]:
    wrong = []
    answers = artefact.parquet("predictions.parquet")
    for model, metrics in report.models.items():
        right = float((answers[f"{model}_label"] == answers["label"]).mean()) if len(answers) else math.nan
        if not math.isclose(right, metrics["accuracy"].value, abs_tol=1e-9):
            wrong.append(f"accuracy of {model}")
    return wrong + ["rows"] * (len(answers) != report.rows)


def _written(artefact: Artefact, report: GenerationReport) -> list[str]:
    """The answers scored again, every metric of every model."""
    answers = artefact.parquet("predictions.parquet")
    if len(answers) != report.rows or answers.empty:
        return ["rows"]
    wrong = []
    for model, told in report.models.items():
        counts = row_counts(report.type, answers[f"{model}_answer"], answers["label"], report.fields)
        counts = counts.assign(loss=answers[f"{model}_loss"], tokens=answers[f"{model}_tokens"])
        again = figures(report.type, counts, confidence=0.95)
        wrong += [
            f"{metric} of {model}"
            for metric, each in again.items()
            if metric not in told or not math.isclose(each.value, told[metric].value, abs_tol=1e-9)
        ]
    return wrong
