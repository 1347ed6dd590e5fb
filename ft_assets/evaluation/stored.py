"""Reading a stored report back, with the identity it was made for."""

import math

import pydantic

from ft_assets.evaluation.report import EvalReport
from ft_resources.errors import EvaluationError
from ft_resources.lake import Artefact, Lake, short


def read_report(lake: Lake, task: str) -> tuple[Artefact, EvalReport]:
    """The report that `task`'s eval_report points at, and its artefact.

    Raises:
        ArtefactError: It was never made, or its bytes were changed.
        EvaluationError: What the pointer names is no evaluation report of this platform.
    """
    artefact = lake.require(task, "eval_report")
    return artefact, parse_report(artefact)


def parse_report(artefact: Artefact) -> EvalReport:
    """The report inside an `eval_report` artefact; errors as of `read_report`."""
    if artefact.kind != "eval_report":
        raise EvaluationError(
            f"{short(artefact.digest)} is a {artefact.kind}, not an eval_report",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        )
    try:
        return EvalReport.model_validate(artefact.json("report.json"))
    except pydantic.ValidationError as error:
        raise EvaluationError(
            f"report {short(artefact.digest)} does not have the agreed form: {error.error_count()} fields are wrong",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        ) from error


def require_recounted(artefact: Artefact, report: EvalReport) -> None:
    """The report is about the adapters it was made from, and its figures are those of the answers stored beside it.

    Raises:
        EvaluationError: It names other adapters or another split, or an accuracy is not what its rows give.
    """
    made_from = artefact.made_from
    told = {"adapter": report.adapter, "champion": report.champion or "", "test_split": report.test_split}
    wrong = [name for name, digest in told.items() if made_from.get(name) != digest]
    answers = artefact.parquet("predictions.parquet")
    for model, metrics in report.models.items():
        right = float((answers[f"{model}_label"] == answers["label"]).mean()) if len(answers) else float("nan")
        if not math.isclose(right, metrics["accuracy"].value, abs_tol=1e-9):
            wrong.append(f"accuracy of {model}")
    if len(answers) != report.rows:
        wrong.append("rows")
    if wrong:
        raise EvaluationError(
            f"report {short(artefact.digest)} does not agree with what it was made from: {', '.join(wrong)}",
            where=artefact.uri,
            mend="Materialise eval_report again.",
        )
